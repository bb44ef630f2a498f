"""The two ways in which a run ends without a bug: the user can mend it, or the task itself failed."""

from engines.types import UserError as UserError


class StageBusy(UserError):
    """Another process is at work in the stage's folder, or has just taken it over."""


class TaskFailed(Exception):
    """The task could not be carried to its end (nothing survived the filters, too many rows failed). Exit code 1."""
