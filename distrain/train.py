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
from distrain.data.loader import MicroBatch, training_requests
from distrain.distributed.numerics import numerics
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.models.layers import move_all
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import EvalRecord, TrainRecord, from_tree, to_tree
from distrain.monitor.sinks import Console, Silent, read_metrics
from distrain.optim.accumulate import Totals
from distrain.rundir.checkpoint import digest
from distrain.training.divergence import StepFailed, diverged
from distrain.training.job import Job
from distrain.training.report import report
from distrain.training.saving import await_save, save
from distrain.training.setup import setup
from distrain.training.step import correct, forward
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

    def to_tree(self) -> dict[str, Any]:
        """Return it as plain values, for another process."""
        records = {
            name: record and to_tree(record)
            for name, record in (("train", self.train), ("eval", self.eval))
        }
        return {**asdict(self), **records}

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> "Summary":
        """Return the summary that `to_tree` made a tree of."""
        records = {
            name: tree[name] and from_tree(tree[name]) for name in ("train", "eval")
        }
        return Summary(**{**tree, **records})


def train(
    config: Config,
    world: World,
    console: Console,
    *,
    must_resume: bool = False,
    other_hardware: bool = False,
) -> Summary:
    """Train, from the newest whole checkpoint of the run directory if it has one. Called on every rank.

    Args:
        config: the run.
        world: this rank and the others.
        console: what a person sees: the lead's, and of another rank what the lead cannot know.
        must_resume: it is a mistake if there is no checkpoint.
        other_hardware: go on where the hardware computes other bits than before.

    Raises:
        UserError: config, data, ranks or run directory do not fit.
        RunError: too many bad samples, a loss that is not finite, no checkpoint that is whole.
        AttemptError: damaged data, failed storage, a lost rank, another attempt that has taken over.
    """
    began = time.monotonic()
    alarm, console = console.event, console if world.lead else Silent()
    try:
        with ExitStack() as stack:
            metrics = stack.enter_context(measured(config, world, alarm))
            exact = config.reduction.mode == "exact"
            stack.enter_context(
                numerics(world.device, precision=config.precision, exact=exact)
            )
            job = setup(
                config,
                world,
                console,
                alarm,
                metrics,
                stack,
                must_resume=must_resume,
                other_hardware=other_hardware,
            )
            status = (
                "already finished"
                if job.progress.step == job.steps
                else train_on(job, stack)
            )
            metrics.ends(stopped=status == "stopped")
            job.flush_pages()
            return summary(job, status, time.monotonic() - began)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AttemptError(
                f"no space left ({error}): free some, then run the same command to go on"
            ) from error
        raise


def train_on(job: Job, stack: ExitStack) -> str:
    """Train the steps that are left; how it ended: finished, or stopped.

    Raises:
        RunError: training diverged.
    """
    # What is there now lives on. A full collection that looks through it stops all threads for 0.1 s, those of other
    # ranks wait for this one, and so does who reads the metrics.
    gc.freeze()
    stack.callback(gc.unfreeze)
    job.console.start(
        step=job.progress.step, steps=job.steps, steps_per_epoch=job.data.order.steps
    )
    stack.callback(job.console.stop)
    try:
        return fit(job)
    except StepFailed as failed:
        raise diverged(job, failed.args[0]) from None


def summary(job: Job, status: str, seconds: float) -> Summary:
    """Summarize a run that has ended."""
    step, last, last_eval = job.progress.step, job.progress.train, job.progress.eval
    if job.record:
        # Fall back on earlier attempts. One that was killed may have logged steps after the checkpoint: skip those.
        records = [
            record for record in read_metrics(job.record.store) if record.step <= step
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
        steps=job.steps,
        seconds=seconds,
        train=last,
        eval=last_eval,
        weights=digest(job.network.model.state_dict()),
        reduction=job.config.reduction.mode,
        run=job.run,
    )


@contextmanager
def measured(
    config: Config, world: World, tell: Callable[[str], None]
) -> Iterator[Metrics]:
    """The metrics of this rank, and their page until the run has ended.

    Raises:
        UserError: the page cannot be served at the address.
    """
    with world.together():
        try:
            metrics = Metrics(config.metrics, str(config.run), world, tell)
        except OSError as error:
            raise UserError(
                f"metrics cannot be served at {config.metrics.address}: {error}; "
                "choose metrics.address, or metrics.port=null"
            ) from None
    if world.lead:
        metrics.set("stall_limit_seconds", config.cluster.stall)
        metrics.set("bad_samples_limit", config.data.max_bad_samples)
    over = True
    try:
        yield metrics
    except AttemptError:
        over = False  # another attempt of this launch may follow
        raise
    except (UserError, RunError):
        raise
    except BaseException:  # somebody wants it to end now
        metrics.ends(stopped=True)
        raise
    finally:
        metrics.close(over=over)


def fit(job: Job) -> str:
    """Train until the last step is done, or somebody asks to stop; how it ended."""
    world, telemetry, progress = job.world, job.telemetry, job.progress
    hosted = world.hosted(job.config.virtual_workers)
    steps = range(progress.step, job.steps)
    with job.loader(
        job.data.train, training_requests(job.data.order, steps, hosted)
    ) as batches:
        telemetry.start(batches.depths)
        for step in steps:
            accumulate(
                job, step, islice(batches, len(hosted))
            )  # forward and backward of this rank's virtual workers
            totals = reduce(
                job, step
            )  # all_reduce: what follows is the same on all ranks
            update(job, step, totals)  # nothing moves after a step that was not finite
            if after_step(job, step + 1):  # log, evaluate, save; true: asked to stop
                break
    await_save(job)
    return "finished" if progress.step == job.steps else "stopped"


def accumulate(job: Job, step: int, batches: Iterator[MicroBatch]) -> None:
    """Add up the gradients of the virtual workers that this rank hosts, on as many threads as there are lanes."""
    with job.telemetry.accumulating():
        job.network.accumulator.begin()
        job.network.lanes.run(
            partial(micro_step, job, step), job.telemetry.loading(step, batches)
        )


def micro_step(job: Job, step: int, batch: MicroBatch) -> None:
    """Forward and backward of one virtual worker, on whichever thread runs it."""
    telemetry, network = job.telemetry, job.network
    telemetry.at(f"step {step + 1}, virtual worker {batch.virtual_worker}")
    with telemetry.phase(Phase.TRANSFER):
        batch.images  # noqa: B018 - a cached property: normalised here, where the config says on the device
    with telemetry.phase(Phase.FORWARD):
        logits, loss, moments = forward(job.config, network.model, step, batch)
    with telemetry.phase(Phase.BACKWARD):
        # autograd.grad, not backward: lanes share the weights, and `.grad` belongs to the reduced gradient.
        scaled = loss * network.accumulator.scale
        gradients = torch.autograd.grad(scaled, list(network.parameters.values()))
    with telemetry.phase(Phase.REDUCTION):
        logits = logits.detach()
        top1, top5 = (correct(logits, batch.labels, batch.weights, k) for k in (1, 5))
        network.accumulator.add(
            gradients, loss.detach(), batch.weights.sum(), top1, top5, moments
        )
    job.progress.bad.update(batch.bad)
    telemetry.computed(len(batch.ids), len(batch.bad))


def reduce(job: Job, step: int) -> Totals:
    """Sum gradients and counts over all ranks, as integers; each parameter's `grad` is the mean then."""
    job.telemetry.at(f"the reduction of step {step + 1}", waiting=True)
    with job.telemetry.phase(Phase.REDUCTION):
        totals = job.network.accumulator.reduce(job.world)
        job.network.accumulator.finish(totals, job.network.lanes)
    return totals


def update(job: Job, step: int, totals: Totals) -> None:
    """Move the weights and the running statistics; not after a step that failed, which a log step will tell of."""
    network, telemetry = job.network, job.telemetry
    may_move = network.meters.add(step, totals)
    lr = job.rate(step)
    lr_before = job.rate(max(0, step - 1))
    if is_log_step(job, step + 1):
        telemetry.metrics.keep(list(network.parameters.values()))
    with telemetry.phase(Phase.OPTIMIZER):
        network.optimizer.step(may_move * lr, lr / lr_before)
        move_all(network.batch_norms, network.accumulator.moments, may_move)
    job.progress.step = step + 1
    telemetry.stepped(step + 1)


def after_step(job: Job, done: int) -> bool:
    """Log, evaluate and save where it is time; whether the run is asked to stop before its last step."""
    config, world = job.config, job.world
    # What ends the run or follows a step is decided from sums over all ranks: none decides alone. These travel by gloo,
    # which raises where a rank is lost, before anything below waits for a GPU.
    (stop,) = world.totals([world.stop.is_set()])
    if job.record:
        job.record.checkpoints.check()
    is_last, epoch_ends = done == job.steps, done % job.data.order.steps == 0
    is_followed = epoch_ends and config.schedule.follows_validation
    log = is_log_step(job, done)
    score = job.data.val is not None and (
        is_last or is_followed or due(done, config.evaluate.every, epoch_ends)
    )
    save_it = is_last or bool(stop) or due(done, config.checkpoint.every, epoch_ends)
    job.console.advance(done)
    if log or score or save_it:  # a sync point: nothing is kept of a step that failed
        world.settle()
        report(job, done)
        job.telemetry.metrics.norms(list(job.network.parameters.values()))
    better = score and validate(job, done)
    if save_it or better:
        save(job, done, best=better)
    return bool(stop) and not is_last


def is_log_step(job: Job, done: int) -> bool:
    """Whether `log.every` makes this step a log step; evaluations and checkpoints add more."""
    return done % job.config.log.every == 0


def due(done: int, every: int | None, epoch_ends: bool) -> bool:
    """Whether something that happens `every` so many steps, or once an epoch, happens after `done` steps."""
    return epoch_ends if every is None else done % every == 0
