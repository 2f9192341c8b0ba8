"""Resume a run: claim its directory, load and check its checkpoint, restore it.

A run directory belongs to one attempt at a time; the lease is rank 0's.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from distrain.config import Config
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.retry import call_with_retries, is_transient
from distrain.data.storage.store import Store
from distrain.distributed.numerics import collect_environment
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.monitor.sinks import Console
from distrain.optim.early_stopping import StopState
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import PlateauState
from distrain.rundir import files
from distrain.rundir.checkpoint import (
    hash_tensors,
    read_best_name,
    write_best,
)
from distrain.rundir.checkpoint_loading import (
    LoadedCheckpoint,
    find_checkpoint,
    load_newest_checkpoint,
)
from distrain.rundir.lease import Lease, acquire_lease, count_failures, read_attempts
from distrain.training.checkpoint_state import BestEval, CheckpointState
from distrain.training.hardware_check import check_equal_on_all_ranks
from distrain.training.job import ModelEngine, TrainProgress
from distrain.training.run_data import get_val_fingerprint, pack_built_in

T = TypeVar("T")


class Retrier:
    """Calls functions on a run directory, and retries them after transient errors.

    Every OSError is transient but those that waiting cannot fix (`is_transient`). All
    calls together share one time budget, which starts with the object.
    """

    def __init__(self, store: Store, seconds: float, console: Console) -> None:
        self.store = store
        self._console = console
        self._has_logged = False
        self._deadline = time.monotonic() + seconds

    def __call__(self, func: Callable[[], T]) -> T:
        """Return what `func` returns.

        Raises:
            UserError: it failed with an error that is not transient.
            AttemptError: it still fails when the time is up.
        """
        try:
            return call_with_retries(
                func, self._deadline - time.monotonic(), on_retry=self._log_once
            )
        except OSError as error:
            # `from None`: the text has the cause, and a traceback would add nothing.
            description = self._describe_error(error)
            if not is_transient(error):
                raise UserError(
                    f"{description}: choose another directory, run=..."
                ) from None
            raise AttemptError(
                f"{description}: free space or fix the storage, or choose another "
                "directory, run=..."
            ) from None

    def _log_once(self, error: OSError, failures: int) -> None:
        if not self._has_logged:
            self._console.log(f"{self._describe_error(error)}: retrying")
        self._has_logged = True

    def _describe_error(self, error: OSError) -> str:
        return (
            f"the run directory {self.store.redacted_url} cannot be written to or read "
            f"({error})"
        )


@dataclass(frozen=True)
class ClaimedRun:
    """Run directory that this attempt has claimed, and what it found there."""

    store: Store
    retrier: Retrier
    lease: Lease | None
    """Right to write to the run directory, on rank 0."""
    checkpoint: LoadedCheckpoint | None
    """Checkpoint to resume from, on rank 0."""
    state: CheckpointState | None
    """State in that checkpoint, on all ranks; None at the start of a run."""
    step: int
    """Steps done."""


def claim_run_dir(
    config: Config,
    world: World,
    console: Console,
    stack: ExitStack,
    *,
    must_resume: bool,
) -> ClaimedRun:
    """Claim the run directory, and read its newest complete checkpoint, both on rank 0.

    The other ranks get the state in the checkpoint here, and its tensors later, from
    `restore_checkpoint`.

    Raises:
        UserError: another run uses the directory, it cannot be used, or there is
            nothing to resume.
        RunError: every complete checkpoint is damaged, the newest undamaged one has
            another format, or too many attempts of this launch failed.
        AttemptError: the storage still fails when `checkpoint.patience` is over.
    """
    if not config.run:
        raise UserError("run is empty: name a run directory, run=...")
    store = Store(config.run)
    retrier = Retrier(store, config.checkpoint.patience, console)
    lease = None
    loaded = None
    with world.raise_on_all_ranks():
        if world.is_rank_zero:
            lease, loaded = claim_and_load(
                config, world, console, retrier, stack, must_resume=must_resume
            )

    # All ranks take rank 0's step and state, even if they could read the files.
    local_position = loaded and (loaded.step, loaded.state)
    step, tree = world.all_gather_object(local_position)[0] or (0, None)
    state = CheckpointState.from_dict(tree) if tree else None
    return ClaimedRun(store, retrier, lease, loaded, state, step)


def claim_and_load(
    config: Config,
    world: World,
    console: Console,
    retrier: Retrier,
    stack: ExitStack,
    *,
    must_resume: bool,
) -> tuple[Lease, LoadedCheckpoint | None]:
    """Acquire the lease of a run directory, and load its newest complete checkpoint.

    Called on rank 0 alone. Built-in data is packed here, under the lease.

    Raises:
        UserError: another run uses the directory, it cannot be used, or there is
            nothing to resume.
        RunError: every complete checkpoint is damaged, the newest undamaged one has
            another format, or too many attempts of this launch failed.
        AttemptError: the storage still fails when `checkpoint.patience` is over.
    """
    store = retrier.store
    nothing_to_resume = UserError(
        f"there is no checkpoint to resume from in {store.redacted_url}: check the run "
        "directory, or start the run without --resume (from Python, resume=False)"
    )
    # Before the lease, which would leave a record in a directory that may be a typo.
    if must_resume and not retrier(lambda: store.list_names(files.CHECKPOINTS_DIR)):
        raise nothing_to_resume

    # First the lease, then the checkpoint: until it is superseded, an earlier attempt
    # may still write a newer one.
    lease = stack.enter_context(
        retrier(lambda: acquire_lease(store, world.launch_id, console.log))
    )
    loaded, problems = retrier(lambda: load_newest_checkpoint(store))
    if must_resume and loaded is None:
        raise nothing_to_resume
    step = loaded.step if loaded else 0
    retrier(lambda: lease.record_start(step, world.world_size))
    for problem in problems:
        console.log(f"warning: {problem}; using an older one")

    attempts = retrier(lambda: read_attempts(store))
    earlier = {n: record for n, record in attempts.items() if n < lease.attempt}
    _check_failures(config, world, earlier, step)

    # Under the lease, so that no two attempts pack at the same time.
    if config.data.pack:
        pack_built_in(config.data.pack, config, console)
    return lease, loaded


def _check_failures(
    config: Config, world: World, earlier: Mapping[int, Mapping[str, Any]], step: int
) -> None:
    """End a series of attempts that make no progress.

    Raises:
        RunError: as many attempts as the config allows failed after this step.
    """
    num_failed = count_failures(earlier, world.launch_id, step)
    if num_failed >= config.cluster.max_failures:
        raise RunError(
            f"{num_failed} attempts in a row failed after step {step} without a new "
            f"checkpoint (cluster.max_failures = {config.cluster.max_failures}): fix "
            "the cause, then run the same command to resume"
        )


def check_plateau(config: Config, val: Dataset | None, state: CheckpointState) -> None:
    """Check that a plateau schedule compares counts of one validation set only.

    Raises:
        UserError: the validation set is not that of the checkpoint.
    """
    if config.schedule.follows_validation and state.val != get_val_fingerprint(val):
        raise UserError(
            f"{config.run} was trained with another validation set, and its "
            f"{config.schedule.name} schedule depends on that set: set data.val back, "
            "or start afresh with another run directory, run=..."
        )


def check_hardware(
    console: Console,
    state: CheckpointState,
    current_environment: Mapping[str, str],
    hardware_hash: str | None,
    accept_other_hardware: bool,
) -> None:
    """Check that this hardware computes the same bits as the checkpoint's hardware.

    Different names and versions do not matter as long as the bits are equal.

    Raises:
        UserError: the bits differ, and `accept_other_hardware` is False.
    """
    if state.hardware == hardware_hash:
        return

    # The bits differ. Versions and processors that differ too are the likely cause.
    saved_environment = state.environment
    changes = [
        f"{key} {saved_environment.get(key)} -> {current_environment.get(key)}"
        for key in sorted(saved_environment.keys() | current_environment.keys())
        if saved_environment.get(key) != current_environment.get(key)
    ]
    cause = "; ".join(changes) or "names and versions are equal, but the results differ"
    if not accept_other_hardware:
        raise UserError(
            "this hardware does not reproduce the checkpoint's bits "
            f"({cause}): resume on the same kind of hardware and software, or pass "
            "--accept-other-hardware (from Python, accept_other_hardware=True) to "
            "resume without bit-identical results"
        )
    console.log(
        f"warning: other hardware than before ({cause}): from here on, results are not "
        "bit-identical to those of the original hardware"
    )


def restore_checkpoint(
    world: World,
    console: Console,
    claimed_run: ClaimedRun,
    engine: ModelEngine,
    hardware_hash: str | None,
    *,
    accept_other_hardware: bool,
) -> None:
    """Restore weights and optimizer state, and check that all ranks have the same.

    Raises:
        UserError: this hardware does not reproduce the checkpoint's bits, and
            `accept_other_hardware` is False; or the ranks' tensors differ.
    """
    model = engine.model
    optimizer = engine.optimizer
    if claimed_run.state is not None:
        check_hardware(
            console,
            claimed_run.state,
            collect_environment(world.device),
            hardware_hash,
            accept_other_hardware,
        )
        load_and_broadcast(world, model, optimizer, claimed_run.checkpoint)

    # Compare in any case: at the start of a run nothing is broadcast, and each rank has
    # initialized its own weights.
    if world.world_size > 1:
        tensors = {**model.state_dict(), **optimizer.state_dict()}
        facts = {"weights and optimizer state": hash_tensors(tensors)}
        check_equal_on_all_ranks(world, facts)


def load_and_broadcast(
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    loaded: LoadedCheckpoint | None,
) -> None:
    """Load a checkpoint on rank 0, which has read it, and broadcast its tensors."""
    if loaded is not None:
        model.load_state_dict(loaded.model_state_dict)
        optimizer.load_state_dict(loaded.optimizer_state_dict)
    # The state dicts list the same tensors in the same order on all ranks.
    for tensor in (*model.state_dict().values(), *optimizer.state_dict().values()):
        world.broadcast(tensor)


def build_progress(
    claimed_run: ClaimedRun, val: Dataset | None, total_steps: int
) -> TrainProgress:
    """Build the initial progress, or that of the checkpoint with its bad samples.

    Args:
        claimed_run: the checkpoint.
        val: the validation set.
        total_steps: steps of the whole run; more than those of the checkpoint's config
            if `epochs` was raised.
    """
    state = claimed_run.state
    bad_samples = dict(state.bad_samples) if state else {}
    best = None
    scheduled_best = None
    if state is not None:
        scheduled_best = state.scheduled_best
        # Where the run goes on, an evaluation that was made only because it ended does
        # not count: a run of that many epochs from the start would not have made it.
        is_finished = claimed_run.step == total_steps
        best = state.best if is_finished else scheduled_best
    # Drop the best results of another validation set: they cannot be compared.
    if best is not None and best.val != get_val_fingerprint(val):
        best = None
        scheduled_best = None
    stop = StopState()
    if state is not None and state.val == get_val_fingerprint(val):
        stop = state.stop
    return TrainProgress(
        step=claimed_run.step,
        bad_samples=bad_samples,
        reported_bad_samples=set(bad_samples),
        best_eval=best,
        scheduled_best_eval=scheduled_best,
        plateau=state.plateau if state else PlateauState(),
        stop=stop,
        reported_bad_val_samples=set(),
    )


def restore_best_name(store: Store, best: BestEval | None) -> None:
    """Rewrite `best.json` if it does not name the best checkpoint so far.

    An attempt may have been killed between saving the two; or the run goes on after its
    end, whose evaluation does not count any more. Raises OSError.
    """
    if best is None:
        return
    name = find_checkpoint(store, best.step)
    if name is not None and name != read_best_name(store):
        write_best(store, name, asdict(best))
