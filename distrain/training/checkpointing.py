"""Checkpoints of a run in training: handed to a background thread, one at a time."""

from distrain.distributed.numerics import collect_environment
from distrain.monitor.phases import Phase
from distrain.result_fields import get_result_fields
from distrain.training.checkpoint_state import CheckpointState
from distrain.training.job import TrainJob
from distrain.training.run_data import get_val_fingerprint


def save_checkpoint(job: TrainJob, steps_done: int, *, best: bool) -> None:
    """Copy the tensors, and hand them to the background thread that writes them.

    On rank 0, waits first until the previous checkpoint is complete.

    Args:
        job: the run.
        steps_done: number of the step to save.
        best: this checkpoint has the best evaluation so far.

    Raises:
        AttemptError: the previous checkpoint could not be written.
    """
    progress = job.progress
    job.telemetry.mark_progress(f"saving after step {steps_done}", waiting=True)
    with job.telemetry.time_phase(Phase.CHECKPOINT):
        name = None
        if job.writer:
            name = job.writer.save_checkpoint(
                steps_done,
                job.engine.model.state_dict(),
                job.engine.optimizer.state_dict(),
                build_checkpoint_state(job),
                best=best,
            )

        # Rank 0 has just waited for the previous checkpoint, so that one can be
        # announced now; the new one is announced by the next save or at the end.
        previous = progress.pending_checkpoint
        progress.pending_checkpoint = (steps_done, name)
        if previous is not None:
            job.world.on_checkpoint(*previous)


def wait_for_checkpoint(job: TrainJob) -> None:
    """Wait until the last checkpoint is complete, and announce it.

    Raises:
        AttemptError: it could not be written.
    """
    job.telemetry.mark_progress("the last save", waiting=True)
    if job.writer:
        job.writer.checkpointer.wait()
    if job.progress.pending_checkpoint is not None:
        job.world.on_checkpoint(*job.progress.pending_checkpoint)


def build_checkpoint_state(job: TrainJob) -> CheckpointState:
    """Return everything that a checkpoint holds beside its tensors."""
    progress = job.progress
    return CheckpointState(
        cursor=job.data.order.get_cursor(progress.step)._asdict(),
        config=job.config.model_dump(mode="json"),
        result=get_result_fields(job.config),
        environment=collect_environment(job.world.device),
        hardware=job.hardware_hash,
        bad_samples=dict(progress.bad_samples),
        best=progress.best_eval,
        scheduled_best=progress.scheduled_best_eval,
        plateau=progress.plateau,
        stop=progress.stop,
        val=get_val_fingerprint(job.data.val),
        reduction=job.config.reduction.mode,
    )
