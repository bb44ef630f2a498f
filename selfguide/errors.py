"""The two ways in which a run ends without a bug: the user can mend it, or the task itself failed."""


class UserError(Exception):
    """A mistake that the user can mend. One line: what is wrong, where, and the remedy. Exit code 2."""


class TaskFailed(Exception):
    """The task could not be carried to its end (nothing survived the filters, too many rows failed). Exit code 1."""
