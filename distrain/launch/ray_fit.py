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
from distrain.launch.ray_cluster import reason_of
from distrain.launch.share import Share, need

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def trainer(
    config: Config, workers: int, share: Share, order: Mapping[str, Any], mailbox: Any
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

    resources = {kind: each for kind, each in need(share).items() if each}
    loop_config = {
        **order,
        "config": config.model_dump(mode="json"),
        "mailbox": mailbox,
        "share": share,
    }
    assert config.run is not None
    path, file_system = _storage(config.run)
    return TorchTrainer(
        run_rank,
        train_loop_config=loop_config,
        torch_config=_NoGroup(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(share.gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{order['session']}-{order['fit']}",
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[_Losses(mailbox)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def run_rank(order: dict[str, Any]) -> dict[str, Any]:
    """Run `ray_rank.run_rank`, in a worker."""
    from distrain.launch.ray_rank import run_rank as run

    return run(order)


def _heed_sigterm() -> None:
    from distrain.launch.ray_rank import heed_sigterm

    heed_sigterm()


class _NoBackend(Backend):
    """Ray forms no process group: a failure to form one would end the fit. The ranks do it themselves."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_heed_sigterm)


@dataclass
class _NoGroup(BackendConfig):
    """In place of TorchConfig, which loads torch."""

    backend: str = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoBackend


class _Losses(UserCallback):
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
        self._mailbox.put.remote(
            "lost",
            {rank: reason_of(error) for rank, error in (causes or errors).items()},
        )


def _storage(run: str) -> tuple[str, Any]:
    """Where Ray keeps what it knows of a fit: beside our checkpoints."""
    store = Store(run)
    if store.local is not None:
        return f"{store.local}/ray", None
    return store.path("ray"), pyarrow.fs.PyFileSystem(
        pyarrow.fs.FSSpecHandler(store.file_system)
    )
