"""Cluster mode: Ray Train runs the training function on workers, and this watches over it.

One `fit` of Ray's has a fixed number of workers and replaces processes that die. What changes the number (a node that
is lost, added or drained) ends the fit, after a checkpoint where there is time for one, and the next fit goes on from
there. This rests on Ray's public interface; two private calls sharpen the view of the cluster, and have fallbacks.
"""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ControllerError

from distrain.config import Config
from distrain.errors import RunError, UserError
from distrain.launch.local import share_here
from distrain.launch.mailbox import Mailbox, name_of_driver
from distrain.launch.ray_cluster import HEAD_SETTINGS, connected, reason_of
from distrain.launch.ray_fit import trainer
from distrain.launch.share import Node, Share, fitting, remark, room, share_of, shortage
from distrain.launch.signals import stop_on_signals
from distrain.monitor.records import from_tree
from distrain.monitor.sinks import Console
from distrain.train import Summary

_LOOK_EVERY = 2.0
# An autoscaler hears what the last run asked for: runs that share a cluster say it again and again.
_CALL_EVERY = 10.0
# Seconds for which more room must be there before a run grows into it.
_SETTLED = 3.0


def run(
    config: Config,
    console: Console,
    *,
    address: str | None,
    must_resume: bool = False,
    other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train on a Ray cluster, or on workers on this machine; the summary, and the signal that stopped it if one did.

    Args:
        config: the run.
        console: what a person sees.
        address: of the cluster (auto, host:port, ray://host:port); None: a Ray of its own, on this machine.
        must_resume: it is a mistake if there is no checkpoint.
        other_hardware: go on where the hardware computes other bits than before.

    Raises:
        UserError, RunError: as `train`; too many failures without a new checkpoint.
    """
    config = _with_absolute_paths(config)
    own: dict[str, int] = {}
    if address is None:
        config, own = _on_this_machine(config)
    with connected(address, console, **own):
        try:
            stop = threading.Event()
            with stop_on_signals(
                stop.set
            ) as received:  # before `distrain drain` can find this process
                options = {"must_resume": must_resume, "other_hardware": other_hardware}
                summary = _Driver(config, console, address, options, stop).run()
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"the Ray cluster is gone ({reason_of(error)}): when it is back, run the same command to go on"
            ) from error
    return summary, received[0] if received and summary.status == "stopped" else None


def _on_this_machine(config: Config) -> tuple[Config, dict[str, int]]:
    """The config for a Ray of our own, with as many workers as fit; and what that Ray has to give.

    Workers on CPUs may be more than there are cores, where so many are asked for.

    Raises:
        UserError: there are fewer GPUs than workers.
    """
    share, nodes = share_here(config)
    has = nodes[0].total
    resources = {
        "cpus": max(int(has["CPU"]), share.least * share.cpus),
        "gpus": int(has["GPU"]) if share.gpus else 0,
    }
    if config.cluster.workers != "auto":
        cluster = config.cluster.model_copy(
            update={"workers": (share.least, fitting(share, nodes))}
        )
        config = config.model_copy(update={"cluster": cluster})
    return config, resources


class _Driver:
    """One launch: as many fits as it takes."""

    def __init__(
        self,
        config: Config,
        console: Console,
        address: str | None,
        options: Mapping[str, bool],
        stop: threading.Event,
    ) -> None:
        self._stop = stop
        self._config, self._console = config, console
        self._order = {"session": os.urandom(8).hex(), **options}
        # On the head, which outlives every worker's node.
        where = {"node:__internal_head__": 0.001}
        actor = ray.remote(
            num_cpus=0, resources=where, max_restarts=-1, max_task_retries=-1
        )(Mailbox)
        self._mailbox: Any = actor.options(name=name_of_driver()).remote()
        missing = [
            f"{k}={v}"
            for k, v in HEAD_SETTINGS.items()
            if not ray.get(self._mailbox.variable.remote(k))
        ]
        if missing:
            console.event(
                "a node that vanishes will be noticed late, after a minute or so: to be faster, start the cluster's "
                f"head with {' '.join(missing)}"
            )
        self._fits = 0
        self._places: list[tuple[str, str]] = []  # node and address of each rank
        self._group: Any = None  # Ray's reservation of resources for the fit
        self._step = self._start = 0
        self._lost_at: float | None = None
        self._causes: list[str] = []
        self._unplaceable: int | None = None
        self._called: float | None = None
        self._share: Share | None = None  # counted at each look
        self._gpus: int | None = (
            None  # of each rank; decided when the first group has formed
        )
        self._settles = address is not None and config.cluster.workers == "auto"
        self._formed_once = False  # since the last loss
        self._unformed = (
            0  # worker groups in a row that were lost before they had formed
        )
        self._remarks: set[str] = set()

    def run(self) -> Summary:
        """Fit again and again, until the run has ended."""
        try:
            return self._run()
        finally:
            if self._called is not None:
                with suppress(RayError):  # a head that is gone has forgotten it anyway
                    ray.get(
                        self._mailbox.call_for.remote(self._share, 0, []), timeout=10
                    )

    def _run(self) -> Summary:
        barren = 0  # fits in a row in which no group was formed
        while True:
            workers, share = self._await_room()
            self._places = []
            found, error, resizing = self._fit(workers, share)
            if found is not None and "text" in found:
                kind = UserError if found["status"] == "UserError" else RunError
                raise kind(found["text"] + self._first_cause())
            if (
                found is not None
                and found["status"] == "stopped"
                and not self._stop.is_set()
            ):
                if not resizing:
                    self._console.event(
                        "a worker was told to end (SIGTERM): saved, going on without losing a step"
                    )
                    self._lost_at = time.monotonic()
                continue
            if found is not None:
                return Summary.from_tree(found)
            reason = reason_of(error)
            barren = 0 if self._places else barren + 1
            if (
                isinstance(error, ControllerError)
                and "Timeout" in type(error.controller_failure).__name__
            ):
                self._unplaceable = workers
                self._lose(f"there is no room for {workers} workers any more")
            else:
                self._lose(f"Ray's controller: {reason}")
            if barren >= self._config.cluster.max_failures:
                raise RunError(
                    f"Ray could not form a worker group {barren} times{self._first_cause()}"
                )

    def _fit(
        self, workers: int, share: Share
    ) -> tuple[dict[str, Any] | None, BaseException | None, bool]:
        """One fit: what the lead returned or what it raised, and whether it was asked to end for a resize."""
        self._fits += 1
        result: dict[str, Any] = {}

        def fit() -> None:
            try:
                order = {**self._order, "fit": self._fits}
                result["found"] = (
                    trainer(self._config, workers, share, order, self._mailbox)
                    .fit()
                    .return_value
                )
            except BaseException as error:
                result["error"] = error
            if not given_up.is_set():
                self._mailbox.put.remote("ended", None)

        given_up = threading.Event()
        thread = threading.Thread(target=fit, name="distrain-fit", daemon=True)
        thread.start()
        asked, resizing, room_since, looked = False, False, None, time.monotonic()
        while thread.is_alive():
            self._deliver(1.0)
            if self._unformed >= self._config.cluster.max_failures:
                given_up.set()
                raise RunError(
                    f"no worker group could be formed, {self._unformed} times in a row{self._first_cause()}"
                )
            if self._stop.is_set() and not asked:
                self._console.event(
                    "stopping: saving first (once more ends it at once)"
                )
                asked = True
                self._mailbox.stop.remote(self._fits)
            now = time.monotonic()
            if (
                asked
                or not self._places
                or self._lost_at is not None
                or now - looked < _LOOK_EVERY
            ):
                continue
            looked = now
            why, room_since = self._wish_to_resize(workers, share, room_since)
            if why:
                self._console.event(
                    f"{why}: saving, then going on without losing a step"
                )
                asked = resizing = True
                self._lost_at = now
                self._mailbox.stop.remote(self._fits)
        thread.join()
        self._deliver(0.0)
        if (
            self._group is not None
        ):  # a controller that died has left it, and Ray itself needs its dashboard to see that
            ray.util.remove_placement_group(self._group)
            self._group = None
        return result.get("found"), result.get("error"), resizing

    def _deliver(self, wait: float) -> None:
        """Show what ranks and controller told."""
        for kind, value in ray.get(self._mailbox.take.remote(wait)):
            if kind == "event":
                self._console.event(value)
            elif kind == "formed":
                self._formed(*value)
            elif kind == "lost":
                self._lost(value)
            elif kind == "start":
                self._started(**value)
            elif kind == "advance":
                self._step = max(self._step, value)
                self._console.advance(value)
            elif kind == "record":
                record = from_tree(value)
                self._step = max(self._step, record.step)
                self._console.record(record)
            elif kind == "stop":
                self._console.stop()

    def _formed(self, places: list[tuple[str, str]], group: Any) -> None:
        self._places, self._group, self._unplaceable = places, group, None
        self._gpus = self._share.gpus if self._share else None
        self._formed_once, self._unformed = True, 0
        hosts = [address for _, address in places]
        where = ", ".join(
            f"{hosts.count(host)} on {host}" for host in sorted(set(hosts))
        )
        what = " with a GPU each" if self._share and self._share.gpus else ""
        self._console.event(
            f"worker group formed: {len(hosts)} worker{'s' * (len(hosts) > 1)}{what} ({where})"
        )

    def _started(self, step: int, steps: int, steps_per_epoch: int) -> None:
        if step > self._start:
            self._causes.clear()
        if self._lost_at is not None:
            again = max(0, self._step - step)
            self._console.event(
                f"training again after {time.monotonic() - self._lost_at:.1f} s, from step {step}: "
                f"{f'about {again} steps' if again else 'no step'} computed again"
            )
            self._lost_at = None
        self._start = self._step = step
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)

    def _lost(self, reasons: Mapping[int, str]) -> None:
        self._unformed += not self._formed_once
        self._formed_once = False
        for rank, text in sorted(reasons.items()):
            host = f" on {self._places[rank][1]}" if rank < len(self._places) else ""
            self._lose(f"lost rank {rank}{host}: {text}")

    def _lose(self, cause: str) -> None:
        self._console.stop()
        self._console.event(cause)
        self._causes.append(cause)
        self._lost_at = self._lost_at or time.monotonic()

    def _first_cause(self) -> str:
        return f"; the first cause was: {self._causes[0]}" if self._causes else ""

    def _call_for_most(self, share: Share) -> None:
        now = time.monotonic()
        if self._called is None or now - self._called >= _CALL_EVERY:
            self._called = now
            held = [node for node, _ in self._places]
            self._mailbox.call_for.remote(share, share.most, held)

    def _look(self, *, beside: bool = False) -> tuple[list[Node], Share]:
        """The cluster's nodes, and what the run may take of them; `beside`: beside what others hold."""
        nodes: list[Node] = ray.get(self._mailbox.look.remote())
        self._share = share_of(self._config, nodes, gpus=self._gpus, beside=beside)
        return nodes, self._share

    def _await_room(self) -> tuple[int, Share]:
        """The number of workers to start with, and what each holds, as soon as there is room for the least.

        Raises:
            RunError: told to stop meanwhile, or there is none for too long.
        """
        began, told = time.monotonic(), False
        steady, counted = began, None  # since when the cluster shows the same
        while not self._stop.is_set():
            waited = time.monotonic() - began
            nodes, share = self._look(
                beside=waited > _SETTLED
            )  # what our last workers held is free by then
            most = share.most
            if self._unplaceable is not None and self._unplaceable > share.least:
                most = min(most, self._unplaceable - 1)
            if counted != (share.most, share.gpus):
                steady, counted = time.monotonic(), (share.most, share.gpus)
            if (
                self._settles
                and self._gpus is None
                and time.monotonic() - steady < _SETTLED
            ):
                time.sleep(0.2)  # its nodes may be coming up one after another
                continue
            found = min(most, room(share, nodes, held=[]))
            if found == most or (found >= share.least and waited > _SETTLED):
                self._remark(remark(self._config, share, found, nodes))
                return found, share
            self._call_for_most(share)
            if not told and waited > _SETTLED:
                told = True
                self._console.event(
                    f"waiting for the cluster: {shortage(share, nodes)}"
                )
            if waited > self._config.cluster.wait:
                why = shortage(share, nodes)
                raise RunError(
                    f"{why}: add nodes, or lower cluster.workers or what each asks for"
                )
            time.sleep(0.2)
        raise RunError(
            "stopped while it waited for room to train: run the same command to go on"
        )

    def _remark(self, sentence: str | None) -> None:
        """Show a sentence, once in a launch."""
        if sentence is not None and sentence not in self._remarks:
            self._remarks.add(sentence)
            self._console.event(sentence)

    def _wish_to_resize(
        self, workers: int, share: Share, room_since: float | None
    ) -> tuple[str | None, float | None]:
        """Why the number of workers, which hold `share`, should change; and since when there has been room for more."""
        nodes, now = self._look()
        share = now._replace(cpus=share.cpus)
        held = [node for node, _ in self._places]
        drained = sorted(
            node.address for node in nodes if node.draining and node.id in held
        )
        if drained:
            return f"{', '.join(drained)} is being drained", None
        if workers < share.most:
            self._call_for_most(share)
        found = min(share.most, room(share, nodes, held=held))
        if found <= workers:
            return None, None
        since = room_since or time.monotonic()
        if time.monotonic() - since < _SETTLED:
            return None, since
        return f"there is room for {found} workers, {found - workers} more", None


def _with_absolute_paths(config: Config) -> Config:
    """The same config for processes that start in other folders."""

    def absolute(url: str | None) -> str | None:
        return url if url is None or "://" in url else os.path.abspath(url)

    paths = ("train", "val", "cache")
    data = config.data.model_copy(
        update={name: absolute(getattr(config.data, name)) for name in paths}
    )
    return config.model_copy(update={"run": absolute(config.run), "data": data})
