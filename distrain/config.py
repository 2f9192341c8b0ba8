"""The configuration: one tree of frozen models, one YAML a recipe, `key.sub=value` overrides.

Every field is marked *result* (it decides the weights: a resume that changes one is refused) or *operation* (where,
how fast and how safely the run goes on: free to change at any time).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distrain.data.config import Augment, DataConfig
from distrain.data.storage.url import forbid_url_secrets
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.fields import Section, operation_field, result_field
from distrain.losses import CrossEntropy, Loss
from distrain.models.alexnet import AlexNet
from distrain.models.model import Model
from distrain.monitor.config import LogConfig, MetricsConfig
from distrain.optim import adam, lars  # noqa: F401 - known by name once they are imported
from distrain.optim.config import Reduction
from distrain.optim.schedule import Schedule
from distrain.optim.sgd import SGD
from distrain.optim.update_rule import UpdateRule
from distrain.parsing import parse_mapping, parse_section

AnyModel = Annotated[SerializeAsAny[Model], BeforeValidator(Model.parse_choice)]


class EvaluateConfig(Section):
    """Validation: centre crop, each image once."""

    every: int | None = operation_field(None, ge=1)
    """Steps between evaluations; null: once an epoch. The last step is always evaluated. [operation]"""
    batch: int = result_field(128, ge=1)
    """Samples of one fixed chunk. [result]"""


class CheckpointConfig(Section):
    """What is kept of the run."""

    every: int | None = operation_field(None, ge=1)
    """Steps between checkpoints; null: once an epoch. The last step is always kept. [operation]"""
    keep: int = operation_field(2, ge=1)
    """Newest checkpoints kept, beside the best. [operation]"""
    patience: float = operation_field(120.0, ge=0)
    """Seconds for which a save that fails is tried again before the attempt ends. [operation]"""


class Config(Section):
    """A run."""

    run: str | None = operation_field(None)
    """Run directory, a path or any fsspec URL; null: runs/<name of the recipe>. [operation]"""
    seed: int = result_field(0, ge=0, lt=1 << 32)
    """Seed of weights, order, draws and dropout. [result]"""
    epochs: int = result_field(90, ge=1)
    """Passes over the training set. [result]"""
    global_batch: int = result_field(128, ge=1)
    """Samples of one optimizer step. [result]"""
    virtual_workers: int = result_field(8, ge=1)
    """V: equal parts of the global batch. As many ranks can share the work; fixed for the run. [result]"""
    precision: Literal["fp32", "tf32", "bf16"] = result_field("fp32")
    """Arithmetic of forward and backward; weights and moments are fp32. [result]"""
    threads: int = result_field(1, ge=1)
    """CPU threads that compute one virtual worker; 1 in exact mode. [result]"""
    device: Literal["auto", "cpu", "cuda"] = operation_field("auto")
    """auto: a GPU where there is one. [operation]"""
    lanes: int | None = operation_field(None, ge=1)
    """Virtual workers computed side by side; null: one a core on a CPU, 1 on a GPU. [operation]"""
    data: DataConfig
    """Samples."""
    augment: Augment = Augment()
    """Augmentation."""
    model: AnyModel = AlexNet()
    """Network."""
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(Loss.parse_choice)] = (
        CrossEntropy()
    )
    """Loss."""
    optimizer: Annotated[
        SerializeAsAny[UpdateRule], BeforeValidator(UpdateRule.parse_choice)
    ] = SGD()
    """Optimizer."""
    schedule: Annotated[
        SerializeAsAny[Schedule], BeforeValidator(Schedule.parse_choice)
    ]
    """Learning rate."""
    reduction: Reduction = Reduction()
    """Gradient reduction."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Metrics."""
    metrics: MetricsConfig = MetricsConfig()
    """Prometheus."""
    cluster: Cluster = Cluster()
    """Ranks."""

    @property
    def micro_batch_size(self) -> int:
        """b, samples of one virtual worker in one step."""
        return self.global_batch // self.virtual_workers

    @field_validator("run")
    @classmethod
    def _check_no_secret(cls, value: str | None) -> str | None:
        return forbid_url_secrets(value)

    # Checks across fields hang on single fields, so that they are reported together with all other problems.

    @field_validator("virtual_workers")
    @classmethod
    def _check_virtual_workers(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch")
        if batch is not None and batch % value:
            near = [v for v in range(1, batch + 1) if batch % v == 0]
            best = min(near, key=lambda v: abs(v - value))
            raise ValueError(
                f"{value} does not divide global_batch = {batch}: use {best}, or another global_batch"
            )
        return value

    @field_validator("model")
    @classmethod
    def _check_model_crop(cls, value: Model, info: ValidationInfo) -> Model:
        augment = info.data.get("augment")
        if augment is not None:
            value.check_crop(augment.crop)
        return value

    @field_validator("schedule")
    @classmethod
    def _check_validation_data(cls, value: Schedule, info: ValidationInfo) -> Schedule:
        data = info.data.get("data")
        if value.follows_validation and data is not None and data.val is None:
            raise ValueError(f"{value.name} watches the validation error: set data.val")
        return value

    @field_validator("log")
    @classmethod
    def _check_tensorboard_path(
        cls, value: LogConfig, info: ValidationInfo
    ) -> LogConfig:
        run = info.data.get("run") or ""
        if value.tensorboard and "://" in run and not run.startswith("file://"):
            raise ValueError(
                "tensorboard needs a run directory on a disk: use mlflow, or another run=..."
            )
        return value

    @field_validator("cluster")
    @classmethod
    def _check_worker_limits(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        if value.workers == "auto":
            return value
        least, most = value.workers
        virtual = info.data.get("virtual_workers")
        if least > most:
            raise ValueError(
                f"workers = [{least}, {most}] has more at least than at most: swap them"
            )
        if virtual is not None and most > virtual:
            raise ValueError(
                f"workers = {most} is more than virtual_workers = {virtual}: a rank would have no work"
            )
        return value

    @field_validator("reduction")
    @classmethod
    def _check_exact_threads(cls, value: Reduction, info: ValidationInfo) -> Reduction:
        threads = info.data.get("threads")
        if value.mode == "exact" and threads is not None and threads != 1:
            raise ValueError(
                f"exact needs threads = 1, not {threads}, since gradients differ between thread counts: "
                "raise lanes to use more cores"
            )
        return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key.sub=value` overrides.

    Raises:
        UserError: naming every problem at once.
    """
    path = Path(path)
    try:
        tree = parse_mapping(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"no config at {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    if tree.get("run") is None:
        tree["run"] = f"runs/{path.stem}"
    return parse_config(tree, str(path), overrides)


def parse_config(
    tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()
) -> Config:
    """Make a run's config of a tree of plain values and overrides. Raises UserError naming every problem."""
    return parse_section(Config, tree, origin, overrides)


def parse_config_yaml(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """Make a run's config of YAML and overrides. Raises UserError naming every problem."""
    return parse_config(parse_mapping(text, origin), origin, overrides)


def format_workers_override(workers: str | None) -> list[str]:
    """The override that --workers N or --workers MIN-MAX stands for."""
    if workers is None:
        return []
    return [
        f"cluster.workers=[{', '.join(workers.split('-'))}]"
        if "-" in workers
        else f"cluster.workers={workers}"
    ]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, which `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def iterate_fields(config: Config) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Every field that is not a section: (dotted key, value, field)."""
    yield from _iterate_section_fields(config, "")


def get_result_fields(config: Config) -> dict[str, Any]:
    """The fields that decide the weights, by dotted key, as JSON values."""
    plain = config.model_dump(mode="json")
    fields = {}
    for key, _ in _iterate_result_fields(config):
        node: Any = plain
        for part in key.split("."):
            node = node[part]
        fields[key] = node
    return fields


def get_result_defaults(config: Config) -> dict[str, Any]:
    """The defaults of the result fields, where they have one, as JSON values."""
    return {
        key: to_jsonable_python(
            info.get_default(call_default_factory=True, validated_data={})
        )
        for key, info in _iterate_result_fields(config)
        if not info.is_required()
    }


def _iterate_result_fields(config: Config) -> Iterator[tuple[str, FieldInfo]]:
    for key, _, info in iterate_fields(config):
        marks = info.json_schema_extra
        # A user's own form may leave fields unmarked: they decide.
        if not isinstance(marks, dict) or marks.get("decides", "result") == "result":
            yield key, info


def _iterate_section_fields(
    section: BaseModel, prefix: str
) -> Iterator[tuple[str, Any, FieldInfo]]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _iterate_section_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, info
