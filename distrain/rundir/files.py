"""Names of the files in a run directory; the README's table says what each holds."""

import re

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.json"
"""In the run directory and in each checkpoint."""
CHECKPOINTS_DIR = "checkpoints"
BEST_FILE = f"{CHECKPOINTS_DIR}/best.json"
ATTEMPTS_DIR = "attempts"
TENSORBOARD_DIR = "tensorboard"
MLFLOW_FILE = "mlflow.txt"
"""Id of the run at the MLflow server, for a resume."""
TARGETS_FILE = "targets.json"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
QUARANTINE_FILE = "quarantine.json"

METRICS_PATTERN = re.compile(r"metrics-(\d+)\.jsonl")
"""Group 1 is the attempt."""
ATTEMPT_PATTERN = re.compile(r"(\d+)\.json")
"""Inside `ATTEMPTS_DIR`; group 1 is the attempt."""
CHECKPOINT_PATTERN = re.compile(r"step-(\d+)-attempt-(\d+)")
"""Inside `CHECKPOINTS_DIR`; groups 1 and 2 are step and attempt."""
CHECKPOINT_URL_PATTERN = re.compile(
    rf"(.+)/{CHECKPOINTS_DIR}/({CHECKPOINT_PATTERN.pattern})/*"
)
"""Path or URL of a checkpoint; groups 1 and 2 are the run directory and the name."""


# Numbers are padded with zeros, so that names sort as the numbers do. The patterns
# above take any number of digits.


def metrics_path(attempt: int) -> str:
    """Return the path of an attempt's metrics, one JSON object per line."""
    return f"metrics-{attempt:03d}.jsonl"


def attempt_path(attempt: int) -> str:
    """Return the path of an attempt's record: its owner, start and end."""
    return f"{ATTEMPTS_DIR}/{attempt:03d}.json"


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint's folder, inside `CHECKPOINTS_DIR`."""
    return f"step-{step:08d}-attempt-{attempt:03d}"


def log_path(time: str) -> str:
    """Return the path of the console log that began at a time."""
    return f"log-{time}.txt"


def stacks_path(attempt: int, rank: int) -> str:
    """Return the path of the thread stacks of a rank that hung."""
    return f"stuck-attempt-{attempt:03d}-rank-{rank}.txt"


def not_finite_path(step: int) -> str:
    """Return the path of the evidence on a step that diverged."""
    return f"not-finite-step-{step:08d}.json"
