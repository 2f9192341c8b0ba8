"""Train a run: `train(config, world, console)`, and its loop, `run_training_loop`.

The loop is data-parallel over *virtual workers*. A global batch is cut into a fixed
number of micro-batches, one per virtual worker, and the virtual workers are spread over
as many ranks as there are. So the arithmetic of a step does not depend on the cluster.
Each step has four parts:

    accumulate_gradients    load, forward, backward: this rank's virtual workers
    reduce_gradients        all-reduce, over all ranks
    update_weights          optimizer, running statistics of batch norm
    finish_step             log, evaluate, save a checkpoint, where due

Nothing in this file knows about Ray or the command line.
"""

import errno
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from distrain.config import Config
from distrain.data.batch import MicroBatch, iter_training_requests
from distrain.distributed.numerics import set_torch_numerics
from distrain.distributed.world import World, make_local_world
from distrain.errors import AttemptError
from distrain.models.layers import update_all_running_stats
from distrain.monitor.phases import Phase
from distrain.monitor.records import (
    EvalRecord,
    TrainRecord,
    record_from_dict,
    record_to_dict,
)
from distrain.monitor.sinks import Console, SilentConsole, read_metrics
from distrain.monitor.terminal import create_console
from distrain.optim.accumulate import Totals
from distrain.rundir.checkpoint import hash_tensors
from distrain.training.checkpointing import save_checkpoint, wait_for_checkpoint
from distrain.training.divergence import StepFailed, diagnose_divergence
from distrain.training.forward_pass import count_correct, forward
from distrain.training.job import TrainJob
from distrain.training.setup import build_job
from distrain.training.train_metrics import log_train_metrics, open_metrics
from distrain.training.validate import validate


@dataclass(frozen=True)
class Summary:
    """Outcome of a run."""

    status: str
    """finished, finished early (`stop.patience`), already finished, or stopped (run the
    same command to resume)."""
    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    seconds: float
    """Duration of this call of `train`."""
    train: TrainRecord | None
    """Record of the last log step."""
    eval: EvalRecord | None
    """Record of the last evaluation."""
    weights: str
    """SHA-256 of all parameters and running statistics."""
    reduction: str
    """exact, or fast: then the weights are reproducible up to rounding only."""
    run: str
    """Run directory without credentials, for messages."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which can be sent to another process."""
        records = {
            name: record and record_to_dict(record)
            for name, record in (("train", self.train), ("eval", self.eval))
        }
        return {**asdict(self), **records}

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "Summary":
        """Rebuild a summary from what `to_dict` returned."""
        records = {
            name: tree[name] and record_from_dict(tree[name])
            for name in ("train", "eval")
        }
        return Summary(**{**tree, **records})


def train(
    config: Config,
    world: World | None = None,
    console: Console | None = None,
    *,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> Summary:
    """Train a run to its end; resume from its newest complete checkpoint if it has one.

    Every rank calls this function. Called with a config alone, it trains on this
    machine in this process, on one GPU if there is one. The public `distrain.train` is
    `launch.launcher.train`, which decides where to train and calls this function on
    each rank.

    Args:
        config: the run.
        world: this rank and the others. Default: one rank.
        console: where progress is printed; other ranks than 0 use it only for what
            rank 0 cannot see (a hang, files that crashed their decoder, the URL of
            their node's metrics page). Default: stdout, with a progress bar if that is
            a terminal.
        must_resume: fail if there is no checkpoint.
        accept_other_hardware: resume even if this hardware does not reproduce the
            checkpoint's bits.

    Raises:
        UserError: config, data, ranks or run directory do not fit together, or there
            is nothing to resume.
        RunError: too many bad samples, a loss that is not finite, too many failed
            attempts, every complete checkpoint is damaged, or the newest undamaged one
            has another format.
        AttemptError: damaged data, failed storage, a lost rank, or a newer attempt
            that has taken over the run directory.
    """
    start_time = time.monotonic()
    world = world or make_local_world(config.device)
    console = console or create_console()

    # Rank 0 prints the progress of all. Every rank logs what only it can see.
    log_local = console.log
    if not world.is_rank_zero:
        console = SilentConsole()
    with explain_full_disk(), ExitStack() as stack:
        # Build everything, and restore the newest checkpoint.
        metrics = stack.enter_context(open_metrics(config, world, log_local))
        exact = config.reduction.mode == "exact"
        numerics = set_torch_numerics(
            world.device, precision=config.precision, exact=exact
        )
        stack.enter_context(numerics)
        job = build_job(
            config,
            world,
            console,
            log_local,
            metrics,
            stack,
            must_resume=must_resume,
            accept_other_hardware=accept_other_hardware,
        )

        # Train the steps that are left, if any.
        status = "already finished"
        if not job.is_finished:
            status = train_remaining_steps(job, stack)

        # Report the outcome.
        metrics.finish_run(stopped=status == "stopped")
        job.flush_metrics()
        summary = summarize_run(job, status, time.monotonic() - start_time)
        if job.writer:
            outcome = "stopped" if status == "stopped" else "finished"
            job.writer.lease.set_outcome(outcome, summary.step, summary.steps)
        return summary


def train_remaining_steps(job: TrainJob, stack: ExitStack) -> str:
    """Train the steps that are left; return the status of the summary.

    Raises:
        RunError: training diverged.
    """
    # Freeze long-lived objects: a full garbage collection over them stops all threads
    # for 0.1 s. It makes this rank a straggler, and delays readers of its metrics.
    gc.freeze()
    stack.callback(gc.unfreeze)

    job.console.start(
        step=job.progress.step,
        steps=job.total_steps,
        steps_per_epoch=job.data.order.steps_per_epoch,
    )
    stack.callback(job.console.stop)
    try:
        return run_training_loop(job)
    except StepFailed as failure:
        raise diagnose_divergence(job, failure.args[0]) from None


def run_training_loop(job: TrainJob) -> str:
    """Run the training loop to its end, or until a stop is requested.

    Returns:
        "finished", "finished early" or "stopped".
    """
    virtual_workers = job.world.local_virtual_workers(job.config.virtual_workers)
    steps = range(job.progress.step, job.total_steps)
    requests = iter_training_requests(job.data.order, steps, virtual_workers)
    with job.open_loader(job.data.train, requests) as batches:
        job.telemetry.start_clock(batches.get_queue_depths)
        for step in steps:
            # Forward and backward of this rank's virtual workers, a micro-batch each.
            accumulate_gradients(job, step, islice(batches, len(virtual_workers)))

            # All-reduce: from here to the end of the step, all ranks compute the same.
            totals = reduce_gradients(job, step)

            # Once a step has failed, this leaves the weights as they are.
            update_weights(job, step, totals)

            # Log, evaluate, save. True: the run ends here, on all ranks.
            if finish_step(job, step + 1):
                break

    # The last checkpoint may still be on its way to storage.
    wait_for_checkpoint(job)
    if job.is_stopped_early:
        return "finished early"
    return "finished" if job.is_finished else "stopped"


def accumulate_gradients(
    job: TrainJob, step: int, batches: Iterator[MicroBatch]
) -> None:
    """Sum up the gradients of this rank's virtual workers, several at a time.

    A lane computes one virtual worker at a time, on a thread of its own if there are
    several. In exact mode the sums are integers, so the order of the lanes does not
    matter.
    """
    with job.telemetry.time_accumulation():
        job.engine.accumulator.begin_step()
        job.engine.lanes.for_each(
            partial(forward_backward_step, job, step),
            job.telemetry.time_loading(step, batches),
        )


def forward_backward_step(job: TrainJob, step: int, batch: MicroBatch) -> None:
    """Compute loss and gradients of one micro-batch, and add them to the accumulator.

    Runs on a lane, beside other micro-batches of the step. The loss is a sum over the
    samples of the micro-batch, not a mean.
    """
    engine = job.engine
    telemetry = job.telemetry
    telemetry.mark_progress(f"step {step + 1}, virtual worker {batch.virtual_worker}")

    # Compute this cached property now: if `data.normalise` is "device", it normalizes
    # the images there, which should be timed as transfer and not as forward.
    with telemetry.time_phase(Phase.TRANSFER):
        batch.images  # noqa: B018

    with telemetry.time_phase(Phase.FORWARD):
        logits, loss, batch_stats = forward(
            job.config, engine.model, step, batch, engine.class_weights
        )

    # autograd.grad instead of backward(): all lanes share the parameters, and their
    # `.grad` belongs to the reduced gradient.
    with telemetry.time_phase(Phase.BACKWARD):
        scaled_loss = loss * engine.accumulator.loss_scale
        gradients = torch.autograd.grad(scaled_loss, list(engine.parameters.values()))

    with telemetry.time_phase(Phase.REDUCTION):
        logits = logits.detach()
        top1_count = count_correct(logits, batch.labels, batch.sample_weights, 1)
        top5_count = count_correct(logits, batch.labels, batch.sample_weights, 5)
        engine.accumulator.add_micro_batch(
            gradients,
            loss.detach(),
            batch.sample_weights.sum(),
            top1_count,
            top5_count,
            batch_stats,
        )

    job.progress.bad_samples.update(batch.bad_samples)
    telemetry.count_samples(len(batch.sample_ids), len(batch.bad_samples))


def reduce_gradients(job: TrainJob, step: int) -> Totals:
    """Sum gradients and counts over all ranks.

    Each parameter's `.grad` becomes the gradient of the mean loss over the valid
    samples of the global batch. The returned totals stay on the device.
    """
    job.telemetry.mark_progress(f"the reduction of step {step + 1}", waiting=True)
    with job.telemetry.time_phase(Phase.REDUCTION):
        totals = job.engine.accumulator.start_all_reduce(job.world)
        job.engine.accumulator.write_gradients(totals, job.engine.lanes)
    return totals


def update_weights(job: TrainJob, step: int, totals: Totals) -> None:
    """Update the weights and the running statistics, unless a step has failed."""
    engine = job.engine
    telemetry = job.telemetry

    # 1.0 until a step fails (a value that is not finite or is out of the fixed-point
    # range, or no valid sample), then 0.0 forever. It stays on the device as a factor,
    # because an `if` would have to wait for it. The next log step reports the failure.
    update_factor = engine.meters.add_step(step, totals)
    # LARS and SGD in the paper's form divide momentum by the ratio of these: their
    # velocity contains the learning rate.
    lr = job.get_lr(step)
    lr_before = job.get_lr(max(0, step - 1))

    # The norms in the metrics are of the gradient before the optimizer clips or scales
    # it in place, and of what the update changes in the weights.
    if is_log_step(job, step + 1):
        telemetry.metrics.snapshot_weights(list(engine.parameters.values()))

    with telemetry.time_phase(Phase.OPTIMIZER):
        engine.optimizer.step(update_factor * lr, lr / lr_before)
        update_all_running_stats(
            engine.batch_norms, engine.accumulator.mean_batch_stats, update_factor
        )
    job.progress.step = step + 1
    telemetry.count_step(step + 1)


def finish_step(job: TrainJob, steps_done: int) -> bool:
    """Log, evaluate and save a checkpoint where due after a step.

    Returns:
        True, on all ranks, if the run was asked to stop before its last step, or ends
        early.
    """
    config = job.config
    world = job.world

    # All ranks must take the same branches below, so the request to stop is summed over
    # them. The sum travels by gloo, which raises if a rank is already lost, before
    # anything below waits for a GPU. A rank that is lost later is noticed by
    # `PeerMonitor`, which aborts NCCL; `synchronize_device` then raises.
    (stop_requests,) = world.all_reduce_ints([world.stop_requested.is_set()])
    should_stop = stop_requests > 0

    # Report what happened to the checkpoint that is being written in the background.
    if job.writer:
        job.writer.checkpointer.poll_save()

    # Find out what is due.
    is_last = steps_done == job.total_steps
    is_epoch_end = steps_done % job.data.order.steps_per_epoch == 0
    should_log = is_log_step(job, steps_done)
    counts_epochs = config.schedule.follows_validation or config.stop.patience
    is_eval_scheduled = (is_epoch_end and bool(counts_epochs)) or is_due(
        steps_done, config.evaluate.every, is_epoch_end
    )
    should_validate = job.data.val is not None and (is_last or is_eval_scheduled)
    should_save = (
        is_last
        or should_stop
        or is_due(steps_done, config.checkpoint.every, is_epoch_end)
    )

    job.console.set_step(steps_done)
    if should_log or should_validate or should_save:
        # A CPU-GPU sync point. `synchronize_device` raises if a rank was lost, and
        # `log_train_metrics` if a step failed, so that neither is evaluated or saved.
        world.synchronize_device()
        log_train_metrics(job, steps_done)
        job.telemetry.metrics.record_norms(list(job.engine.parameters.values()))
    is_best = should_validate and validate(job, steps_done, scheduled=is_eval_scheduled)
    if should_save or is_best or job.is_stopped_early:
        save_checkpoint(job, steps_done, best=is_best)
    return (should_stop and not is_last) or job.is_stopped_early


def is_log_step(job: TrainJob, steps_done: int) -> bool:
    """Return whether `log.every` is due; evaluations and checkpoints log as well."""
    return steps_done % job.config.log.every == 0


def is_due(steps_done: int, every: int | None, is_epoch_end: bool) -> bool:
    """Return whether an action is due; `every=None` means once per epoch."""
    return is_epoch_end if every is None else steps_done % every == 0


def summarize_run(job: TrainJob, status: str, seconds: float) -> Summary:
    """Summarize a run that has ended."""
    progress = job.progress
    train_record = progress.last_train_record
    eval_record = progress.last_eval_record
    if job.writer:
        # Fall back on the records of earlier attempts. A killed attempt may have logged
        # steps beyond its last checkpoint: skip those.
        for record in reversed(read_metrics(job.writer.store)):
            if record.step > progress.step:
                continue
            if isinstance(record, TrainRecord):
                train_record = train_record or record
            else:
                eval_record = eval_record or record
    return Summary(
        status=status,
        step=progress.step,
        steps=job.total_steps,
        seconds=seconds,
        train=train_record,
        eval=eval_record,
        weights=hash_tensors(job.engine.model.state_dict()),
        reduction=job.config.reduction.mode,
        run=job.run_dir,
    )


@contextmanager
def explain_full_disk() -> Iterator[None]:
    """Raise an AttemptError with the remedy if a disk or quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AttemptError(
                f"no space left ({error}): free some space, then run the same command "
                "to resume"
            ) from error
        raise
