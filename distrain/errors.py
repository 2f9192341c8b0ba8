"""Errors that end a run with one sentence instead of a traceback."""


class UserError(ValueError):
    """Mistake that the user can fix: one sentence with its cause and remedy.

    The command line exits with code 2.
    """


class RunError(RuntimeError):
    """The run cannot continue, for example because of damaged data or a diverged loss.

    The message names the cause and the remedy. All ranks raise it together, and the
    command line exits with code 1.
    """


class AttemptError(RunError):
    """This attempt cannot continue, but the next one may: failed storage, a lost rank.

    On a cluster the run is retried.
    """


class LostRankError(AttemptError):
    """Another rank is gone or silent: a symptom, whose cause is on that rank."""
