"""The exit code and the sentence of an error that ends the program: the same for `gptline` and for the driver of a submitted run."""

from __future__ import annotations

from pipelines.plan.faults import ConfigError
from pipelines.stage import StageFailure
from pipelines.store.journal import Superseded

FAILED = 1
REFUSED = 2
UNREACHABLE = 3
ENDING = (ConfigError, StageFailure, ValueError, OSError, Superseded)
"""The errors that a person can do something about. Any other is a bug and shows its traceback."""


def exit_of(error: Exception) -> tuple[int, str]:
    """The exit code of one of the `ENDING` errors, and what to print."""
    if isinstance(error, Superseded):
        return FAILED, f"{error}, or `gptline sync` found no sign of life and ended it; `gptline status` shows which"
    if isinstance(error, OSError):
        return UNREACHABLE, f"can't continue: {error}"
    return UNREACHABLE if isinstance(error.__cause__, OSError) else REFUSED, str(error)
