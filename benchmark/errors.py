"""Errors that a user can mend. The command line prints them as one line and exits with 2."""


class InputError(ValueError):
    """Wrong input or usage: the message says what was expected, what came, and what to do."""


class OutputError(InputError):
    """A file cannot be written: the folder is read-only, the disk is full."""


class ContractError(InputError):
    """A strategy does something that its specification did not declare, or returns what the contract does not allow."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a run like Ctrl-C, which takes its workers along and leaves nothing half-written."""


class NotFiniteError(RuntimeError):
    """A loss or a logit that is NaN or infinite; the cell fails with its reason."""
