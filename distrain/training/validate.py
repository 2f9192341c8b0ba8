"""Validation during a run: evaluate, log, and let what follows validation follow."""

import time
from collections.abc import Iterator

from distrain.data.batch import MicroBatch, iter_evaluation_requests
from distrain.data.shards.dataset import Dataset
from distrain.errors import RunError
from distrain.monitor.records import EvalRecord
from distrain.training.checkpoint_state import BestEval
from distrain.training.evaluate import EvalResult, evaluate
from distrain.training.job import TrainJob
from distrain.training.run_data import get_val_fingerprint


def validate(job: TrainJob, steps_done: int, *, scheduled: bool) -> bool:
    """Evaluate, log the result, and update the best one and what follows validation.

    That is a plateau schedule, and early stopping.

    Args:
        job: the run.
        steps_done: steps done.
        scheduled: False if it is evaluated only because it is the last step.

    Returns:
        True if this is the best evaluation so far, by its count of top-1.

    Raises:
        RunError: too many validation samples do not decode.
    """
    val = job.data.val
    progress = job.progress
    order = job.data.order
    assert val is not None

    # Evaluate.
    start_time = time.monotonic()
    result = evaluate_dataset(job, val)
    seconds = time.monotonic() - start_time
    check_bad_val_samples(job, val, result)
    num_samples = result.num_samples
    job.log_metrics(
        EvalRecord(
            step=steps_done,
            epoch=order.get_cursor(steps_done - 1).epoch,
            loss=result.loss,
            top1=result.top1,
            top5=result.top5,
            top1_count=result.top1_count,
            top5_count=result.top5_count,
            samples=num_samples,
            seconds=seconds,
            classes=len(val.classes),
        )
    )
    job.telemetry.exclude_time(time.monotonic() - start_time)

    # The schedule and early stopping count epochs: evaluations within an epoch must not
    # change them.
    is_epoch_end = steps_done % order.steps_per_epoch == 0
    if job.config.schedule.follows_validation and is_epoch_end:
        reduce_lr_on_plateau(job, steps_done, result.top1_count)
    if is_epoch_end:
        progress.stop = progress.stop.update(result.top1_count)

    # Compare integer counts (`best.top1` is one, too), which are the same on all ranks.
    best = progress.best_eval
    if best is not None and result.top1_count <= best.top1:
        return False
    progress.best_eval = BestEval(
        steps_done, result.top1_count, num_samples, get_val_fingerprint(val)
    )
    if scheduled:
        progress.scheduled_best_eval = progress.best_eval
    return True


def check_bad_val_samples(job: TrainJob, val: Dataset, result: EvalResult) -> None:
    """Report validation samples that do not decode, once each, and enforce the limit.

    Raises:
        RunError: there are more than `data.max_bad_samples`.
    """
    reported = job.progress.reported_bad_val_samples
    for sample, reason in sorted(result.bad_samples.items()):
        if sample not in reported:
            description = val.describe_sample(sample)
            job.console.log(
                f"validation sample {sample} ({description}) is left out: {reason}"
            )
    reported.update(result.bad_samples)

    # The result has the bad samples of all ranks, so all raise, or none.
    limit = job.config.data.max_bad_samples
    if len(reported) > limit:
        raise RunError(
            f"{len(reported)} validation samples do not decode, more than "
            f"data.max_bad_samples = {limit}: fix the data, or raise the limit, and "
            "run the same command to resume"
        )


def reduce_lr_on_plateau(job: TrainJob, steps_done: int, top1_count: int) -> None:
    """Lower the learning rate if validation has stalled, at the end of an epoch.

    Args:
        job: the run.
        steps_done: steps done.
        top1_count: validation samples whose highest logit is their label's.
    """
    schedule = job.config.schedule
    before = job.progress.plateau
    # The warm-up does not count: the rate was still rising.
    warmup_steps = round(schedule.warmup_epochs * job.data.order.steps_per_epoch)
    if steps_done > warmup_steps:
        job.progress.plateau = schedule.update_plateau(before, steps_done, top1_count)
    if len(job.progress.plateau.drops) > len(before.drops):
        job.console.log(
            f"{schedule.explain_drop()}: the learning rate is now "
            f"{job.get_lr(steps_done):.4g}"
        )


def evaluate_dataset(job: TrainJob, dataset: Dataset) -> EvalResult:
    """Evaluate the model on a data set, on all ranks."""
    job.telemetry.mark_progress("the evaluation")
    requests = iter_evaluation_requests(
        dataset.manifest.num_rows,
        job.config.evaluate.batch,
        job.world.rank,
        job.world.world_size,
    )
    with job.open_loader(dataset, requests, evaluation=True) as batches:
        return evaluate(
            job.config,
            job.world,
            job.engine.model,
            report_progress(job, batches),
            job.engine.lanes,
        )


def report_progress(
    job: TrainJob, batches: Iterator[MicroBatch]
) -> Iterator[MicroBatch]:
    """Pass the batches through, and report each to the watchdog as progress."""
    for batch in batches:
        job.telemetry.mark_progress(f"chunk {batch.cursor.step} of the evaluation")
        yield batch
    # From here on, this rank waits for the others.
    job.telemetry.mark_progress("the all-reduce of the evaluation", waiting=True)
