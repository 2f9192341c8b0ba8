"""Checkpoints of a run that trains: handed to the background, one at a time."""

from distrain.config import get_result_fields
from distrain.distributed.numerics import collect_environment
from distrain.monitor.phases import Phase
from distrain.training.checkpoint_state import CheckpointState
from distrain.training.job import TrainJob
from distrain.training.run_data import get_val_fingerprint


def save_checkpoint(job: TrainJob, steps_done: int, *, best: bool) -> None:
    """Hand a checkpoint to the background, after the one before is whole: tensors are copied, and written there."""
    job.telemetry.mark_progress(f"saving after step {steps_done}", waiting=True)
    with job.telemetry.time_phase(Phase.CHECKPOINT):
        name = None
        if job.writer:
            network = job.engine
            name = job.writer.save_checkpoint(
                steps_done,
                network.model.state_dict(),
                network.optimizer.state_dict(),
                build_checkpoint_state(job),
                best=best,
            )
        before, job.progress.pending_checkpoint = (
            job.progress.pending_checkpoint,
            (steps_done, name),
        )
        if before is not None:
            job.world.on_checkpoint(*before)


def wait_for_checkpoint(job: TrainJob) -> None:
    """Wait until the last checkpoint is whole."""
    job.telemetry.mark_progress("the last save", waiting=True)
    if job.writer:
        job.writer.checkpointer.wait()
    if job.progress.pending_checkpoint is not None:
        job.world.on_checkpoint(*job.progress.pending_checkpoint)


def build_checkpoint_state(job: TrainJob) -> CheckpointState:
    """Return what a checkpoint says beside its tensors."""
    progress = job.progress
    return CheckpointState(
        cursor=job.data.order.get_cursor(progress.step)._asdict(),
        config=job.config.model_dump(mode="json"),
        result=get_result_fields(job.config),
        environment=collect_environment(job.world.device),
        hardware=job.hardware_hash,
        bad_samples=dict(progress.bad_samples),
        best=progress.best_eval,
        plateau=progress.plateau,
        val=get_val_fingerprint(job.data.val),
        reduction=job.config.reduction.mode,
    )
