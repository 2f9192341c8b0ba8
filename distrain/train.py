"""The training function: `train(config, world, console)`. It knows nothing of Ray or of the command line."""

import errno
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from distrain.config import Config, result_fields
from distrain.data.loader import MicroBatch, training_requests
from distrain.distributed.numerics import environment, numerics
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.models.layers import move_all
from distrain.monitor.meters import Reading
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, Silent, read_metrics
from distrain.rundir import files
from distrain.rundir.checkpoint import digest
from distrain.training.datasets import val_fingerprint
from distrain.training.divergence import StepFailed, diverged
from distrain.training.setup import Job, setup
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
    train: Mapping[str, Any] | None
    """The last training record."""
    eval: Mapping[str, Any] | None
    """The last evaluation record."""
    weights: str
    """SHA-256 over all parameters."""
    reduction: str
    """exact, or fast: then the weights are equal to rounding only."""
    run: str
    """The run directory, as it may be shown."""


def train(
    config: Config, world: World, console: Console, *, must_resume: bool = False, other_hardware: bool = False
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
            stack.enter_context(numerics(world.device, precision=config.precision, exact=exact))
            options = {"must_resume": must_resume, "other_hardware": other_hardware}
            job = setup(config, world, console, alarm, metrics, stack, **options)
            if job.start == job.steps:
                status = "already finished"
            else:
                # What is there now lives on. A full collection that looks through it stops all threads for 0.1 s, those
                # of other ranks wait for this one, and so does who reads the metrics.
                gc.freeze()
                stack.callback(gc.unfreeze)
                console.start(step=job.start, steps=job.steps, steps_per_epoch=job.order.steps)
                stack.callback(console.stop)
                try:
                    status = fit(job)
                except StepFailed as failed:
                    raise diverged(job, failed.args[0]) from None
            metrics.ends(stopped=status == "stopped")
            last_numbers(metrics, world)
            last = job.last
            if job.record:  # an attempt that was killed may have told of steps after the checkpoint
                told = (record for record in read_metrics(job.record.store) if record["step"] <= job.start)
                last = {record["kind"]: record for record in told} | job.last
            return Summary(
                status=status,
                step=job.start,
                steps=job.steps,
                seconds=time.monotonic() - began,
                train=last.get("train"),
                eval=last.get("eval"),
                weights=digest(job.model.state_dict()),
                reduction=config.reduction.mode,
                run=job.run,
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AttemptError(f"no space left ({error}): free some, then run the same command to go on") from error
        raise


@contextmanager
def measured(config: Config, world: World, tell: Callable[[str], None]) -> Iterator[Metrics]:
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


def last_numbers(metrics: Metrics, world: World) -> None:
    """Bring the pages of all ranks up to date before one of them, which serves them, renders for the last time."""
    metrics.flush()
    world.gather(None)


def fit(job: Job) -> str:
    """The loop: load, forward and backward, reduce, move, log, evaluate, save."""
    config, order, steps, world, at = job.config, job.order, job.steps, job.world, job.watchdog.at
    metrics = job.metrics
    hosted = world.hosted(config.virtual_workers)
    batches = job.loader(job.dataset, training_requests(order, range(job.start, steps), hosted))
    metrics.queues(batches.depths)
    job.logged = time.monotonic()
    with batches:
        for step in range(job.start, steps):
            waited, done = job.waited, step + 1
            log = done % config.log.every == 0
            with metrics.arriving():
                job.accumulator.begin()
                job.lanes.run(partial(micro_step, job, step), timed(job, step, islice(batches, len(hosted))))
            metrics.waited(job.waited - waited)
            at(f"the reduction of step {done}", waiting=True)
            with metrics.phase("reduction"):
                totals = job.accumulator.reduce(world)
                job.accumulator.finish(totals, job.lanes)
            may_move = job.meters.add(step, totals)
            lr, before = (job.rate(s) for s in (step, max(0, step - 1)))
            if log:
                metrics.keep(list(job.parameters.values()))
            with metrics.phase("optimizer"):
                job.optimizer.step(may_move * lr, lr / before)
                move_all(job.batch_norms, job.accumulator.moments, may_move)
            metrics.step(done, order.steps, again=done <= job.reached)

            job.start = done
            # What ends the run or what follows a step is decided from sums over all ranks: none decides alone. These
            # travel by gloo, which raises where a rank is lost, before anything below waits for a GPU.
            (stop,) = world.totals([world.stop.is_set()])
            last, epoch_ends = done == steps, done % order.steps == 0
            if job.record:
                job.record.checkpoints.check()
            watched = epoch_ends and config.schedule.follows_validation
            score = job.val is not None and (last or watched or due(done, config.evaluate.every, epoch_ends))
            save = last or bool(stop) or due(done, config.checkpoint.every, epoch_ends)
            job.console.advance(done)
            if log or score or save:  # a sync point: nothing is kept of a step that failed
                world.settle()
                log_step(job, done, lr)
                metrics.norms(list(job.parameters.values()))
            better = score and validate(job, done)
            if save or better:
                save_step(job, done, better)
            if stop and not last:
                break
    await_save(job)
    return "finished" if job.start == steps else "stopped"


def micro_step(job: Job, step: int, batch: MicroBatch) -> None:
    """Forward and backward of one virtual worker, on whichever thread runs it."""
    job.watchdog.at(f"step {step + 1}, virtual worker {batch.virtual_worker}")
    phase = job.metrics.phase
    with phase("transfer"):
        batch.images  # noqa: B018 - a cached property: normalised here, where the config says on the device
    with phase("forward"):
        logits, loss, moments = forward(job.config, job.model, step, batch)
    with phase("backward"):
        # autograd.grad, not backward: lanes share the weights, and `.grad` belongs to the reduced gradient.
        gradients = torch.autograd.grad(loss * job.accumulator.scale, list(job.parameters.values()))
    with phase("reduction"):
        logits = logits.detach()
        top1, top5 = (correct(logits, batch.labels, batch.weights, k) for k in (1, 5))
        job.accumulator.add(gradients, loss.detach(), batch.weights.sum(), top1, top5, moments)
    job.bad.update(batch.bad)
    job.metrics.add("samples", len(batch.ids) - len(batch.bad), outcome="good")
    job.metrics.add("samples", len(batch.bad), outcome="bad")


def timed(job: Job, step: int, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same micro-batches; the time spent waiting for them is counted."""
    while True:
        asked = time.monotonic()
        job.watchdog.at(f"loading the data of step {step + 1}")
        batch = next(batches, None)
        job.waited += time.monotonic() - asked
        if batch is None:
            return
        yield batch


def due(done: int, every: int | None, epoch_ends: bool) -> bool:
    """Whether something that happens `every` so many steps, or once an epoch, happens after `done` steps."""
    return epoch_ends if every is None else done % every == 0


def log_step(job: Job, done: int, lr: float) -> None:
    """Read the meters, judge them, and tell. The readings are the same on all ranks."""
    reading = job.meters.read()
    job.metrics.read()
    if reading.failed_step is not None:
        raise StepFailed(reading)
    bad = {k: v for k, v in job.bad.items() if k not in job.bad_told}
    told = job.world.gather({"bad": bad, "waited": job.waited / reading.steps, "arrived": job.metrics.arrived()})
    check_bad_samples(job, [rank["bad"] for rank in told])
    judge(job, reading, [rank["waited"] for rank in told], [rank["arrived"] for rank in told])
    now = time.monotonic()
    seconds, job.logged = now - job.logged, now
    record = {
        "kind": "train",
        "step": done,
        "epoch": job.order.cursor(done - 1).epoch,
        "loss": reading.loss,
        "top1": reading.top1,
        "top5": reading.top5,
        "lr": lr,
        "seconds": seconds,
        "images_per_second": reading.steps * job.order.global_batch / seconds,
        "data_wait": min(1.0, job.waited / seconds),
        "bad_samples": len(job.bad),
    }
    job.waited = 0.0
    job.tell(record)


def judge(job: Job, reading: Reading, waits: Sequence[float], arrivals: Sequence[float]) -> None:
    """Name a rank that is slow, and a loss that jumps."""
    if not job.record:
        return
    rank, sentence = job.stragglers.judge(waits, arrivals)
    if rank is not None:
        job.metrics.add("straggler_log_steps", slow_rank=str(rank))
    jump = job.spikes.judge(reading.loss)
    job.metrics.add("loss_spikes", int(jump is not None))
    for text in (sentence, jump):
        if text is not None:
            job.console.event(f"warning: {text}")


def save_step(job: Job, done: int, best: bool) -> None:
    """Hand a checkpoint to the background, after the one before is whole."""
    job.watchdog.at(f"saving after step {done}", waiting=True)
    with job.metrics.phase("checkpoint"):
        save(job, done, best)


def save(job: Job, done: int, best: bool) -> None:
    """The save itself: tensors are copied, and written behind the back of training."""
    name = None
    if job.record:
        state = {
            "cursor": job.order.cursor(done)._asdict(),
            "config": job.config.model_dump(mode="json"),
            "result": result_fields(job.config),
            "environment": environment(job.world.device),
            "hardware": job.hardware,
            "bad_samples": {str(k): v for k, v in sorted(job.bad.items())},
            "best": job.best,
            "plateau": asdict(job.plateau),
            "val": val_fingerprint(job.val),
            "reduction": job.config.reduction.mode,
        }
        name = job.record.save(done, job.model.state_dict(), job.optimizer.state(), state, best=best)
    before, job.saving = job.saving, (done, name)
    if before is not None:
        job.world.saved(*before)


def await_save(job: Job) -> None:
    """Wait until the last checkpoint is whole."""
    job.watchdog.at("the last save", waiting=True)
    if job.record:
        job.record.checkpoints.wait()
    if job.saving is not None:
        job.world.saved(*job.saving)


def check_bad_samples(job: Job, new: Sequence[Mapping[str, str]]) -> None:
    """Merge the bad samples that each rank has met, and name new ones; stop when there are too many."""
    job.bad.update({int(k): reason for part in new for k, reason in part.items()})
    names = sorted(job.bad.keys() - job.bad_told)
    job.bad_told.update(names)
    if names and job.record:
        job.record.bad_samples(job.dataset, job.bad, names)
    limit = job.config.data.max_bad_samples
    if len(job.bad) > limit:
        if job.record:
            job.metrics.set("bad_samples", len(job.bad))
        last_numbers(job.metrics, job.world)
        raise RunError(
            f"{len(job.bad)} bad samples are more than data.max_bad_samples = {limit}: they are listed in "
            f"{job.run}/{files.BAD_SAMPLES}; mend the data, or raise the limit and run the same command to go on"
        )
