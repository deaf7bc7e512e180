"""Evaluation: arms on tasks in contexts, in pairs, with intervals.

from gatedwarmth.eval import EvalSettings, evaluate, print_table
print_table(evaluate(model, "runs/eval", EvalSettings(limit=20)))
"""

from __future__ import annotations

from gatedwarmth.eval.arms import ARMS, Arm, get_arms
from gatedwarmth.eval.contexts import BELIEFS, CONTEXTS, Case
from gatedwarmth.eval.evaluate import evaluate
from gatedwarmth.eval.judges import SocioTWarmth, Verdict, judge
from gatedwarmth.eval.report import compare, print_table, write_report
from gatedwarmth.eval.results import Results, analyse
from gatedwarmth.eval.runner import identify, run
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.tasks import TASKS, Task

__all__ = [
    "ARMS",
    "BELIEFS",
    "CONTEXTS",
    "TASKS",
    "Arm",
    "Case",
    "EvalSettings",
    "Results",
    "SocioTWarmth",
    "Task",
    "Verdict",
    "analyse",
    "compare",
    "evaluate",
    "get_arms",
    "identify",
    "judge",
    "print_table",
    "run",
    "write_report",
]
