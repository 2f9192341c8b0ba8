"""The ways in which a run ends with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with cause and remedy. The command line exits with 2."""


class RunError(RuntimeError):
    """The run cannot go on (damaged data, diverged loss): cause and remedy. All ranks agree on it. Exit code 1."""


class AttemptError(RunError):
    """This attempt cannot go on, and the next one may: failed storage, a lost rank. On a cluster it is tried again."""


class LostRankError(AttemptError):
    """Another rank is gone or silent: a symptom, whose cause is there."""
