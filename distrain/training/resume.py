"""Going on: the right to a run directory, the checkpoint in it, and whether this run may go on from there."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn

from distrain.config import Config, get_result_defaults, get_result_fields
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.retry import call_with_retries, is_transient
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.monitor.sinks import Console
from distrain.optim.optimizer import Optimizer
from distrain.rundir import files
from distrain.rundir.checkpoint import LoadedCheckpoint, load_newest_checkpoint
from distrain.rundir.lease import Lease, acquire_lease, count_failures, read_attempts
from distrain.training.checkpoint_state import CheckpointState
from distrain.training.run_data import get_val_fingerprint, pack_built_in

T = TypeVar("T")


def claim_and_load(
    config: Config,
    world: World,
    console: Console,
    retrier: "Retrier",
    stack: ExitStack,
    *,
    must_resume: bool,
) -> tuple[Lease, LoadedCheckpoint | None]:
    """On the lead: the right to write to the run directory, and the checkpoint to go on from.

    Raises:
        UserError: another run is at work there, or it cannot be used.
        RunError: no checkpoint is whole, or too many attempts of this launch have failed.
    """
    store = retrier.store
    nothing = UserError(
        f"there is no checkpoint to resume from in {store.redacted_url}: leave out --resume to start the run"
    )
    if must_resume and not retrier(lambda: store.list_names(files.CHECKPOINTS_DIR)):
        raise nothing
    lease = stack.enter_context(
        retrier(lambda: acquire_lease(store, world.session, console.log))
    )
    loaded, problems = retrier(lambda: load_newest_checkpoint(store))
    if must_resume and loaded is None:
        raise nothing
    step = loaded.step if loaded else 0
    retrier(lambda: lease.record_start(step, world.world_size))
    for problem in problems:
        console.log(f"{problem}; falling back to the one before")
    before = {
        number: record
        for number, record in retrier(lambda: read_attempts(store)).items()
        if number < lease.attempt
    }
    failed = count_failures(before, world.session, step)
    if failed >= config.cluster.max_failures:
        raise RunError(
            f"{failed} attempts in a row failed after step {step} without a new checkpoint, which is as many as "
            "cluster.max_failures allows: mend the cause, then run the same command to go on"
        )
    if config.data.pack:
        pack_built_in(config.data.pack, config, console)
    return lease, loaded


class Retrier:
    """Tries again what fails for want of room, or of an answer from the run directory; for a while in all."""

    def __init__(self, store: Store, seconds: float, console: Console) -> None:
        self.store, self._console, self._has_logged = store, console, False
        self._deadline = time.monotonic() + seconds

    def __call__(self, func: Callable[[], T]) -> T:
        """What `act` returns. Raises UserError where waiting cannot help, AttemptError where it did not."""
        try:
            return call_with_retries(
                func, self._deadline - time.monotonic(), on_retry=self._log_once
            )
        except OSError as error:
            what = self._describe_error(error)
            if not is_transient(error):
                raise UserError(f"{what}: choose another, run=...") from None
            raise AttemptError(
                f"{what}: free space or mend the storage, or choose another, run=..."
            ) from None

    def _log_once(self, error: OSError, failures: int) -> None:
        if not self._has_logged:
            self._console.log(f"{self._describe_error(error)}: trying again")
        self._has_logged = True

    def _describe_error(self, error: OSError) -> str:
        return f"the run directory {self.store.redacted_url} cannot be written to or read ({error})"


def check_result_fields(config: Config, saved_fields: Mapping[str, Any]) -> None:
    """Raises UserError where a field that decides the weights differs from the checkpoint's.

    A field that the checkpoint does not know, since it is younger, counts as its default.
    """
    own = get_result_fields(config)
    saved_fields = {
        **{
            key: default
            for key, default in get_result_defaults(config).items()
            if key not in saved_fields
        },
        **saved_fields,
    }
    changed = [
        f"\n  - {key}: {saved_fields.get(key)!r} in the checkpoint, {own.get(key)!r} now"
        for key in sorted(saved_fields.keys() | own.keys())
        if saved_fields.get(key) != own.get(key)
    ]
    if changed:
        raise UserError(
            f"{config.run} was trained with other settings, so it cannot go on with these "
            f"(change them back, or start afresh with run=...):{''.join(changed)}"
        )


def check_plateau(config: Config, val: Dataset | None, state: CheckpointState) -> None:
    """Raises UserError where the plateau schedule would compare counts of two validation sets."""
    if config.schedule.follows_validation and state.val != get_val_fingerprint(val):
        raise UserError(
            f"{config.run} was trained with another validation set, whose counts its "
            f"{config.schedule.name} schedule follows: use that one (data.val), or start afresh with run=..."
        )


def check_hardware(
    console: Console,
    state: CheckpointState,
    current_environment: Mapping[str, str],
    hardware_hash: str | None,
    accept_other_hardware: bool,
) -> None:
    """Compare what this hardware computes with what the checkpoint's did.

    Raises:
        UserError: it differs, and nobody said that it may.
    """
    if state.hardware == hardware_hash:
        return
    before = state.environment
    keys = sorted(before.keys() | current_environment.keys())
    differs = [
        f"{k} {before.get(k)} -> {current_environment.get(k)}"
        for k in keys
        if before.get(k) != current_environment.get(k)
    ]
    what = "; ".join(differs) or "the same names and versions, another result"
    if not accept_other_hardware:
        raise UserError(
            f"this hardware computes other bits than that of the checkpoint ({what}): use the same kind, "
            "or give up the promise with --accept-other-hardware"
        )
    console.log(
        f"warning: other hardware than before ({what}): bits are no longer promised for this run"
    )


def load_and_broadcast(
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    loaded: LoadedCheckpoint | None,
) -> None:
    """Take over a checkpoint: the lead has read it, the others get its tensors."""
    if loaded is not None:
        model.load_state_dict(loaded.model_state_dict)
        optimizer.load_state_dict(loaded.optimizer_state_dict)
    for tensor in (*model.state_dict().values(), *optimizer.state_dict().values()):
        world.broadcast(tensor)
