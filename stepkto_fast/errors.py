"""The one exception the command line prints without a traceback."""


class RunError(RuntimeError):
    """Something the user can mend: the message names the file, row, key or value and the remedy."""
