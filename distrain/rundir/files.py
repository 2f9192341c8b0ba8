"""The files of a run directory, by name; the README's table says what is in each."""

import re

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.json"
ATTEMPTS = "attempts"
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow.txt"
"""The id of the run at the MLflow server, for a resume."""
TARGETS = "targets.json"
BAD_SAMPLES = "bad_samples.jsonl"
QUARANTINE = "quarantine.json"

METRICS_NAME = re.compile(r"metrics-(\d+)\.jsonl")
"""Group 1 is the attempt."""
ATTEMPT_NAME = re.compile(r"(\d+)\.json")
"""Inside `ATTEMPTS`; group 1 is the attempt."""
CHECKPOINT_NAME = re.compile(r"step-(\d+)-attempt-(\d+)")
"""Inside `CHECKPOINTS`; groups 1 and 2 are step and attempt."""


def metrics(attempt: int) -> str:
    """The metrics lines of an attempt."""
    return f"metrics-{attempt:03d}.jsonl"


def attempt(number: int) -> str:
    """Who works, or worked, on the run."""
    return f"{ATTEMPTS}/{number:03d}.json"


def checkpoint(step: int, attempt: int) -> str:
    """The name of a checkpoint, inside `CHECKPOINTS`."""
    return f"step-{step:08d}-attempt-{attempt:03d}"


def log(time: str) -> str:
    """What was shown, from a time on."""
    return f"log-{time}.txt"


def stuck(attempt: int, rank: int) -> str:
    """The stacks of a rank that hung."""
    return f"stuck-attempt-{attempt:03d}-rank-{rank}.txt"


def not_finite(step: int) -> str:
    """What is known of a step that diverged."""
    return f"not-finite-step-{step:08d}.json"
