"""Configure one fit of Ray Train, and report to the driver why its ranks ended.

Ray's controller loads this module before it starts the ranks, which wait for it: it
must not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.backend import Backend, BackendConfig

from distrain.config import Config
from distrain.data.storage.store import Store
from distrain.errors import LostRankError
from distrain.launch.allocation import Allocation, to_ray_resources
from distrain.launch.ray_cluster import summarize_error

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def build_trainer(
    config: Config,
    num_workers: int,
    allocation: Allocation,
    launch_options: Mapping[str, Any],
    mailbox: Any,
) -> "TorchTrainer":
    """Build the trainer of one fit with a fixed number of workers.

    Args:
        config: the run.
        num_workers: number of ranks.
        allocation: the resources of each rank.
        launch_options: id and options of the launch, and the number of the fit.
        mailbox: the launch's mailbox, an actor.
    """
    from ray.train.torch import TorchTrainer

    assert config.run is not None
    storage_path, storage_filesystem = _resolve_storage(config.run)
    rank_resources = {
        kind: amount for kind, amount in to_ray_resources(allocation).items() if amount
    }
    return TorchTrainer(
        train_loop_per_worker,
        # What each rank gets: see `ray_rank.run_rank`.
        train_loop_config={
            **launch_options,
            "config": config.model_dump(mode="json"),
            "mailbox": mailbox,
            "allocation": allocation,
        },
        torch_config=_WorkerSetupBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(allocation.gpus_per_worker),
            resources_per_worker=rank_resources,
        ),
        run_config=RunConfig(
            name=f"{launch_options['launch_id']}-{launch_options['fit']}",
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            # No limit in Ray: the ranks limit failed attempts, the driver limits worker
            # groups that never form. A failed controller ends the fit, and the driver
            # starts the next.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[_RankErrorCallback(mailbox)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def train_loop_per_worker(train_loop_config: dict[str, Any]) -> dict[str, Any]:
    """Call `ray_rank.run_rank` in a worker; torch is imported only there."""
    from distrain.launch.ray_rank import run_rank

    return run_rank(train_loop_config)


def _install_preemption_handler() -> None:
    from distrain.launch.ray_rank import install_preemption_handler

    install_preemption_handler()


class _WorkerSetupBackend(Backend):
    """Backend that only prepares the workers: SIGTERM handler, visible GPUs.

    It forms no process group: if Ray failed to form one, the fit would end. The ranks
    form it themselves, and a failure there ends only an attempt.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # In the main threads of the workers, the only ones that may set a handler.
        worker_group.execute(_install_preemption_handler)


@dataclass
class _WorkerSetupBackendConfig(BackendConfig):
    """Replacement for TorchConfig, which imports torch."""

    backend: str = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return _WorkerSetupBackend


class _RankErrorCallback(UserCallback):
    """Callback in Ray's controller that reports to the driver why ranks ended."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(
        self, run_context: Any, worker_exceptions: dict[int, Exception]
    ) -> None:
        # Ray wraps what a rank raised.
        errors = {
            rank: getattr(error, "_base_exc", error)
            for rank, error in worker_exceptions.items()
        }
        # A rank that lost its peer is a symptom: report it only if there is no cause.
        causes = {
            rank: error
            for rank, error in errors.items()
            if not isinstance(error, LostRankError)
        }
        reasons = {
            rank: summarize_error(error) for rank, error in (causes or errors).items()
        }
        self._mailbox.send_message.remote("rank_errors", reasons)


def _resolve_storage(run: str) -> tuple[str, Any]:
    """Return path and file system of Ray's own state of a fit: in the run directory."""
    store = Store(run)
    if store.local_path is not None:
        return f"{store.local_path}/ray", None
    handler = pyarrow.fs.FSSpecHandler(store.fsspec_filesystem)
    return store.resolve_path("ray"), pyarrow.fs.PyFileSystem(handler)
