"""The configuration: one tree of frozen models, one YAML a recipe, `key.sub=value` overrides.

Every field is marked *result* (it decides the weights: a resume that changes one is refused) or *operation* (where,
how fast and how safely the run goes on: free to change at any time).
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, SerializeAsAny, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distrain.data.config import Augment, Data
from distrain.data.storage.url import without_secret
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.fields import Choice, Section, operation, result
from distrain.losses import CrossEntropy, Loss
from distrain.models.alexnet import AlexNet
from distrain.models.model import Model
from distrain.monitor.config import Log, Metrics
from distrain.optim import adam, lars  # noqa: F401 - known by name once they are imported
from distrain.optim.config import Reduction
from distrain.optim.rule import UpdateRule
from distrain.optim.schedule import Schedule
from distrain.optim.sgd import SGD


class Evaluate(Section):
    """Validation: centre crop, each image once."""

    every: int | None = operation(None, ge=1)
    """Steps between evaluations; null: once an epoch. The last step is always evaluated. [operation]"""
    batch: int = result(128, ge=1)
    """Samples of one fixed chunk. [result]"""


class Checkpoint(Section):
    """What is kept of the run."""

    every: int | None = operation(None, ge=1)
    """Steps between checkpoints; null: once an epoch. The last step is always kept. [operation]"""
    keep: int = operation(2, ge=1)
    """Newest checkpoints kept, beside the best. [operation]"""
    patience: float = operation(120.0, ge=0)
    """Seconds for which a save that fails is tried again before the attempt ends. [operation]"""


class Config(Section):
    """A run."""

    run: str | None = operation(None)
    """Run directory, a path or any fsspec URL; null: runs/<name of the recipe>. [operation]"""
    seed: int = result(0, ge=0, lt=1 << 32)
    """Seed of weights, order, draws and dropout. [result]"""
    epochs: int = result(90, ge=1)
    """Passes over the training set. [result]"""
    global_batch: int = result(128, ge=1)
    """Samples of one optimizer step. [result]"""
    virtual_workers: int = result(8, ge=1)
    """V: equal parts of the global batch. As many ranks can share the work; fixed for the run. [result]"""
    precision: Literal["fp32", "tf32", "bf16"] = result("fp32")
    """Arithmetic of forward and backward; weights and moments are fp32. [result]"""
    threads: int = result(1, ge=1)
    """CPU threads that compute one virtual worker; 1 in exact mode. [result]"""
    device: Literal["auto", "cpu", "cuda"] = operation("auto")
    """auto: a GPU where there is one. [operation]"""
    lanes: int | None = operation(None, ge=1)
    """Virtual workers computed side by side; null: one a core on a CPU, 1 on a GPU. [operation]"""
    data: Data
    """Samples."""
    augment: Augment = Augment()
    """Augmentation."""
    model: Annotated[SerializeAsAny[Model], BeforeValidator(Model.choose)] = AlexNet()
    """Network."""
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(Loss.choose)] = CrossEntropy()
    """Loss."""
    optimizer: Annotated[SerializeAsAny[UpdateRule], BeforeValidator(UpdateRule.choose)] = SGD()
    """Optimizer."""
    schedule: Annotated[SerializeAsAny[Schedule], BeforeValidator(Schedule.choose)]
    """Learning rate."""
    reduction: Reduction = Reduction()
    """Gradient reduction."""
    evaluate: Evaluate = Evaluate()
    """Validation."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    log: Log = Log()
    """Metrics."""
    metrics: Metrics = Metrics()
    """Prometheus."""
    cluster: Cluster = Cluster()
    """Ranks."""

    @property
    def micro_batch(self) -> int:
        """b, samples of one virtual worker in one step."""
        return self.global_batch // self.virtual_workers

    @field_validator("run")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        return without_secret(value)

    # Checks across fields hang on single fields, so that they are reported together with all other problems.

    @field_validator("virtual_workers")
    @classmethod
    def _divides_global_batch(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch")
        if batch is not None and batch % value:
            near = [v for v in range(1, batch + 1) if batch % v == 0]
            best = min(near, key=lambda v: abs(v - value))
            raise ValueError(f"{value} does not divide global_batch = {batch}: use {best}, or another global_batch")
        return value

    @field_validator("model")
    @classmethod
    def _crop_is_large_enough(cls, value: Model, info: ValidationInfo) -> Model:
        least = value.min_crop
        augment = info.data.get("augment")
        if augment is not None and augment.crop < least:
            raise ValueError(f"{value.name} needs augment.crop of at least {least} pixels, not {augment.crop}")
        return value

    @field_validator("augment")
    @classmethod
    def _crop_fits(cls, value: Augment) -> Augment:
        if value.short_side is not None and value.short_side < value.crop:
            raise ValueError(f"short_side = {value.short_side} is less than crop = {value.crop}: raise it")
        return value

    @field_validator("schedule")
    @classmethod
    def _has_what_to_watch(cls, value: Schedule, info: ValidationInfo) -> Schedule:
        data = info.data.get("data")
        if value.follows_validation and data is not None and data.val is None:
            raise ValueError(f"{value.name} watches the validation error: set data.val")
        return value

    @field_validator("log")
    @classmethod
    def _events_are_on_a_disk(cls, value: Log, info: ValidationInfo) -> Log:
        run = info.data.get("run") or ""
        if value.tensorboard and "://" in run and not run.startswith("file://"):
            raise ValueError("tensorboard needs a run directory on a disk: use mlflow, or another run=...")
        return value

    @field_validator("cluster")
    @classmethod
    def _ranks_have_work(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        if value.workers == "auto":
            return value
        least, most = value.workers
        virtual = info.data.get("virtual_workers")
        if least > most:
            raise ValueError(f"workers = [{least}, {most}] has more at least than at most: swap them")
        if virtual is not None and most > virtual:
            raise ValueError(f"workers = {most} is more than virtual_workers = {virtual}: a rank would have no work")
        return value

    @field_validator("reduction")
    @classmethod
    def _exact_is_possible(cls, value: Reduction, info: ValidationInfo) -> Reduction:
        threads = info.data.get("threads")
        if value.mode == "exact" and threads is not None and threads != 1:
            raise ValueError(
                f"exact needs threads = 1, not {threads}, since gradients differ between thread counts: "
                "raise lanes to use more cores"
            )
        return value


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads 1e-3 as a string."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key.sub=value` overrides.

    Raises:
        UserError: naming every problem at once.
    """
    path = Path(path)
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"no config at {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys, not {type(tree).__name__}")
    if tree.get("run") is None:
        tree["run"] = f"runs/{path.stem}"
    return parse(tree, str(path), overrides)


def parse(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Apply `key.sub=value` overrides to a tree of plain values, and validate it.

    Raises:
        UserError: naming every problem at once.
    """
    tree = deepcopy(tree)
    found = [problem for text in overrides if (problem := _override(tree, text))]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found += [_sentence(dict(e), tree) for e in error.errors()]
    if found:
        lines = "".join(f"\n  - {line}" for line in found)
        raise UserError(f"{origin} has {len(found)} problem{'s' * (len(found) > 1)}:{lines}")
    return config


def parse_yaml(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """The same of a text. Raises UserError."""
    tree = _parse(text, origin)
    if not isinstance(tree, dict):
        raise UserError(f"{origin} must hold a mapping of keys, not {type(tree).__name__}")
    return parse(tree, origin, overrides)


def workers_override(workers: str | None) -> list[str]:
    """The override that --workers N or --workers MIN-MAX stands for."""
    if workers is None:
        return []
    return [f"cluster.workers=[{', '.join(workers.split('-'))}]" if "-" in workers else f"cluster.workers={workers}"]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, which `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaves(config: Config) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Every field that is not a section: (dotted key, value, field)."""
    yield from _leaves(config, "")


def result_fields(config: Config) -> dict[str, Any]:
    """The fields that decide the weights, by dotted key, as JSON values."""
    plain = config.model_dump(mode="json")
    fields = {}
    for key, _ in _result_leaves(config):
        node: Any = plain
        for part in key.split("."):
            node = node[part]
        fields[key] = node
    return fields


def result_defaults(config: Config) -> dict[str, Any]:
    """The defaults of the result fields, where they have one, as JSON values."""
    return {
        key: to_jsonable_python(info.get_default(call_default_factory=True, validated_data={}))
        for key, info in _result_leaves(config)
        if not info.is_required()
    }


def _result_leaves(config: Config) -> Iterator[tuple[str, FieldInfo]]:
    for key, _, info in leaves(config):
        marks = info.json_schema_extra
        # A user's own form may leave fields unmarked: they decide.
        if not isinstance(marks, dict) or marks.get("decides", "result") == "result":
            yield key, info


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, FieldInfo]]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, info


def _parse(text: str, origin: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one override to the tree; the problem, if there is one."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"override {text!r} is not of the form key.sub=value"
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"override {text!r}: {parent} is a value, not a section"
    try:
        node[last] = _parse(value, f"override {text!r}")
    except UserError as error:
        return str(error)
    return None


def _sentence(error: dict[str, Any], tree: dict[str, Any]) -> str:
    """One problem of pydantic's with a tree, as one line."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys(Config)
        if key in known:
            kind = Config.model_fields[path[0]].annotation
            assert isinstance(kind, type)
            assert issubclass(kind, Choice)
            return f"{path[0]} {tree[path[0]].get('name', kind.default)} does not use {key}: remove it"
        known = _keys_of_own_form(path[0], tree) + known
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.split(".")[-1] == path[-1]][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "no_choice":
        return f"{key}.name: {error['msg']}"
    if error["type"] == "no_section":
        return f"{key}: {error['msg']}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}"


def _keys_of_own_form(section: str, tree: dict[str, Any]) -> list[str]:
    """All dotted keys of the form that a tree names in a section, known or not; none if it is no choice."""
    info = Config.model_fields.get(section)
    if info is None or not isinstance(info.annotation, type) or not issubclass(info.annotation, Choice):
        return []
    form = info.annotation.named(tree[section].get("name", info.annotation.default))
    return [f"{section}.{key}" for key in _keys(form)]


def _keys(section: type[BaseModel]) -> list[str]:
    """All dotted keys below a section, those of every form of a choice included."""
    keys = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Choice):
            members: list[type[BaseModel]] = kind.members()
        else:
            members = [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []
        below = [f"{name}.{key}" for member in members for key in _keys(member)]
        keys += below or [name]
    return keys
