"""Checkpoints of a run that trains: handed to the background, one at a time."""

from distrain.config import result_fields
from distrain.distributed.numerics import environment
from distrain.monitor.phases import Phase
from distrain.training.datasets import val_fingerprint
from distrain.training.job import Job
from distrain.training.state import State


def save(job: Job, done: int, *, best: bool) -> None:
    """Hand a checkpoint to the background, after the one before is whole: tensors are copied, and written there."""
    job.telemetry.at(f"saving after step {done}", waiting=True)
    with job.telemetry.phase(Phase.CHECKPOINT):
        name = None
        if job.record:
            network = job.network
            name = job.record.save(
                done,
                network.model.state_dict(),
                network.optimizer.state(),
                state_of(job),
                best=best,
            )
        before, job.progress.saving = job.progress.saving, (done, name)
        if before is not None:
            job.world.saved(*before)


def await_save(job: Job) -> None:
    """Wait until the last checkpoint is whole."""
    job.telemetry.at("the last save", waiting=True)
    if job.record:
        job.record.checkpoints.wait()
    if job.progress.saving is not None:
        job.world.saved(*job.progress.saving)


def state_of(job: Job) -> State:
    """Return what a checkpoint says beside its tensors."""
    progress = job.progress
    return State(
        cursor=job.data.order.cursor(progress.step)._asdict(),
        config=job.config.model_dump(mode="json"),
        result=result_fields(job.config),
        environment=environment(job.world.device),
        hardware=job.hardware,
        bad_samples=dict(progress.bad),
        best=progress.best,
        plateau=progress.plateau,
        val=val_fingerprint(job.data.val),
        reduction=job.config.reduction.mode,
    )
