"""Going on: the right to a run directory, the checkpoint in it, and whether this run may go on from there."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn

from distrain.config import Config, result_defaults, result_fields
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.retry import is_transient, retry
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.monitor.sinks import Console
from distrain.optim.optimizer import Optimizer
from distrain.rundir import files
from distrain.rundir.checkpoint import Loaded, load_newest
from distrain.rundir.lease import Lease, attempts, claim, failures
from distrain.training.datasets import pack_built_in, val_fingerprint
from distrain.training.state import State

T = TypeVar("T")


def take_over(
    config: Config,
    world: World,
    console: Console,
    patience: "Patience",
    stack: ExitStack,
    *,
    must_resume: bool,
) -> tuple[Lease, Loaded | None]:
    """On the lead: the right to write to the run directory, and the checkpoint to go on from.

    Raises:
        UserError: another run is at work there, or it cannot be used.
        RunError: no checkpoint is whole, or too many attempts of this launch have failed.
    """
    store = patience.store
    nothing = UserError(
        f"there is no checkpoint to resume from in {store.name}: leave out --resume to start the run"
    )
    if must_resume and not patience(lambda: store.list(files.CHECKPOINTS)):
        raise nothing
    lease = stack.enter_context(
        patience(lambda: claim(store, world.session, console.event))
    )
    loaded, problems = patience(lambda: load_newest(store))
    if must_resume and loaded is None:
        raise nothing
    step = loaded.step if loaded else 0
    patience(lambda: lease.started_from(step, world.ranks))
    for problem in problems:
        console.event(f"{problem}; falling back to the one before")
    before = {
        number: record
        for number, record in patience(lambda: attempts(store)).items()
        if number < lease.number
    }
    failed = failures(before, world.session, step)
    if failed >= config.cluster.max_failures:
        raise RunError(
            f"{failed} attempts in a row failed after step {step} without a new checkpoint, which is as many as "
            "cluster.max_failures allows: mend the cause, then run the same command to go on"
        )
    if config.data.pack:
        pack_built_in(config.data.pack, config, console)
    return lease, loaded


class Patience:
    """Tries again what fails for want of room, or of an answer from the run directory; for a while in all."""

    def __init__(self, store: Store, seconds: float, console: Console) -> None:
        self.store, self._console, self._told = store, console, False
        self._end = time.monotonic() + seconds

    def __call__(self, act: Callable[[], T]) -> T:
        """What `act` returns. Raises UserError where waiting cannot help, AttemptError where it did not."""
        try:
            return retry(act, self._end - time.monotonic(), again=self._tell)
        except OSError as error:
            what = self._what(error)
            if not is_transient(error):
                raise UserError(f"{what}: choose another, run=...") from None
            raise AttemptError(
                f"{what}: free space or mend the storage, or choose another, run=..."
            ) from None

    def _tell(self, error: OSError, failures: int) -> None:
        if not self._told:
            self._console.event(f"{self._what(error)}: trying again")
        self._told = True

    def _what(self, error: OSError) -> str:
        return f"the run directory {self.store.name} cannot be written to or read ({error})"


def check_result(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises UserError where a field that decides the weights differs from the checkpoint's.

    A field that the checkpoint does not know, since it is younger, counts as its default.
    """
    own = result_fields(config)
    saved = {
        **{
            key: default
            for key, default in result_defaults(config).items()
            if key not in saved
        },
        **saved,
    }
    changed = [
        f"\n  - {key}: {saved.get(key)!r} in the checkpoint, {own.get(key)!r} now"
        for key in sorted(saved.keys() | own.keys())
        if saved.get(key) != own.get(key)
    ]
    if changed:
        raise UserError(
            f"{config.run} was trained with other settings, so it cannot go on with these "
            f"(change them back, or start afresh with run=...):{''.join(changed)}"
        )


def check_plateau(config: Config, val: Dataset | None, state: State) -> None:
    """Raises UserError where the plateau schedule would compare counts of two validation sets."""
    if config.schedule.follows_validation and state.val != val_fingerprint(val):
        raise UserError(
            f"{config.run} was trained with another validation set, whose counts its "
            f"{config.schedule.name} schedule follows: use that one (data.val), or start afresh with run=..."
        )


def check_hardware(
    console: Console,
    state: State,
    now: Mapping[str, str],
    hardware: str | None,
    other_hardware: bool,
) -> None:
    """Compare what this hardware computes with what the checkpoint's did.

    Raises:
        UserError: it differs, and nobody said that it may.
    """
    if state.hardware == hardware:
        return
    before = state.environment
    keys = sorted(before.keys() | now.keys())
    differs = [
        f"{k} {before.get(k)} -> {now.get(k)}"
        for k in keys
        if before.get(k) != now.get(k)
    ]
    what = "; ".join(differs) or "the same names and versions, another result"
    if not other_hardware:
        raise UserError(
            f"this hardware computes other bits than that of the checkpoint ({what}): use the same kind, "
            "or give up the promise with --accept-other-hardware"
        )
    console.event(
        f"warning: other hardware than before ({what}): bits are no longer promised for this run"
    )


def restore(
    world: World, model: nn.Module, optimizer: Optimizer, loaded: Loaded | None
) -> None:
    """Take over a checkpoint: the lead has read it, the others get its tensors."""
    if loaded is not None:
        model.load_state_dict(loaded.model)
        optimizer.load(loaded.optimizer)
    for tensor in (*model.state_dict().values(), *optimizer.state().values()):
        world.copy_from_lead(tensor)
