"""A log step: the numbers since the last one are read, judged and told; the same on all ranks."""

from collections.abc import Mapping, Sequence

from distrain.errors import RunError
from distrain.monitor.records import TrainRecord
from distrain.rundir import files
from distrain.training.divergence import StepFailed
from distrain.training.job import Job


def report(job: Job, done: int) -> None:
    """Read the meters and tell of the steps since the last log step: a sync point.

    Raises:
        StepFailed: one of them was not finite.
        RunError: there are too many bad samples.
    """
    telemetry, progress = job.telemetry, job.progress
    reading = job.network.meters.read()
    telemetry.metrics.read()
    if reading.failed_step is not None:
        raise StepFailed(reading)
    # What only the rank that met it knows.
    new = {
        sample: reason
        for sample, reason in progress.bad.items()
        if sample not in progress.bad_told
    }
    waited_per_step = telemetry.waited / reading.steps
    told = job.world.gather(
        {"bad": new, "waited": waited_per_step, "arrived": telemetry.metrics.arrived()}
    )
    check_bad_samples(job, [rank["bad"] for rank in told])
    if job.record:
        waits, arrivals = (
            [rank[what] for rank in told] for what in ("waited", "arrived")
        )
        for text in telemetry.warnings(reading.loss, waits, arrivals):
            job.console.event(f"warning: {text}")
    seconds, waited = telemetry.take_interval()
    job.tell(
        TrainRecord(
            step=done,
            epoch=job.data.order.cursor(done - 1).epoch,
            loss=reading.loss,
            top1=reading.top1,
            top5=reading.top5,
            lr=job.rate(done - 1),
            seconds=seconds,
            images_per_second=reading.steps * job.data.order.global_batch / seconds,
            data_wait=min(1.0, waited / seconds),
            bad_samples=len(progress.bad),
        )
    )


def check_bad_samples(job: Job, new: Sequence[Mapping[str, str]]) -> None:
    """Merge the bad samples that each rank has met, and name new ones; stop when there are too many.

    Raises:
        RunError: there are more than the config allows.
    """
    progress = job.progress
    progress.bad.update(
        {int(sample): reason for part in new for sample, reason in part.items()}
    )
    names = sorted(progress.bad.keys() - progress.bad_told)
    progress.bad_told.update(names)
    if names and job.record:
        job.record.bad_samples(job.data.train, progress.bad, names)
    limit = job.config.data.max_bad_samples
    if len(progress.bad) > limit:
        if job.record:
            job.telemetry.metrics.set("bad_samples", len(progress.bad))
        job.flush_pages()
        raise RunError(
            f"{len(progress.bad)} bad samples are more than data.max_bad_samples = {limit}: they are listed in "
            f"{job.run}/{files.BAD_SAMPLES}; mend the data, or raise the limit and run the same command to go on"
        )
