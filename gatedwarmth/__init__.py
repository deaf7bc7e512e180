"""Gate a warmth LoRA turn by turn, and measure whether empathy and reliability can both be kept."""

from gatedwarmth.model import GatedWarmthModel, Reply
from gatedwarmth.router.base import Decision

__all__ = ["Decision", "GatedWarmthModel", "Reply"]
__version__ = "0.1.0"
