"""The training function: `train(config, world, console)`. It knows nothing of Ray or of the command line."""

import errno
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from distrain.config import Config
from distrain.data.batch import MicroBatch, iter_training_requests
from distrain.distributed.numerics import set_torch_numerics
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.models.layers import update_all_running_stats
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import (
    EvalRecord,
    TrainRecord,
    record_from_dict,
    record_to_dict,
)
from distrain.monitor.sinks import Console, SilentConsole, read_metrics
from distrain.optim.accumulate import Totals
from distrain.rundir.checkpoint import hash_tensors
from distrain.training.checkpointing import save_checkpoint, wait_for_checkpoint
from distrain.training.divergence import StepFailed, diagnose_divergence
from distrain.training.forward_pass import count_correct, forward
from distrain.training.job import TrainJob
from distrain.training.setup import build_job
from distrain.training.train_metrics import log_train_metrics
from distrain.training.validate import validate


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    status: str
    """finished, stopped (go on with the same command), or already finished."""
    step: int
    steps: int
    seconds: float
    """Of this attempt, from the call to the last checkpoint."""
    train: TrainRecord | None
    """The last one."""
    eval: EvalRecord | None
    """The last one."""
    weights: str
    """SHA-256 over all parameters."""
    reduction: str
    """exact, or fast: then the weights are equal to rounding only."""
    run: str
    """The run directory without credentials, for messages."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for another process."""
        records = {
            name: record and record_to_dict(record)
            for name, record in (("train", self.train), ("eval", self.eval))
        }
        return {**asdict(self), **records}

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "Summary":
        """Return the summary that `to_tree` made a tree of."""
        records = {
            name: tree[name] and record_from_dict(tree[name])
            for name in ("train", "eval")
        }
        return Summary(**{**tree, **records})


def train(
    config: Config,
    world: World,
    console: Console,
    *,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> Summary:
    """Train, from the newest whole checkpoint of the run directory if it has one. Called on every rank.

    Args:
        config: the run.
        world: this rank and the others.
        console: what a person sees: the lead's, and of another rank what the lead cannot know.
        must_resume: it is a mistake if there is no checkpoint.
        accept_other_hardware: go on where the hardware computes other bits than before.

    Raises:
        UserError: config, data, ranks or run directory do not fit.
        RunError: too many bad samples, a loss that is not finite, no checkpoint that is whole.
        AttemptError: damaged data, failed storage, a lost rank, another attempt that has taken over.
    """
    began = time.monotonic()
    alarm, console = console.log, console if world.is_rank_zero else SilentConsole()
    try:
        with ExitStack() as stack:
            metrics = stack.enter_context(open_metrics(config, world, alarm))
            exact = config.reduction.mode == "exact"
            stack.enter_context(
                set_torch_numerics(
                    world.device, precision=config.precision, exact=exact
                )
            )
            job = build_job(
                config,
                world,
                console,
                alarm,
                metrics,
                stack,
                must_resume=must_resume,
                accept_other_hardware=accept_other_hardware,
            )
            status = (
                "already finished"
                if job.progress.step == job.total_steps
                else train_remaining_steps(job, stack)
            )
            metrics.finish_run(stopped=status == "stopped")
            job.flush_metrics()
            return summarize_run(job, status, time.monotonic() - began)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AttemptError(
                f"no space left ({error}): free some, then run the same command to go on"
            ) from error
        raise


def train_remaining_steps(job: TrainJob, stack: ExitStack) -> str:
    """Train the steps that are left; how it ended: finished, or stopped.

    Raises:
        RunError: training diverged.
    """
    # What is there now lives on. A full collection that looks through it stops all threads for 0.1 s, those of other
    # ranks wait for this one, and so does who reads the metrics.
    gc.freeze()
    stack.callback(gc.unfreeze)
    job.console.start(
        step=job.progress.step,
        steps=job.total_steps,
        steps_per_epoch=job.data.order.steps_per_epoch,
    )
    stack.callback(job.console.stop)
    try:
        return fit(job)
    except StepFailed as failed:
        raise diagnose_divergence(job, failed.args[0]) from None


def summarize_run(job: TrainJob, status: str, seconds: float) -> Summary:
    """Summarize a run that has ended."""
    step, last, last_eval = (
        job.progress.step,
        job.progress.last_train_record,
        job.progress.last_eval_record,
    )
    if job.writer:
        # Fall back on earlier attempts. One that was killed may have logged steps after the checkpoint: skip those.
        records = [
            record for record in read_metrics(job.writer.store) if record.step <= step
        ]
        last = last or next(
            (r for r in reversed(records) if isinstance(r, TrainRecord)), None
        )
        last_eval = last_eval or next(
            (r for r in reversed(records) if isinstance(r, EvalRecord)), None
        )
    return Summary(
        status=status,
        step=step,
        steps=job.total_steps,
        seconds=seconds,
        train=last,
        eval=last_eval,
        weights=hash_tensors(job.engine.model.state_dict()),
        reduction=job.config.reduction.mode,
        run=job.run_dir,
    )


@contextmanager
def open_metrics(
    config: Config, world: World, warn: Callable[[str], None]
) -> Iterator[Metrics]:
    """The metrics of this rank, and their page until the run has ended.

    Raises:
        UserError: the page cannot be served at the address.
    """
    with world.raise_on_all_ranks():
        try:
            metrics = Metrics(config.metrics, str(config.run), world, warn)
        except OSError as error:
            raise UserError(
                f"metrics cannot be served at {config.metrics.address}: {error}; "
                "choose metrics.address, or metrics.port=null"
            ) from None
    if world.is_rank_zero:
        metrics.set_gauge("stall_limit_seconds", config.cluster.stall)
        metrics.set_gauge("bad_samples_limit", config.data.max_bad_samples)
    over = True
    try:
        yield metrics
    except AttemptError:
        over = False  # another attempt of this launch may follow
        raise
    except (UserError, RunError):
        raise
    except BaseException:  # somebody wants it to end now
        metrics.finish_run(stopped=True)
        raise
    finally:
        metrics.close(final=over)


def fit(job: TrainJob) -> str:
    """Train until the last step is done, or somebody asks to stop; how it ended."""
    world, telemetry, progress = job.world, job.telemetry, job.progress
    hosted = world.local_virtual_workers(job.config.virtual_workers)
    steps = range(progress.step, job.total_steps)
    with job.open_loader(
        job.data.train, iter_training_requests(job.data.order, steps, hosted)
    ) as batches:
        telemetry.start_clock(batches.get_queue_depths)
        for step in steps:
            accumulate_gradients(
                job, step, islice(batches, len(hosted))
            )  # forward and backward of this rank's virtual workers
            totals = reduce_gradients(
                job, step
            )  # all_reduce: what follows is the same on all ranks
            update_weights(
                job, step, totals
            )  # nothing moves after a step that was not finite
            if finish_step(job, step + 1):  # log, evaluate, save; true: asked to stop
                break
    wait_for_checkpoint(job)
    return "finished" if progress.step == job.total_steps else "stopped"


def accumulate_gradients(
    job: TrainJob, step: int, batches: Iterator[MicroBatch]
) -> None:
    """Add up the gradients of the virtual workers that this rank hosts, on as many threads as there are lanes."""
    with job.telemetry.time_accumulation():
        job.engine.accumulator.begin_step()
        job.engine.lanes.for_each(
            partial(forward_backward_step, job, step),
            job.telemetry.time_loading(step, batches),
        )


def forward_backward_step(job: TrainJob, step: int, batch: MicroBatch) -> None:
    """Forward and backward of one virtual worker, on whichever thread runs it."""
    telemetry, network = job.telemetry, job.engine
    telemetry.mark_progress(f"step {step + 1}, virtual worker {batch.virtual_worker}")
    with telemetry.time_phase(Phase.TRANSFER):
        batch.images  # noqa: B018 - a cached property: normalised here, where the config says on the device
    with telemetry.time_phase(Phase.FORWARD):
        logits, loss, moments = forward(job.config, network.model, step, batch)
    with telemetry.time_phase(Phase.BACKWARD):
        # autograd.grad, not backward: lanes share the weights, and `.grad` belongs to the reduced gradient.
        scaled = loss * network.accumulator.loss_scale
        gradients = torch.autograd.grad(scaled, list(network.parameters.values()))
    with telemetry.time_phase(Phase.REDUCTION):
        logits = logits.detach()
        top1, top5 = (
            count_correct(logits, batch.labels, batch.sample_weights, k) for k in (1, 5)
        )
        network.accumulator.add_micro_batch(
            gradients, loss.detach(), batch.sample_weights.sum(), top1, top5, moments
        )
    job.progress.bad_samples.update(batch.bad_samples)
    telemetry.count_samples(len(batch.sample_ids), len(batch.bad_samples))


def reduce_gradients(job: TrainJob, step: int) -> Totals:
    """Sum gradients and counts over all ranks, as integers; each parameter's `grad` is the mean then."""
    job.telemetry.mark_progress(f"the reduction of step {step + 1}", waiting=True)
    with job.telemetry.time_phase(Phase.REDUCTION):
        totals = job.engine.accumulator.start_all_reduce(job.world)
        job.engine.accumulator.write_gradients(totals, job.engine.lanes)
    return totals


def update_weights(job: TrainJob, step: int, totals: Totals) -> None:
    """Move the weights and the running statistics; not after a step that failed, which a log step will tell of."""
    network, telemetry = job.engine, job.telemetry
    may_move = network.meters.add_step(step, totals)
    lr = job.get_lr(step)
    lr_before = job.get_lr(max(0, step - 1))
    if is_log_step(job, step + 1):
        telemetry.metrics.snapshot_weights(list(network.parameters.values()))
    with telemetry.time_phase(Phase.OPTIMIZER):
        network.optimizer.step(may_move * lr, lr / lr_before)
        update_all_running_stats(
            network.batch_norms, network.accumulator.mean_batch_stats, may_move
        )
    job.progress.step = step + 1
    telemetry.count_step(step + 1)


def finish_step(job: TrainJob, steps_done: int) -> bool:
    """Log, evaluate and save where it is time; whether the run is asked to stop before its last step."""
    config, world = job.config, job.world
    # What ends the run or follows a step is decided from sums over all ranks: none decides alone. These travel by gloo,
    # which raises where a rank is lost, before anything below waits for a GPU.
    (stop,) = world.all_reduce_ints([world.stop_requested.is_set()])
    if job.writer:
        job.writer.checkpointer.poll_save()
    is_last, epoch_ends = (
        steps_done == job.total_steps,
        steps_done % job.data.order.steps_per_epoch == 0,
    )
    is_followed = epoch_ends and config.schedule.follows_validation
    log = is_log_step(job, steps_done)
    score = job.data.val is not None and (
        is_last or is_followed or is_due(steps_done, config.evaluate.every, epoch_ends)
    )
    save_it = (
        is_last or bool(stop) or is_due(steps_done, config.checkpoint.every, epoch_ends)
    )
    job.console.set_step(steps_done)
    if log or score or save_it:  # a sync point: nothing is kept of a step that failed
        world.synchronize()
        log_train_metrics(job, steps_done)
        job.telemetry.metrics.record_norms(list(job.engine.parameters.values()))
    better = score and validate(job, steps_done)
    if save_it or better:
        save_checkpoint(job, steps_done, best=better)
    return bool(stop) and not is_last


def is_log_step(job: TrainJob, steps_done: int) -> bool:
    """Whether `log.every` makes this step a log step; evaluations and checkpoints add more."""
    return steps_done % job.config.log.every == 0


def is_due(steps_done: int, every: int | None, is_epoch_end: bool) -> bool:
    """Whether something that happens `every` so many steps, or once an epoch, happens after `done` steps."""
    return is_epoch_end if every is None else steps_done % every == 0
