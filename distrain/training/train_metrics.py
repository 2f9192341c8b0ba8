"""A log step: the numbers since the last one are read, judged and told; the same on all ranks."""

from collections.abc import Mapping, Sequence

from distrain.errors import RunError
from distrain.monitor.records import TrainRecord
from distrain.rundir import files
from distrain.training.divergence import StepFailed
from distrain.training.job import TrainJob


def log_train_metrics(job: TrainJob, steps_done: int) -> None:
    """Read the meters and tell of the steps since the last log step: a sync point.

    Raises:
        StepFailed: one of them was not finite.
        RunError: there are too many bad samples.
    """
    telemetry, progress = job.telemetry, job.progress
    reading = job.engine.meters.read_and_reset()
    telemetry.metrics.record_timings()
    if reading.failed_step is not None:
        raise StepFailed(reading)
    # What only the rank that met it knows.
    new = {
        sample: reason
        for sample, reason in progress.bad_samples.items()
        if sample not in progress.reported_bad_samples
    }
    waited_per_step = telemetry.data_wait_seconds / reading.num_steps
    told = job.world.all_gather_object(
        {
            "bad": new,
            "waited": waited_per_step,
            "arrived": telemetry.metrics.pop_mean_arrival_seconds(),
        }
    )
    check_bad_samples(job, [rank["bad"] for rank in told])
    if job.writer:
        waits, arrivals = (
            [rank[what] for rank in told] for what in ("waited", "arrived")
        )
        for text in telemetry.detect_anomalies(reading.loss, waits, arrivals):
            job.console.log(f"warning: {text}")
    seconds, waited = telemetry.pop_interval()
    job.log_metrics(
        TrainRecord(
            step=steps_done,
            epoch=job.data.order.get_cursor(steps_done - 1).epoch,
            loss=reading.loss,
            top1=reading.top1,
            top5=reading.top5,
            lr=job.get_lr(steps_done - 1),
            seconds=seconds,
            images_per_second=reading.num_steps
            * job.data.order.global_batch_size
            / seconds,
            data_wait=min(1.0, waited / seconds),
            bad_samples=len(progress.bad_samples),
        )
    )


def check_bad_samples(job: TrainJob, new_by_rank: Sequence[Mapping[str, str]]) -> None:
    """Merge the bad samples that each rank has met, and name new ones; stop when there are too many.

    Raises:
        RunError: there are more than the config allows.
    """
    progress = job.progress
    progress.bad_samples.update(
        {int(sample): reason for part in new_by_rank for sample, reason in part.items()}
    )
    names = sorted(progress.bad_samples.keys() - progress.reported_bad_samples)
    progress.reported_bad_samples.update(names)
    if names and job.writer:
        job.writer.write_bad_samples(job.data.train, progress.bad_samples, names)
    limit = job.config.data.max_bad_samples
    if len(progress.bad_samples) > limit:
        if job.writer:
            job.telemetry.metrics.set_gauge("bad_samples", len(progress.bad_samples))
        job.flush_metrics()
        raise RunError(
            f"{len(progress.bad_samples)} bad samples are more than data.max_bad_samples = {limit}: they are listed in "
            f"{job.run_dir}/{files.BAD_SAMPLES_FILE}; mend the data, or raise the limit and run the same command to go on"
        )
