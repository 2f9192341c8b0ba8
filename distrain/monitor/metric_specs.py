"""Names, help texts and labels of all metrics.

On the page each name has the prefix `distrain_`, counters end in `_total`, and every
series has the label `run`, the name of the run directory. The labels `rank` and `node`
are only on metrics that identify a straggler: each label multiplies the series.
"""

from typing import Literal, NamedTuple


class MetricSpec(NamedTuple):
    """Description of a metric."""

    help_text: str
    label_names: tuple[str, ...] = ()
    """Labels in addition to `run`."""
    merge_mode: Literal["sum", "min", "max"] = "max"
    """Merge of the gauges of several ranks into that of their node."""


# A gauge that only rank 0 sets is merged by `max`, which leaves it as it is.
GAUGES = {
    # Position and plan of the run.
    "build_info": MetricSpec(
        "Always 1; its labels are the versions of distrain and torch and the device.",
        ("version", "torch", "device"),
    ),
    "step": MetricSpec("Steps of the run that are done: its position."),
    "steps_planned": MetricSpec("Steps of the whole run."),
    "epoch": MetricSpec(
        "Epochs of the run that are done, with the fraction of the current one."
    ),
    # Results: of training at log steps, of validation after each evaluation.
    "loss": MetricSpec(
        "Mean loss over the samples since the previous log step (split=train) "
        "or of the last evaluation (split=val).",
        ("split",),
    ),
    "top1_ratio": MetricSpec(
        "Fraction of the samples of distrain_loss "
        "whose highest logit is their label's.",
        ("split",),
    ),
    "top5_ratio": MetricSpec(
        "Fraction of the samples of distrain_loss "
        "with their label among the five highest logits.",
        ("split",),
    ),
    "learning_rate": MetricSpec("Learning rate of the last log step."),
    "images_per_second": MetricSpec(
        "Training images per second since the previous log step, over all ranks."
    ),
    # Norms: rank 0 measures them, and copies the weights for that.
    "gradient_norm": MetricSpec(
        "Norm of the mean gradient before clipping, at a log step, "
        "at most every 15 seconds."
    ),
    "weight_norm": MetricSpec(
        "Norm of all trained parameters after the step of distrain_gradient_norm."
    ),
    "update_ratio": MetricSpec(
        "Norm of the change of the weights in the step of distrain_gradient_norm, "
        "divided by distrain_weight_norm."
    ),
    # Health of the data and of the training.
    "bad_samples": MetricSpec(
        "Distinct training samples that could not be decoded, over the run so far."
    ),
    "quarantined_samples": MetricSpec(
        "Samples of all data sets whose files have crashed a decoder."
    ),
    "bad_samples_limit": MetricSpec(
        "Bad samples that the run tolerates (data.max_bad_samples)."
    ),
    "diverged": MetricSpec(
        "1 if the run has ended with a loss or gradient that is not finite, else 0."
    ),
    # Checkpoints, attempts and ranks.
    "checkpoint_timestamp_seconds": MetricSpec(
        "Unix time at which this attempt completed its newest checkpoint; "
        "the start of the attempt until it has one."
    ),
    "checkpoint_bytes": MetricSpec("Size of the newest checkpoint."),
    "attempt": MetricSpec("Number of this attempt in its run directory."),
    "restarts": MetricSpec(
        "Attempts of this run, over all launches, that followed a failed attempt."
    ),
    "resizes": MetricSpec(
        "Attempts of this run, over all launches, that had another number of workers "
        "than the attempt before."
    ),
    "workers": MetricSpec("Ranks that are training."),
    "workers_wanted": MetricSpec(
        "Ranks that the run would use if they were available."
    ),
    # Progress: the rank that has stood still longest decides for its node.
    "stall_limit_seconds": MetricSpec(
        "Seconds without progress after which a rank counts as hung (cluster.stall)."
    ),
    "last_progress_timestamp_seconds": MetricSpec(
        "Unix time of the last progress of the slowest rank.", (), "min"
    ),
    # Resources, summed over the ranks of a node where each rank has its own.
    "queue_depth": MetricSpec(
        "Micro-batches in the loaders of a node, by stage: fetching, decoding, ready.",
        ("stage",),
        "sum",
    ),
    "memory_bytes": MetricSpec("Resident memory of the ranks of this node.", (), "sum"),
    "open_files": MetricSpec("Open files of the ranks of this node.", (), "sum"),
    "gpu_memory_bytes": MetricSpec(
        "Memory of a GPU that torch has reserved; the label is the GPU's UUID.",
        ("gpu",),
    ),
    "gpu_busy_ratio": MetricSpec(
        "Fraction of the last sampling interval in which a kernel ran on a GPU (NVML).",
        ("gpu",),
    ),
    "gpu_power_watts": MetricSpec("Power draw of a GPU (NVML).", ("gpu",)),
    "finished": MetricSpec(
        "1 if the run has finished, early or after all its steps, else 0."
    ),
}

COUNTERS = {
    # Work, recomputed steps included.
    "steps": MetricSpec("Optimizer steps done, recomputed steps included."),
    "steps_recomputed": MetricSpec(
        "Optimizer steps that an earlier attempt had already done and logged."
    ),
    "samples": MetricSpec(
        "Training samples processed, by outcome of decoding: good or bad.",
        ("outcome",),
    ),
    # Times that identify a straggler.
    "rank_data_wait_seconds": MetricSpec(
        "Seconds for which a rank waited for data.", ("rank", "node")
    ),
    "rank_arrival_seconds": MetricSpec(
        "Seconds from the start of a step until a rank reached its all-reduce, "
        "summed over steps.",
        ("rank", "node"),
    ),
    # Storage of a data set.
    "store_requests": MetricSpec("Requests to the storage of a data set.", ("split",)),
    "store_bytes": MetricSpec("Bytes read from the storage of a data set.", ("split",)),
    "store_seconds": MetricSpec(
        "Seconds that storage requests took, summed up; several run at once.",
        ("split",),
    ),
    "store_retries": MetricSpec("Retries of storage requests.", ("split",)),
    "store_errors": MetricSpec(
        "Failed reads of a data set and errors of its disk cache, by kind of error.",
        ("split", "kind"),
    ),
    "cache_hits": MetricSpec("Ranges that were found in the disk cache.", ("split",)),
    "cache_evictions": MetricSpec(
        "Ranges that were evicted from the disk cache.", ("split",)
    ),
    # Events.
    "straggler_log_steps": MetricSpec(
        "Log steps at which a rank was slower than the others.", ("slow_rank",)
    ),
    "loss_spikes": MetricSpec(
        "Log steps at which the loss was at least twice its recent median."
    ),
    "checkpoint_failures": MetricSpec("Checkpoint saves that failed and were retried."),
}

HISTOGRAMS = {
    "phase_seconds": MetricSpec(
        "Seconds per step in a phase, summed over the threads of a rank; "
        "on a GPU one step in eleven is timed and counts for all of them.",
        ("phase",),
    ),
    "checkpoint_write_seconds": MetricSpec("Seconds that writing a checkpoint took."),
}
HISTOGRAM_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the buckets, in seconds."""
