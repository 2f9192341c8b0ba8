"""Validation during a run: scored on all ranks, told, and followed by the plateau schedule."""

import time
from collections.abc import Iterator

from distrain.data.loader import MicroBatch, evaluation_requests
from distrain.data.shards.dataset import Dataset
from distrain.errors import RunError
from distrain.training.datasets import val_fingerprint
from distrain.training.evaluate import Score, evaluate
from distrain.training.setup import Job


def validate(job: Job, done: int) -> bool:
    """Evaluate and tell; whether this is the best evaluation so far, by its counts."""
    assert job.val is not None
    began = time.monotonic()
    score = score_of(job, job.val)
    seconds = time.monotonic() - began
    new = {k: reason for k, reason in sorted(score.bad.items()) if k not in job.val_bad_told}
    job.val_bad_told.update(new)
    for sample_id, reason in new.items():
        job.console.event(f"validation sample {sample_id} ({job.val.describe(sample_id)}) is left out: {reason}")
    if len(job.val_bad_told) > job.config.data.max_bad_samples:  # merged, so that all ranks know it
        raise RunError(
            f"{len(job.val_bad_told)} validation samples do not decode, more than data.max_bad_samples = "
            f"{job.config.data.max_bad_samples}: mend the data, or raise the limit and run the same command to go on"
        )
    record = {
        "kind": "eval",
        "step": done,
        "epoch": job.order.cursor(done - 1).epoch,
        "loss": score.loss,
        "top1": score.top1 / score.samples if score.samples else 0.0,
        "top5": score.top5 / score.samples if score.samples else 0.0,
        "top1_count": score.top1,
        "top5_count": score.top5,
        "samples": score.samples,
        "seconds": seconds,
        "classes": len(job.val.manifest.classes),
    }
    job.tell(record)
    job.logged += time.monotonic() - began  # training speed is told without evaluation
    if job.config.schedule.follows_validation and done % job.order.steps == 0:
        watch(job, done, score.top1)
    better: bool = score.top1 > job.best.get("top1", -1)
    if better:
        job.best = {
            "step": done,
            "top1": score.top1,
            "samples": score.samples,
            "val": val_fingerprint(job.val),
        }
    return better


def watch(job: Job, done: int, right: int) -> None:
    """After an epoch: lower the rate if validation has stalled."""
    schedule, before = job.config.schedule, job.plateau
    if done > round(schedule.warmup_epochs * job.order.steps):
        job.plateau = schedule.observe(before, done, right)
    if len(job.plateau.drops) > len(before.drops):
        job.console.event(f"{schedule.reason()}: the learning rate is {job.rate(done):.4g} now")


def score_of(job: Job, dataset: Dataset) -> Score:
    """Evaluate the model on a data set, on all ranks."""
    job.watchdog.at("the evaluation")
    requests = evaluation_requests(dataset.manifest.rows, job.config.evaluate.batch, job.world.rank, job.world.ranks)
    with job.loader(dataset, requests, evaluation=True) as batches:
        return evaluate(job.config, job.world, job.model, watched(job, batches), job.lanes)


def watched(job: Job, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same chunks; each is progress, and after the last one this rank waits for the others."""
    for batch in batches:
        job.watchdog.at(f"chunk {batch.cursor.step} of the evaluation")
        yield batch
    job.watchdog.at("the sums of the evaluation", waiting=True)
