"""Errors that a user can mend, and the typed configuration of a run."""


class InputError(ValueError):
    """Bad input from outside: the command prints it as one line and exits with status 2.

    The message says what was expected, what was found and what to do.
    """
