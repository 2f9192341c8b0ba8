"""Validation during a run: scored on all ranks, told, and followed by the plateau schedule."""

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


def validate(job: TrainJob, steps_done: int) -> bool:
    """Evaluate and tell; whether this is the best evaluation so far, by its counts."""
    val, progress = job.data.val, job.progress
    assert val is not None
    began = time.monotonic()
    score = evaluate_dataset(job, val)
    seconds = time.monotonic() - began
    check_bad_val_samples(job, val, score)
    job.log_metrics(
        EvalRecord(
            step=steps_done,
            epoch=job.data.order.get_cursor(steps_done - 1).epoch,
            loss=score.loss,
            top1=score.top1_count / score.num_samples if score.num_samples else 0.0,
            top5=score.top5_count / score.num_samples if score.num_samples else 0.0,
            top1_count=score.top1_count,
            top5_count=score.top5_count,
            samples=score.num_samples,
            seconds=seconds,
            classes=len(val.manifest.classes),
        )
    )
    job.telemetry.exclude_time(time.monotonic() - began)
    if (
        job.config.schedule.follows_validation
        and steps_done % job.data.order.steps_per_epoch == 0
    ):
        reduce_lr_on_plateau(job, steps_done, score.top1_count)
    if progress.best_eval is not None and score.top1_count <= progress.best_eval.top1:
        return False
    progress.best_eval = BestEval(
        steps_done, score.top1_count, score.num_samples, get_val_fingerprint(val)
    )
    return True


def check_bad_val_samples(job: TrainJob, val: Dataset, score: EvalResult) -> None:
    """Name validation samples that do not decode, once each; stop when there are too many.

    Raises:
        RunError: there are more than the config allows.
    """
    told = job.progress.reported_bad_val_samples
    new = {
        sample: reason
        for sample, reason in sorted(score.bad_samples.items())
        if sample not in told
    }
    told.update(new)
    for sample, reason in new.items():
        job.console.log(
            f"validation sample {sample} ({val.describe_sample(sample)}) is left out: {reason}"
        )
    limit = job.config.data.max_bad_samples
    if len(told) > limit:  # merged, so that all ranks know it
        raise RunError(
            f"{len(told)} validation samples do not decode, more than data.max_bad_samples = {limit}: mend the data, "
            "or raise the limit and run the same command to go on"
        )


def reduce_lr_on_plateau(job: TrainJob, steps_done: int, num_correct: int) -> None:
    """After an epoch: lower the rate if validation has stalled."""
    schedule, before = job.config.schedule, job.progress.plateau
    if steps_done > round(schedule.warmup_epochs * job.data.order.steps_per_epoch):
        job.progress.plateau = schedule.update_plateau(before, steps_done, num_correct)
    if len(job.progress.plateau.drops) > len(before.drops):
        job.console.log(
            f"{schedule.explain_drop()}: the learning rate is {job.get_lr(steps_done):.4g} now"
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
            track_chunks(job, batches),
            job.engine.lanes,
        )


def track_chunks(job: TrainJob, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same chunks; each is progress, and after the last one this rank waits for the others."""
    for batch in batches:
        job.telemetry.mark_progress(f"chunk {batch.cursor.step} of the evaluation")
        yield batch
    job.telemetry.mark_progress("the sums of the evaluation", waiting=True)
