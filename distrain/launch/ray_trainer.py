"""Configure one fit of Ray Train, and report to the driver why its ranks ended.

Ray's controller loads this module before it starts the ranks, which wait for it: no torch here.
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
    rank_options: Mapping[str, Any],
    mailbox: Any,
) -> "TorchTrainer":
    """Ready to fit with so many workers.

    Args:
        config: the run.
        workers: ranks.
        share: what each of them holds.
        order: what each rank is told: fit, session and options of the launch.
        mailbox: the launch's, an actor.
    """
    from ray.train.torch import TorchTrainer

    resources = {
        kind: each for kind, each in to_ray_resources(allocation).items() if each
    }
    loop_config = {
        **rank_options,
        "config": config.model_dump(mode="json"),
        "mailbox": mailbox,
        "share": allocation,
    }
    assert config.run is not None
    path, file_system = _resolve_storage(config.run)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config=loop_config,
        torch_config=_NullBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(allocation.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{rank_options['session']}-{rank_options['fit']}",
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[_LostRankCallback(mailbox)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def train_loop_per_worker(rank_options: dict[str, Any]) -> dict[str, Any]:
    """Run `ray_rank.run_rank`, in a worker."""
    from distrain.launch.ray_rank import run_rank as run

    return run(rank_options)


def _install_preemption_handler() -> None:
    from distrain.launch.ray_rank import install_preemption_handler

    install_preemption_handler()


class _NullBackend(Backend):
    """Ray forms no process group: a failure to form one would end the fit. The ranks do it themselves."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_install_preemption_handler)


@dataclass
class _NullBackendConfig(BackendConfig):
    """In place of TorchConfig, which loads torch."""

    backend: str = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return _NullBackend


class _LostRankCallback(UserCallback):
    """Runs in Ray's controller: tells the driver why ranks ended."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(
        self, run_context: Any, worker_exceptions: dict[int, Exception]
    ) -> None:
        # A rank that only noticed that another is gone is a symptom: it is named where there is no cause.
        errors = {
            rank: getattr(error, "_base_exc", error)
            for rank, error in worker_exceptions.items()
        }
        causes = {
            rank: error
            for rank, error in errors.items()
            if not isinstance(error, LostRankError)
        }
        self._mailbox.send_message.remote(
            "lost",
            {
                rank: summarize_error(error)
                for rank, error in (causes or errors).items()
            },
        )


def _resolve_storage(run: str) -> tuple[str, Any]:
    """Where Ray keeps what it knows of a fit: beside our checkpoints."""
    store = Store(run)
    if store.local_path is not None:
        return f"{store.local_path}/ray", None
    return store.resolve_path("ray"), pyarrow.fs.PyFileSystem(
        pyarrow.fs.FSSpecHandler(store.fsspec_filesystem)
    )
