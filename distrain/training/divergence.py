"""A step whose loss or gradient is not finite: computed once more, and its evidence written down."""

import math
from typing import Any

import torch

from distrain.data.batch import MicroBatch, iter_training_requests
from distrain.errors import RunError
from distrain.monitor.meters import MeterReading
from distrain.training.forward_pass import forward
from distrain.training.job import TrainJob


class StepFailed(Exception):  # noqa: N818 - never leaves `train`
    """A step had a loss or gradient that is not finite, or no valid sample: its reading."""


def diagnose_divergence(job: TrainJob, reading: MeterReading) -> RunError:
    """Save the evidence of a failed step. The weights have not moved since, so the step is computed again."""
    step = reading.failed_step
    assert step is not None
    if job.writer:
        job.telemetry.metrics.set_gauge("diverged", int(not reading.no_valid_samples))
    job.flush_metrics()
    if reading.no_valid_samples:
        return RunError(
            f"all samples of step {step + 1} are bad, so it has no gradient: mend the data (distrain pack)"
        )
    config, network, micro_batches = (
        job.config,
        job.engine,
        dict[int, dict[str, Any]](),
    )

    def measure_micro_batch(batch: MicroBatch) -> None:
        loss = forward(config, network.model, step, batch).loss
        gradients = torch.autograd.grad(loss, list(network.parameters.values()))
        norms = {
            name: float(g.double().norm())
            for name, g in zip(network.parameters, gradients, strict=True)
        }
        micro_batches[batch.virtual_worker] = {
            "loss": loss.item() / config.micro_batch_size,
            "gradient_norm": math.hypot(*norms.values()),
            "gradient_norms": norms,
            "sample_ids": batch.sample_ids.tolist(),
        }

    hosted = job.world.local_virtual_workers(config.virtual_workers)
    requests = iter_training_requests(job.data.order, range(step, step + 1), hosted)
    with job.open_loader(job.data.train, requests) as batches:
        network.lanes.for_each(measure_micro_batch, batches)
    for part in job.world.all_gather_object(
        {str(v): numbers for v, numbers in micro_batches.items()}
    ):
        micro_batches.update({int(v): numbers for v, numbers in part.items()})
    evidence = {
        "step": step + 1,
        "learning_rate": job.get_lr(step),
        "virtual_workers": {str(v): micro_batches[v] for v in sorted(micro_batches)},
    }
    where = (
        job.writer.write_evidence(step + 1, evidence)
        if job.writer
        else "the run directory"
    )
    worst = max(
        micro_batches.values(),
        key=lambda m: m["gradient_norm"] if m["gradient_norm"] >= 0 else math.inf,
    )
    return RunError(
        f"training diverged at step {step + 1}: a loss or gradient is not finite, or too large for the fixed point "
        f"(loss {worst['loss']:.4g}, gradient norm {worst['gradient_norm']:.4g}); "
        f"samples and norms are in {where}. Lower schedule.lr and start afresh with run=..."
    )
