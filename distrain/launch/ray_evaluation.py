"""Evaluate on workers of Ray: one task per worker, which Ray repeats if it is lost."""

import os
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from distrain.config import Config
from distrain.errors import AttemptError, RunError, UserError
from distrain.inference.ensemble import CROPS
from distrain.inference.scoring import EvalPart, evaluate_part
from distrain.launch.allocation import (
    Allocation,
    choose_num_workers,
    compute_allocation,
    count_fitting_workers,
    explain_shortage,
    to_ray_resources,
)
from distrain.launch.eval_request import EvalRequest, make_eval_world
from distrain.launch.ray_cluster import connect_to_ray, list_nodes, summarize_error
from distrain.launch.ray_driver import configure_local_ray
from distrain.monitor.sinks import Console

# Tries of a part whose worker or node is lost. It is the same in each.
_MAX_RETRIES = 3


class _Failure(NamedTuple):
    """Error of a worker that another try would not mend."""

    kind: str
    text: str


def evaluate_on_ray(
    config: Config,
    request: EvalRequest,
    *,
    num_rows: int,
    address: str | None,
    console: Console,
    on_progress: Callable[[int, int], None] | None,
) -> list[EvalPart]:
    """Evaluate a data set on a Ray cluster, or on workers on this machine.

    Args:
        config: of the first model; its cluster section says how many workers.
        request: what to evaluate.
        num_rows: images of the data set.
        address: of the cluster; None: start a local Ray cluster.
        console: where progress is printed.
        on_progress: gets the number of images done, and that of all.

    Returns:
        The workers' parts, by rank.

    Raises:
        UserError, RunError, AttemptError: as `evaluate`.
    """
    request = _make_paths_absolute(request)
    local_resources: dict[str, int] = {}
    if address is None:
        config, local_resources = configure_local_ray(config)
    with connect_to_ray(address, console, **local_resources):
        try:
            nodes = list_nodes()
            allocation = compute_allocation(config, nodes)
            if not count_fitting_workers(allocation, nodes, worker_node_ids=[]):
                raise UserError(
                    f"{explain_shortage(allocation, nodes)}: lower --workers, or "
                    "evaluate on another cluster"
                )
            # A worker without a chunk would have nothing to do.
            num_chunks = -(-num_rows // config.evaluate.batch)
            num_workers = min(choose_num_workers(allocation, nodes), num_chunks)
            plural = "s" * (num_workers != 1)
            console.log(f"evaluating on {num_workers} worker{plural}")
            return _run_parts(
                config, request, allocation, num_rows, num_workers, on_progress
            )
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"lost the Ray cluster ({summarize_error(error)}): when it is back, "
                "run the same command"
            ) from error


def _run_parts(
    config: Config,
    request: EvalRequest,
    allocation: Allocation,
    num_rows: int,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[EvalPart]:
    """Run one task per worker, and wait for all of them."""
    # Only now: a line of the console would break a progress bar.
    if on_progress is not None:
        on_progress(0, num_rows)
    resources = to_ray_resources(allocation)
    run_task = ray.remote(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_retries=_MAX_RETRIES,
        scheduling_strategy="SPREAD",
    )(_evaluate_on_worker)
    tasks = [
        run_task.remote(config, request, allocation, rank, num_workers)
        for rank in range(num_workers)
    ]
    parts: dict[int, EvalPart] = {}
    waiting = dict(zip(tasks, range(num_workers), strict=True))
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        outcome: EvalPart | _Failure = ray.get(done)
        if isinstance(outcome, _Failure):
            raise _rebuild_error(outcome)
        parts[waiting.pop(done)] = outcome
        if on_progress is not None:
            num_done = sum(len(part.table.labels) for part in parts.values())
            on_progress(num_done, num_rows)
    return [parts[rank] for rank in range(num_workers)]


def _evaluate_on_worker(
    config: Config,
    request: EvalRequest,
    allocation: Allocation,
    rank: int,
    world_size: int,
) -> EvalPart | _Failure:
    """Evaluate one part, in a process of Ray's."""
    try:
        world = make_eval_world(config, allocation, rank=rank, world_size=world_size)
        models = request.open_models()
        return evaluate_part(models, request.data, CROPS[request.crops], world)
    except (UserError, RunError) as error:
        # Returned, so that Ray does not wrap it. AttemptError is a RunError.
        return _Failure(type(error).__name__, str(error))


def _rebuild_error(failure: _Failure) -> UserError | RunError:
    if failure.kind == "UserError":
        return UserError(failure.text)
    return (AttemptError if failure.kind == "AttemptError" else RunError)(failure.text)


def _make_paths_absolute(request: EvalRequest) -> EvalRequest:
    """Make local paths absolute: Ray's workers have another working directory."""

    def to_absolute(url: str) -> str:
        return url if "://" in url else os.path.abspath(url)

    models = tuple(map(to_absolute, request.models))
    return request._replace(models=models, data=to_absolute(request.data))
