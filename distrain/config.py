"""Config of a run: one tree of frozen sections, read from YAML with overrides.

A recipe is one YAML file; overrides are written `key.sub=value`. Every field is marked
*result* (it decides the weights: a resume that changes one is refused) or *operation*
(where, how fast and how safely the run executes: it may change at any time).
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)

from distrain.data.config import Augment, DataConfig
from distrain.data.storage.url import expand_home, forbid_url_secrets
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.fields import Section, make_conflict, operation_field, result_field
from distrain.losses import CrossEntropy, Loss
from distrain.models.alexnet import AlexNet
from distrain.models.model import Model
from distrain.monitor.config import LogConfig, MetricsConfig

# Not used below: importing a module registers its optimizer by name.
from distrain.optim import adam, lars  # noqa: F401
from distrain.optim.config import Reduction
from distrain.optim.early_stopping import StopConfig
from distrain.optim.schedule import Schedule
from distrain.optim.sgd import SGD
from distrain.optim.update_rule import UpdateRule
from distrain.parsing import OptionOverride, parse_mapping, parse_section
from distrain.yaml12 import dump_yaml

_RECIPES_FOLDER = Path(__file__).parent / "recipes"

# `name` selects the class that parses the section; a dump has all fields of that class.
AnyModel = Annotated[SerializeAsAny[Model], BeforeValidator(Model.parse_choice)]
AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(Loss.parse_choice)]
AnyUpdateRule = Annotated[
    SerializeAsAny[UpdateRule], BeforeValidator(UpdateRule.parse_choice)
]
AnySchedule = Annotated[
    SerializeAsAny[Schedule], BeforeValidator(Schedule.parse_choice)
]


class EvaluateConfig(Section):
    """Validation: center crop, each image once."""

    every: int | None = operation_field(None, ge=1)
    """Steps between evaluations; null: once per epoch. The last step is always
    evaluated, and the end of each epoch too if the schedule follows validation.
    [operation]"""
    batch: int = result_field(128, ge=1)
    """Samples per evaluation batch; the batches are the same for any number of ranks.
    [result]"""


class CheckpointConfig(Section):
    """Checkpoints in the run directory."""

    every: int | None = operation_field(None, ge=1)
    """Steps between checkpoints; null: once per epoch. The last step is always saved.
    [operation]"""
    keep: int = operation_field(2, ge=1)
    """Newest checkpoints that are kept, besides the best one. The default, 2, leaves
    one to resume from if the newest is damaged. [operation]"""
    patience: float = operation_field(120.0, ge=0)
    """Seconds for which a failed save is retried before the attempt ends.
    [operation]"""


class Config(Section):
    """Config of a run, from `load_config`.

    It is frozen: `override_config` returns a changed one.
    """

    run: str | None = operation_field(None)
    """Run directory, a path or any fsspec URL; null: runs/<name of the recipe>.
    [operation]"""
    seed: int = result_field(0, ge=0, lt=1 << 32)
    """Seed of weights, sample order, augmentation and dropout, from 0 to 2^32 - 1.
    [result]"""
    epochs: int = result_field(90, ge=1)
    """Passes over the training set. [result]"""
    global_batch: int = result_field(128, ge=1)
    """Samples per optimizer step, over all virtual workers. [result]"""
    virtual_workers: int = result_field(8, ge=1)
    """V: number of equal parts of the global batch, which it must divide. At most V
    ranks can share the work; fixed for the run. [result]"""
    precision: Literal["fp32", "tf32", "bf16"] = result_field("fp32")
    """Arithmetic of forward and backward; weights and optimizer state are fp32 always.
    [result]"""
    threads: int = result_field(1, ge=1)
    """CPU threads that compute one virtual worker; must be 1 in exact mode, since
    gradients differ between thread counts. Use `lanes` for more cores. [result]"""
    device: Literal["auto", "cpu", "cuda"] = operation_field("auto")
    """Device that computes; auto: a GPU if there is one, else the CPU. [operation]"""
    lanes: int | None = operation_field(None, ge=1)
    """Virtual workers that a rank computes side by side; null: one per core on a CPU, 1
    on a GPU. [operation]"""
    data: DataConfig = Field(examples=[{"train": "shards/train"}])
    """Data sets and how they are read."""
    augment: Augment = Augment()
    """Augmentation of training images."""
    model: AnyModel = AlexNet()
    """Network."""
    loss: AnyLoss = CrossEntropy()
    """Loss."""
    optimizer: AnyUpdateRule = SGD()
    """Optimizer."""
    schedule: AnySchedule = Field(examples=[{"name": "constant", "lr": 0.01}])
    """Learning-rate schedule."""
    reduction: Reduction = Reduction()
    """Gradient reduction."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Validation."""
    stop: StopConfig = StopConfig()
    """Early stopping."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Metrics log."""
    metrics: MetricsConfig = MetricsConfig()
    """Prometheus endpoint."""
    cluster: Cluster = Cluster()
    """Ranks and their resources."""

    @property
    def micro_batch_size(self) -> int:
        """Samples of one virtual worker in one step: b in the formulas."""
        return self.global_batch // self.virtual_workers

    @field_validator("run")
    @classmethod
    def _check_run(cls, value: str | None) -> str | None:
        return forbid_url_secrets(expand_home(value))

    # Checks across fields are attached to one field each, so that they are reported
    # together with all other problems; a check of the whole config (pydantic's
    # `model_validator`) would run only if all fields are valid. A validator sees the
    # fields declared before its own, and of those only the valid ones.

    @field_validator("virtual_workers")
    @classmethod
    def _check_virtual_workers(
        cls,
        value: int,
        info: ValidationInfo,
    ) -> int:
        batch = info.data.get("global_batch")
        if batch is not None and batch % value:
            divisors = [v for v in range(1, batch + 1) if batch % v == 0]
            nearest = min(divisors, key=lambda v: abs(v - value))
            raise make_conflict(
                f"{value} does not divide global_batch = {batch}: "
                f"use {nearest}, or another global_batch",
                "global_batch",
            )
        return value

    @field_validator("model")
    @classmethod
    def _check_model_crop(
        cls,
        value: Model,
        info: ValidationInfo,
    ) -> Model:
        augment = info.data.get("augment")
        if augment is not None:
            value.check_crop(augment.crop)
        return value

    @field_validator("schedule")
    @classmethod
    def _check_validation_data(
        cls,
        value: Schedule,
        info: ValidationInfo,
    ) -> Schedule:
        data = info.data.get("data")
        if value.follows_validation and data is not None and data.val is None:
            raise make_conflict(
                f"{value.name} follows the validation error: set data.val",
                "schedule.name",
                "data.val",
            )
        return value

    @field_validator("stop")
    @classmethod
    def _check_stop_data(
        cls,
        value: StopConfig,
        info: ValidationInfo,
    ) -> StopConfig:
        data = info.data.get("data")
        if value.patience is not None and data is not None and data.val is None:
            raise make_conflict(
                "patience counts epochs without better validation: set data.val",
                "stop.patience",
                "data.val",
            )
        return value

    @field_validator("log")
    @classmethod
    def _check_tensorboard_path(
        cls,
        value: LogConfig,
        info: ValidationInfo,
    ) -> LogConfig:
        run = info.data.get("run") or ""
        if value.tensorboard and "://" in run and not run.startswith("file://"):
            raise make_conflict(
                "tensorboard needs a run directory on a disk: "
                "use mlflow, or set run to a local path",
                "log.tensorboard",
                "run",
            )
        return value

    @field_validator("cluster")
    @classmethod
    def _check_worker_limits(
        cls,
        value: Cluster,
        info: ValidationInfo,
    ) -> Cluster:
        if value.workers == "auto":
            return value
        min_workers, max_workers = value.workers
        if min_workers > max_workers:
            raise make_conflict(
                f"workers = [{min_workers}, {max_workers}] has a minimum above its "
                "maximum: swap them",
                "cluster.workers",
            )
        virtual_workers = info.data.get("virtual_workers")
        if virtual_workers is not None and max_workers > virtual_workers:
            raise make_conflict(
                f"workers = {max_workers} is more than virtual_workers = "
                f"{virtual_workers}, so a worker would have no work: use at most "
                f"{virtual_workers}",
                "cluster.workers",
                "virtual_workers",
            )
        return value

    @field_validator("reduction")
    @classmethod
    def _check_exact_threads(
        cls,
        value: Reduction,
        info: ValidationInfo,
    ) -> Reduction:
        threads = info.data.get("threads")
        if value.mode == "exact" and threads is not None and threads != 1:
            raise make_conflict(
                f"exact mode needs threads = 1, not {threads}, since gradients differ "
                "between thread counts: raise lanes (micro-batches computed side by "
                "side) to use more cores",
                "reduction.mode",
                "threads",
            )
        return value


def list_recipes() -> list[str]:
    """List the names of the recipes that ship with distrain."""
    return sorted(path.stem for path in _RECIPES_FOLDER.glob("*.yaml"))


def load_config(
    path: str | Path,
    overrides: Sequence[str | OptionOverride] = (),
) -> Config:
    """Load the config of a recipe, with `key.sub=value` overrides.

    Args:
        path: YAML file, or the name of a recipe that ships with distrain (see
            `list_recipes`); a file of that name takes precedence.
        overrides: changes to the recipe, applied in this order.

    Raises:
        UserError: naming every problem at once.
    """
    path = Path(expand_home(str(path)))
    file = path
    if not path.is_file() and str(path) in list_recipes():
        file = _RECIPES_FOLDER / f"{path}.yaml"
    try:
        tree = parse_mapping(file.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(_format_unknown_recipe(path)) from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder, not a recipe: to resume a run, repeat the command "
            "that started it"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not a recipe, since it is not a text in UTF-8: check the path"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    config = parse_config(tree, str(path), overrides)
    # After the overrides, one of which may be `run=null`.
    if config.run is None:
        config = config.model_copy(update={"run": f"runs/{path.stem}"})
    return config


def parse_config(
    tree: dict[str, Any],
    origin: str,
    overrides: Sequence[str | OptionOverride] = (),
) -> Config:
    """Build a config from a tree of plain values and overrides.

    `origin` names the tree in messages.

    Raises:
        UserError: naming every problem at once.
    """
    return parse_section(Config, tree, origin, overrides)


def parse_config_yaml(
    text: str,
    origin: str,
    overrides: Sequence[str | OptionOverride] = (),
    *,
    run: str | None = None,
) -> Config:
    """Build a config from YAML text and overrides.

    Args:
        text: YAML of a config.
        origin: name of the text in messages.
        overrides: changes to the config, applied in this order.
        run: run directory in place of the text's; None: the text's.

    Raises:
        UserError: naming every problem at once.
    """
    tree = parse_mapping(text, origin)
    if run is not None:
        tree["run"] = run
    config = parse_config(tree, origin, overrides)
    # An override may be `run=null`.
    if config.run is None:
        config = config.model_copy(update={"run": run})
    return config


def check_is_config(value: object, caller: str) -> None:
    """Raise UserError if a caller was given something else, such as a recipe's name."""
    if not isinstance(value, Config):
        raise UserError(
            f"{caller} takes a Config, not {value!r}: load a recipe with "
            "distrain.load_config"
        )


def override_config(
    config: Config,
    overrides: Sequence[str | OptionOverride],
) -> Config:
    """Return a config with `key.sub=value` overrides applied, and validated again.

    Raises:
        UserError: naming every problem at once.
    """
    check_is_config(config, "override_config")
    return parse_config(config.model_dump(mode="json"), "the config", overrides)


def format_workers_override(
    workers: int | str | None, name: str = "--workers "
) -> list[OptionOverride]:
    """Format the override for a number of workers, auto, N or MIN-MAX; None: none.

    Args:
        workers: the value.
        name: what stands before the value in messages.

    Raises:
        UserError: the value has another form.
    """
    if workers is None:
        return []
    workers = str(workers)
    option = f"{name}{workers}"
    if workers == "auto":
        return [OptionOverride(option, "cluster.workers=auto")]
    limits = re.fullmatch(r"0*([1-9]\d*)(?:-0*([1-9]\d*))?", workers, re.ASCII)
    if limits is None:
        raise UserError(
            f"{option} is not a number of workers: use auto, N (at least 1) or MIN-MAX"
        )
    least, most = limits.groups()
    if most is None:
        return [OptionOverride(option, f"cluster.workers={least}")]
    if int(least) > int(most):
        raise UserError(
            f"{option} has a minimum above its maximum: use {name}{most}-{least}"
        )
    return [OptionOverride(option, f"cluster.workers=[{least}, {most}]")]


def to_yaml(config: Config) -> str:
    """Dump the resolved config as YAML; `load_config` reads an equal one from it."""
    check_is_config(config, "to_yaml")
    return dump_yaml(config.model_dump(mode="json"))


def _format_unknown_recipe(path: Path) -> str:
    """Name the recipes that ship with distrain, and the one that may be meant."""
    recipes = list_recipes()
    near = difflib.get_close_matches(path.stem, recipes, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "check the path"
    return (
        f"no recipe {path}: neither a file nor one that ships with distrain "
        f"({', '.join(recipes)}); {hint}"
    )
