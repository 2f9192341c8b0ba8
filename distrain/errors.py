"""The two ways in which a run ends with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with cause and remedy. The command line exits with 2."""


class RunError(RuntimeError):
    """The run cannot go on (damaged data, failed storage, diverged loss): cause and remedy. Exit code 1."""
