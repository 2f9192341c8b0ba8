"""The files of a run directory, by name; the README's table says what is in each."""

import re

CONFIG_FILE = "config.yaml"
CHECKPOINTS_DIR = "checkpoints"
BEST_FILE = f"{CHECKPOINTS_DIR}/best.json"
ATTEMPTS_DIR = "attempts"
TENSORBOARD_DIR = "tensorboard"
MLFLOW_FILE = "mlflow.txt"
"""The id of the run at the MLflow server, for a resume."""
TARGETS_FILE = "targets.json"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
QUARANTINE_FILE = "quarantine.json"

METRICS_PATTERN = re.compile(r"metrics-(\d+)\.jsonl")
"""Group 1 is the attempt."""
ATTEMPT_PATTERN = re.compile(r"(\d+)\.json")
"""Inside `ATTEMPTS`; group 1 is the attempt."""
CHECKPOINT_PATTERN = re.compile(r"step-(\d+)-attempt-(\d+)")
"""Inside `CHECKPOINTS`; groups 1 and 2 are step and attempt."""


def metrics_path(attempt: int) -> str:
    """The metrics lines of an attempt."""
    return f"metrics-{attempt:03d}.jsonl"


def attempt_path(attempt: int) -> str:
    """Who works, or worked, on the run."""
    return f"{ATTEMPTS_DIR}/{attempt:03d}.json"


def checkpoint_name(step: int, attempt: int) -> str:
    """The name of a checkpoint, inside `CHECKPOINTS`."""
    return f"step-{step:08d}-attempt-{attempt:03d}"


def log_path(time: str) -> str:
    """What was shown, from a time on."""
    return f"log-{time}.txt"


def stacks_path(attempt: int, rank: int) -> str:
    """The stacks of a rank that hung."""
    return f"stuck-attempt-{attempt:03d}-rank-{rank}.txt"


def not_finite_path(step: int) -> str:
    """What is known of a step that diverged."""
    return f"not-finite-step-{step:08d}.json"
