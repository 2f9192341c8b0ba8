"""Data-parallel AlexNet training whose result does not depend on the cluster.

The names below, in `__all__`, are the stable interface: their arguments and the fields
of what they return go away or change their meaning only with a new major version, and
CHANGELOG.md says how. Read results by field name: fields may be added. Texts are for
people, and may change. Config keys, file formats and names of metrics are stable as
well. Everything else is internal.

    load_config, Config, to_yaml          recipes, with overrides
    override_config, list_recipes         a changed config; recipes that are shipped
    Model, Loss, UpdateRule, Schedule     base classes of your own, and what declares
    result_field, operation_field         their fields (configs/README.md)
    Console, PlainConsole, SilentConsole  where progress is printed
    Summary, Dataset                      what train returns; samples by number
    Evaluation, ExportResult              what evaluate and export return
    Report, Comparison                    what report and compare return
    UserError, RunError, AttemptError     the caller's mistake; the run or one attempt
                                          of it failed

Each command has a function of its name, whose arguments are named like the options
(`files` is --with; what only concerns the terminal, --max-rejects, --every and submit's
--follow, has none):

    train, dry_run, lr, model, schema     train a recipe, or look at it first
    evaluate (eval), Predictor (predict)  use a trained model
    export                                for other programs, with a proof
    report, compare                       a page on a run, or on several
    submit, resume, jobs, logs, stop      runs as jobs on a cluster
    drain, top                            a node that goes; a run as it trains
    pack, index, stats, verify, inspect   data sets
    bench_data                            the speed of the loader alone

Importing the package loads none of torch, Ray, DALI and pyarrow: each name loads what
it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain.config import (
        Config,
        list_recipes,
        load_config,
        override_config,
        to_yaml,
    )
    from distrain.config_schema import schema
    from distrain.data.prepare.commands import index, pack, stats
    from distrain.data.prepare.examine import inspect, verify
    from distrain.data.shards.dataset import Dataset
    from distrain.errors import AttemptError, RunError, UserError
    from distrain.exporting.export import ExportResult, export
    from distrain.fields import operation_field, result_field
    from distrain.inference.evaluation import Evaluation
    from distrain.inference.predictor import Predictor
    from distrain.launch.drain import drain
    from distrain.launch.dry_run import dry_run
    from distrain.launch.evaluation import evaluate
    from distrain.launch.jobs import jobs, logs, resume, stop, submit
    from distrain.launch.launcher import train
    from distrain.losses import Loss
    from distrain.models.model import Model
    from distrain.monitor.sinks import Console, PlainConsole, SilentConsole
    from distrain.monitor.top import top
    from distrain.optim.schedule import Schedule
    from distrain.optim.update_rule import UpdateRule
    from distrain.reports.comparison import Comparison, compare
    from distrain.reports.run_report import Report, report
    from distrain.trainer import Summary
    from distrain.training.bench_data import bench_data
    from distrain.training.lr_curve import lr
    from distrain.training.model_table import model

__version__ = "0.1.0"

__all__ = [
    "AttemptError",
    "Comparison",
    "Config",
    "Console",
    "Dataset",
    "Evaluation",
    "ExportResult",
    "Loss",
    "Model",
    "PlainConsole",
    "Predictor",
    "Report",
    "RunError",
    "Schedule",
    "SilentConsole",
    "Summary",
    "UpdateRule",
    "UserError",
    "bench_data",
    "compare",
    "drain",
    "dry_run",
    "evaluate",
    "export",
    "index",
    "inspect",
    "jobs",
    "list_recipes",
    "load_config",
    "logs",
    "lr",
    "model",
    "operation_field",
    "override_config",
    "pack",
    "report",
    "result_field",
    "resume",
    "schema",
    "stats",
    "stop",
    "submit",
    "to_yaml",
    "top",
    "train",
    "verify",
]

# No module of the package may have one of these names: importing it would put the
# module in the place of the function.
_MODULES = {
    "distrain.config": (
        "Config",
        "list_recipes",
        "load_config",
        "override_config",
        "to_yaml",
    ),
    "distrain.config_schema": ("schema",),
    "distrain.data.prepare.commands": ("index", "pack", "stats"),
    "distrain.data.prepare.examine": ("inspect", "verify"),
    "distrain.data.shards.dataset": ("Dataset",),
    "distrain.errors": ("AttemptError", "RunError", "UserError"),
    "distrain.exporting.export": ("ExportResult", "export"),
    "distrain.fields": ("operation_field", "result_field"),
    "distrain.inference.evaluation": ("Evaluation",),
    "distrain.inference.predictor": ("Predictor",),
    "distrain.launch.drain": ("drain",),
    "distrain.launch.dry_run": ("dry_run",),
    "distrain.launch.evaluation": ("evaluate",),
    "distrain.launch.jobs": ("jobs", "logs", "resume", "stop", "submit"),
    "distrain.launch.launcher": ("train",),
    "distrain.losses": ("Loss",),
    "distrain.models.model": ("Model",),
    "distrain.monitor.sinks": ("Console", "PlainConsole", "SilentConsole"),
    "distrain.monitor.top": ("top",),
    "distrain.optim.schedule": ("Schedule",),
    "distrain.optim.update_rule": ("UpdateRule",),
    "distrain.reports.comparison": ("Comparison", "compare"),
    "distrain.reports.run_report": ("Report", "report"),
    "distrain.trainer": ("Summary",),
    "distrain.training.bench_data": ("bench_data",),
    "distrain.training.lr_curve": ("lr",),
    "distrain.training.model_table": ("model",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, for completion in a shell."""
    return [*__all__, "__version__"]
