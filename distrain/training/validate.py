"""Validation during a run: scored on all ranks, told, and followed by the plateau schedule."""

import time
from collections.abc import Iterator

from distrain.data.loader import MicroBatch, evaluation_requests
from distrain.data.shards.dataset import Dataset
from distrain.errors import RunError
from distrain.monitor.records import EvalRecord
from distrain.training.datasets import val_fingerprint
from distrain.training.evaluate import Score, evaluate
from distrain.training.job import Job
from distrain.training.state import Best


def validate(job: Job, done: int) -> bool:
    """Evaluate and tell; whether this is the best evaluation so far, by its counts."""
    val, progress = job.data.val, job.progress
    assert val is not None
    began = time.monotonic()
    score = score_of(job, val)
    seconds = time.monotonic() - began
    check_bad_val_samples(job, val, score)
    job.tell(
        EvalRecord(
            step=done,
            epoch=job.data.order.cursor(done - 1).epoch,
            loss=score.loss,
            top1=score.top1 / score.samples if score.samples else 0.0,
            top5=score.top5 / score.samples if score.samples else 0.0,
            top1_count=score.top1,
            top5_count=score.top5,
            samples=score.samples,
            seconds=seconds,
            classes=len(val.manifest.classes),
        )
    )
    job.telemetry.leave_out(time.monotonic() - began)
    if job.config.schedule.follows_validation and done % job.data.order.steps == 0:
        follow(job, done, score.top1)
    if progress.best is not None and score.top1 <= progress.best.top1:
        return False
    progress.best = Best(done, score.top1, score.samples, val_fingerprint(val))
    return True


def check_bad_val_samples(job: Job, val: Dataset, score: Score) -> None:
    """Name validation samples that do not decode, once each; stop when there are too many.

    Raises:
        RunError: there are more than the config allows.
    """
    told = job.progress.val_bad_told
    new = {
        sample: reason
        for sample, reason in sorted(score.bad.items())
        if sample not in told
    }
    told.update(new)
    for sample, reason in new.items():
        job.console.event(
            f"validation sample {sample} ({val.describe(sample)}) is left out: {reason}"
        )
    limit = job.config.data.max_bad_samples
    if len(told) > limit:  # merged, so that all ranks know it
        raise RunError(
            f"{len(told)} validation samples do not decode, more than data.max_bad_samples = {limit}: mend the data, "
            "or raise the limit and run the same command to go on"
        )


def follow(job: Job, done: int, right: int) -> None:
    """After an epoch: lower the rate if validation has stalled."""
    schedule, before = job.config.schedule, job.progress.plateau
    if done > round(schedule.warmup_epochs * job.data.order.steps):
        job.progress.plateau = schedule.observe(before, done, right)
    if len(job.progress.plateau.drops) > len(before.drops):
        job.console.event(
            f"{schedule.reason()}: the learning rate is {job.rate(done):.4g} now"
        )


def score_of(job: Job, dataset: Dataset) -> Score:
    """Evaluate the model on a data set, on all ranks."""
    job.telemetry.at("the evaluation")
    requests = evaluation_requests(
        dataset.manifest.rows,
        job.config.evaluate.batch,
        job.world.rank,
        job.world.ranks,
    )
    with job.loader(dataset, requests, evaluation=True) as batches:
        return evaluate(
            job.config,
            job.world,
            job.network.model,
            watched(job, batches),
            job.network.lanes,
        )


def watched(job: Job, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same chunks; each is progress, and after the last one this rank waits for the others."""
    for batch in batches:
        job.telemetry.at(f"chunk {batch.cursor.step} of the evaluation")
        yield batch
    job.telemetry.at("the sums of the evaluation", waiting=True)
