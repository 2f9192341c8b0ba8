"""Diagnosis of a failed step: compute it once more, and write down the evidence."""

import math
from typing import Any

import torch

from distrain.data.batch import MicroBatch, iter_training_requests
from distrain.errors import RunError
from distrain.monitor.meters import MeterReading
from distrain.training.forward_pass import forward
from distrain.training.job import TrainJob


class StepFailed(Exception):  # noqa: N818 - never leaves `train`
    """A step with a loss or gradient that is not finite, or without a valid sample.

    Its argument is the `MeterReading` that shows it.
    """


def diagnose_divergence(job: TrainJob, reading: MeterReading) -> RunError:
    """Save the evidence of a failed step, and return the error to raise.

    Called on all ranks. The weights have not been updated since that step, so it is
    recomputed, with the norms of each micro-batch.
    """
    step = reading.failed_step
    assert step is not None
    if job.writer:
        job.telemetry.metrics.set_gauge("diverged", int(not reading.no_valid_samples))
    job.flush_metrics()
    if reading.no_valid_samples:
        return RunError(
            f"all samples of step {step + 1} are bad, so it has no gradient: the bad "
            "samples are listed in the run directory; fix the data and pack it again"
        )

    # Compute the step again, and write the numbers of all ranks to the run directory.
    micro_batches = _measure_micro_batches(job, step)
    evidence = {
        "step": step + 1,
        "learning_rate": job.get_lr(step),
        "virtual_workers": {str(v): micro_batches[v] for v in sorted(micro_batches)},
    }
    evidence_path = "the run directory"
    if job.writer:
        evidence_path = job.writer.write_evidence(step + 1, evidence)

    # Name the worst micro-batch. The comparison is false for NaN, which counts as
    # infinity here.
    worst = max(
        micro_batches.values(),
        key=lambda m: m["gradient_norm"] if m["gradient_norm"] >= 0 else math.inf,
    )
    loss = worst["loss"]
    norm = worst["gradient_norm"]
    return RunError(
        f"training diverged at step {step + 1}: a loss or gradient is not finite, or "
        f"too large to sum exactly (loss {loss:.4g}, gradient norm {norm:.4g}; details "
        f"in {evidence_path}): lower schedule.lr and start afresh with another run "
        "directory, run=..."
    )


def _measure_micro_batches(job: TrainJob, step: int) -> dict[int, dict[str, Any]]:
    """Compute the loss and the gradient norms of each micro-batch of a step.

    Returns:
        The numbers by virtual worker, of all ranks and on all ranks.
    """
    config = job.config
    engine = job.engine
    micro_batches: dict[int, dict[str, Any]] = {}

    def measure_micro_batch(batch: MicroBatch) -> None:
        # Without the loss scale of training: these numbers are for the reader.
        output = forward(config, engine.model, step, batch, engine.class_weights)
        loss = output.loss
        gradients = torch.autograd.grad(loss, list(engine.parameters.values()))
        norms = {
            name: float(gradient.double().norm())
            for name, gradient in zip(engine.parameters, gradients, strict=True)
        }
        micro_batches[batch.virtual_worker] = {
            "loss": loss.item() / config.micro_batch_size,
            "gradient_norm": math.hypot(*norms.values()),
            "gradient_norms": norms,
            "sample_ids": batch.sample_ids.tolist(),
        }

    # Measure the micro-batches of this rank.
    virtual_workers = job.world.local_virtual_workers(config.virtual_workers)
    steps = range(step, step + 1)
    requests = iter_training_requests(job.data.order, steps, virtual_workers)
    with job.open_loader(job.data.train, requests) as batches:
        engine.lanes.for_each(measure_micro_batch, batches)

    # Merge those of all ranks. They travel as JSON, which makes strings of the keys.
    for numbers_of_rank in job.world.all_gather_object(micro_batches):
        micro_batches.update({int(v): n for v, n in numbers_of_rank.items()})
    return micro_batches
