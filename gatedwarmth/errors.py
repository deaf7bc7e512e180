"""One tree of errors. Every message says what was wrong, with the value, and what to do."""

from __future__ import annotations

from pathlib import Path


class GatedWarmthError(Exception):
    """Base of every error that this package raises on purpose."""


class BaseModelError(GatedWarmthError):
    """A base model could not be found, loaded or wrapped."""


class AdapterError(GatedWarmthError):
    """An adapter folder is broken, of another base, or of a kind that cannot be gated exactly."""


class GateError(GatedWarmthError, ValueError):
    """Gates of a wrong shape, outside [0, 1], not a number, or of an unknown trait."""


class ConversationError(GatedWarmthError, ValueError):
    """Messages that no reply can be given to: empty, of unknown roles, or too long for the context."""


class RouterError(GatedWarmthError):
    """A router folder is broken, does not fit the base, or a router is missing."""


class ModelFolderError(GatedWarmthError):
    """A folder that `save_pretrained` did not write, or of a schema that this version cannot read."""


class TrainingError(GatedWarmthError):
    """Training data or settings that cannot work."""


class EvaluationError(GatedWarmthError):
    """An evaluation that cannot be run or resumed as asked."""


class DataError(GatedWarmthError, ValueError):
    """A line of a data file that breaks the schema.

    Parameters
    ----------
    path, line: where; line counts from 1, 0 means the file as a whole.
    problem: what is wrong, with the value, and what would be right.
    """

    def __init__(self, path: str | Path, line: int, problem: str) -> None:
        self.path, self.line, self.problem = Path(path), line, problem
        super().__init__(f"{path}:{line}: {problem}" if line else f"{path}: {problem}")
