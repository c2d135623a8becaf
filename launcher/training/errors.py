"""Errors of a rank that a user can do something about."""

from memlaunch.strategies.technique import NotApplicable

__all__ = ["JobMismatch", "LaunchFailed", "NotApplicable", "TrainingFailed"]


class JobMismatch(ValueError):
    """The job does not fit the model, the data or the machine; found only in the rank.

    Attributes:
        key: the dotted key of the job file to look at.
        hint: what to do about it.
    """

    def __init__(self, key: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


class LaunchFailed(RuntimeError):
    """The ranks cannot work together as they were started."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class TrainingFailed(RuntimeError):
    """Training cannot go on: a loss that is not finite, a technique that did not take."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint
