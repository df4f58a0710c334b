"""The exceptions that the command line prints without a traceback."""


class RunError(RuntimeError):
    """Something the user can mend: the message names the file, row, key or value and the remedy."""


class TrainingError(RunError):
    """A policy that cannot be trained on: it writes nothing to learn from, or its loss is not finite. The run was sound
    up to there."""
