"""Metrics of a run in training: opened once, and logged at each log step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distrain.config import Config
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import TrainRecord
from distrain.rundir import files
from distrain.training.divergence import StepFailed
from distrain.training.job import TrainJob


@contextmanager
def open_metrics(
    config: Config, world: World, log_local: Callable[[str], None]
) -> Iterator[Metrics]:
    """Open this rank's metrics, and serve them until the run has ended.

    Args:
        config: the run.
        world: this rank.
        log_local: logs a line on any rank: the URL of its node's metrics page, or a
            warning about it.

    Raises:
        UserError: the metrics cannot be served at the address.
    """
    with world.raise_on_all_ranks():
        try:
            metrics = Metrics(config.metrics, str(config.run), world, log_local)
        except OSError as error:
            raise UserError(
                f"metrics cannot be served at {config.metrics.address}: {error}; "
                "choose another metrics.address, or turn them off with "
                "metrics.port=null"
            ) from None
    if world.is_rank_zero:
        metrics.set_gauge("stall_limit_seconds", config.cluster.stall)
        metrics.set_gauge("bad_samples_limit", config.data.max_bad_samples)

    is_final = True
    try:
        yield metrics
    except AttemptError:
        # Another attempt of this launch may follow, and add to the same counters.
        is_final = False
        raise
    except (UserError, RunError):
        raise
    except BaseException:
        # KeyboardInterrupt, SystemExit or a bug: do not wait for a last scrape.
        metrics.finish_run(stopped=True)
        raise
    finally:
        metrics.close(final=is_final)


def log_train_metrics(job: TrainJob, steps_done: int) -> None:
    """Log the steps since the last log step.

    Reading the meters is a sync point of CPU and GPU.

    Raises:
        StepFailed: one of the steps was not finite.
        RunError: there are too many bad samples.
    """
    telemetry = job.telemetry

    # Read the meters. They hold sums over all ranks, so all ranks raise here, or none.
    reading = job.engine.meters.read_and_reset()
    telemetry.metrics.record_timings()
    if reading.failed_step is not None:
        raise StepFailed(reading)

    # Exchange what each rank alone knows.
    reports = _gather_rank_reports(job, reading.num_steps)
    check_bad_samples(job, [report["bad"] for report in reports])

    # Warn about a slow rank and a loss spike, on rank 0.
    if job.writer:
        waits = [report["waited"] for report in reports]
        arrivals = [report["arrived"] for report in reports]
        for warning in telemetry.detect_anomalies(reading.loss, waits, arrivals):
            job.console.log(f"warning: {warning}")

    # Log the record.
    seconds, data_wait_seconds = telemetry.pop_interval()
    num_images = reading.num_steps * job.data.order.global_batch_size
    job.log_metrics(
        TrainRecord(
            step=steps_done,
            epoch=job.data.order.get_cursor(steps_done - 1).epoch,
            loss=reading.loss,
            top1=reading.top1,
            top5=reading.top5,
            lr=job.get_lr(steps_done - 1),
            seconds=seconds,
            images_per_second=num_images / seconds,
            data_wait=min(1.0, data_wait_seconds / seconds),
            bad_samples=len(job.progress.bad_samples),
            phase_seconds=telemetry.metrics.pop_phase_seconds(),
        )
    )


def _gather_rank_reports(job: TrainJob, num_steps: int) -> list[dict[str, Any]]:
    """Gather the new bad samples of all ranks, and their seconds per step.

    Returns:
        By rank: `bad`, reason by sample id (a string); `waited`, for data; `arrived`,
        from the beginning of a step to the all-reduce.
    """
    progress = job.progress
    new_bad_samples = {
        sample: reason
        for sample, reason in progress.bad_samples.items()
        if sample not in progress.reported_bad_samples
    }
    return job.world.all_gather_object(
        {
            "bad": new_bad_samples,
            "waited": job.telemetry.data_wait_seconds / num_steps,
            "arrived": job.telemetry.metrics.pop_mean_arrival_seconds(),
        }
    )


def check_bad_samples(job: TrainJob, new_by_rank: Sequence[Mapping[str, str]]) -> None:
    """Merge the bad samples of all ranks, report the new ones, and enforce the limit.

    Args:
        job: the run.
        new_by_rank: reason by sample id of each rank's new bad samples; the ids are
            strings, as `World.all_gather_object` returns them.

    Raises:
        RunError: there are more than `data.max_bad_samples`.
    """
    progress = job.progress
    for new_bad_samples in new_by_rank:
        for sample, reason in new_bad_samples.items():
            progress.bad_samples[int(sample)] = reason

    # Report those that no rank has reported yet.
    new_ids = sorted(progress.bad_samples.keys() - progress.reported_bad_samples)
    progress.reported_bad_samples.update(new_ids)
    if new_ids and job.writer:
        job.writer.write_bad_samples(job.data.train, progress.bad_samples, new_ids)

    # All ranks know the same bad samples now, so all raise, or none.
    num_bad = len(progress.bad_samples)
    limit = job.config.data.max_bad_samples
    if num_bad > limit:
        if job.writer:
            job.telemetry.metrics.set_gauge("bad_samples", num_bad)
        job.flush_metrics()
        raise RunError(
            f"{num_bad} bad samples are more than data.max_bad_samples = {limit}: they "
            f"are listed in {job.run_dir}/{files.BAD_SAMPLES_FILE}; fix the data, or "
            "raise the limit, and run the same command to resume"
        )
