"""Export a trained model to a folder, with its proof and its card."""

import hashlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import distrain
from distrain.config import to_yaml
from distrain.data.storage.store import Store
from distrain.data.storage.url import join_url
from distrain.errors import RunError, UserError
from distrain.exporting.formats import ExportFormat, get_format
from distrain.exporting.model_card import write_model_card
from distrain.exporting.proof import Proof, prove_export
from distrain.inference.evaluation import Evaluation
from distrain.inference.predictor import Predictor
from distrain.inference.trained_model import TrainedModel
from distrain.launch.evaluation import evaluate
from distrain.monitor.sinks import Console, SilentConsole
from distrain.rundir import files
from distrain.rundir.export_folder import (
    CARD_FILE,
    EXPORT_FILE,
    ExportManifest,
    FileEntry,
)

# Exported files compute in single precision, wherever they run.
_FIXED_FIELDS = {"device": "cpu", "precision": "fp32"}
_RETRY_SECONDS = 120.0
_MAX_NAMES = 10


@dataclass(frozen=True, eq=False)
class ExportResult:
    """Exported model."""

    folder: str
    """Path of the exported folder."""
    file: str
    """Path of the model's file in it."""
    num_bytes: int
    """Size of that file."""
    evaluation: Evaluation
    """Accuracy of the model, as its card states it."""
    proof: Proof
    """Agreement of the file with distrain."""
    uploaded: str | None
    """URL of the copy, without credentials."""


def export(
    model: str | Path,
    format: str = "safetensors",
    *,
    to: str | Path | None = None,
    data: str | Path | None = None,
    checkpoint: str | int = "newest",
    overrides: Sequence[str] = (),
    upload: str | None = None,
    console: Console | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ExportResult:
    """Export a trained model for other programs, and prove that it agrees.

    The model is evaluated, written, loaded in its own runtime, and run on the images of
    the evaluation. The folder holds the model's file, `model.json`, `config.yaml`, a
    model card (`README.md`) and, last, `export.json`.

    Args:
        model: run directory, or a folder in its `checkpoints` (path or URL).
        format: safetensors (weights for distrain), torchvision (weights for a network
            of torchvision), onnx or torch-export (graphs from an image of any size to
            probabilities).
        to: folder to write. Default: `exports/RUN-FORMAT`. An earlier export is
            replaced.
        data: packed or indexed data set for accuracy and proof (path or URL). Default:
            the validation set of the model's run.
        checkpoint: which checkpoint of a run directory: "newest", "best" (by its top-1
            in validation), or the number of a step.
        overrides: `key.sub=value` changes to fields of the run's config that do not
            decide the weights, such as lanes or data.backend. It is computed on the
            CPU, in fp32.
        upload: copy the folder to this path or URL, too.
        console: where warnings are printed. Default: nowhere.
        on_progress: gets the stage, the number of images done, and that of all.

    Raises:
        UserError: there is no such checkpoint or format, the network has no form in the
            format, a package is missing, or the folder holds something else.
        RunError: the exported file disagrees with distrain: the folder shows where.
        AttemptError: the data cannot be read.
    """
    console = console or SilentConsole()
    report = on_progress or (lambda stage, done, total: None)
    # Find out what cannot work before any work.
    export_format = get_format(format)
    export_format.check_packages()
    overrides = _fix_overrides(overrides)
    predictor = Predictor(model, checkpoint=checkpoint, overrides=overrides)
    trained = predictor.model
    for note in trained.notes:
        console.log(f"{note}: exporting {trained.origin.checkpoint}")
    export_format.check_model(trained)
    run_name = trained.origin.run.rstrip("/").rpartition("/")[2]
    folder = str(to or Path("exports") / f"{run_name}-{export_format.name}")
    targets = [Store(folder)] + ([Store(upload)] if upload else [])
    for target in targets:
        _check_target(target)

    # Evaluate the model, write it, and compare.
    evaluation = evaluate(
        trained.url,
        data,
        overrides=overrides,
        console=console,
        on_progress=lambda done, total: report("evaluate", done, total),
    )
    name = Path(folder).name
    with tempfile.TemporaryDirectory(prefix="distrain-export-") as temporary:
        built = Path(temporary)
        export_format.write(trained, built)
        proof = _prove(predictor, export_format, built, evaluation, data, report)
        card = write_model_card(name, trained, export_format, evaluation, proof)
        (built / CARD_FILE).write_text(card, encoding="utf-8")
        (built / files.MODEL_FILE).write_text(trained.info.to_json(), encoding="utf-8")
        config = to_yaml(trained.trained_config)
        (built / files.CONFIG_FILE).write_text(config, encoding="utf-8")
        manifest = _make_manifest(built, trained, export_format, evaluation, proof)
        _publish(built, manifest, targets[0])
        _check_proof(proof, export_format, targets[0])
        for target in targets[1:]:
            _publish(built, manifest, target)
    return ExportResult(
        folder=targets[0].redacted_url,
        file=join_url(targets[0].redacted_url, export_format.file),
        num_bytes=manifest.files[export_format.file].bytes,
        evaluation=evaluation,
        proof=proof,
        uploaded=targets[-1].redacted_url if upload else None,
    )


def _fix_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with those of device and precision.

    Raises:
        UserError: they have another device or precision.
    """
    fixed = [f"{key}={value}" for key, value in _FIXED_FIELDS.items()]
    for override in overrides:
        if override.partition("=")[0] in _FIXED_FIELDS and override not in fixed:
            raise UserError(
                f"an export computes with {' and '.join(fixed)}: remove {override}"
            )
    return [*overrides, *fixed]


def _check_target(store: Store) -> None:
    """Raise UserError if a folder holds something else than an exported model."""
    if store.list_names() and not store.exists(EXPORT_FILE):
        raise UserError(
            f"{store.redacted_url} is not empty, and not an exported model: name "
            "another folder"
        )


def _prove(
    predictor: Predictor,
    export_format: ExportFormat,
    folder: Path,
    evaluation: Evaluation,
    data: str | Path | None,
    report: Callable[[str, int, int], None],
) -> Proof:
    """Load the exported file, and compare it on the images of the evaluation."""
    total = len(evaluation.images.labels)
    num_done = 0
    lock = threading.Lock()

    def count_images(count: int) -> None:
        nonlocal num_done
        with lock:
            num_done += count
            report("compare", num_done, total)

    report("compare", 0, total)
    runtime = export_format.load(predictor.model, folder)
    data_url = str(data or predictor.model.config.data.val)
    return prove_export(predictor, export_format, runtime, data_url, count_images)


def _make_manifest(
    folder: Path,
    model: TrainedModel,
    export_format: ExportFormat,
    evaluation: Evaluation,
    proof: Proof,
) -> ExportManifest:
    """Return the content of `export.json` for the files in a folder."""
    entries = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        entries[path.name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    origin = model.origin._asdict()
    return ExportManifest(
        distrain=distrain.__version__,
        export_format=export_format.name,
        model={**origin, "environment": dict(model.origin.environment)},
        evaluation=evaluation.to_dict(),
        proof=proof.to_dict(),
        files=entries,
    )


def _publish(folder: Path, manifest: ExportManifest, store: Store) -> None:
    """Write the files of an exported folder, and `export.json` last.

    An earlier export is replaced: without its `export.json`, which goes first, half of
    each would not look like a whole one.
    """
    if store.exists(EXPORT_FILE):
        store.remove(EXPORT_FILE)
        for name in store.list_names():
            if name not in manifest.files:
                store.remove(name)
    for name in manifest.files:
        data = (folder / name).read_bytes()
        store.write(name, data, retry_seconds=_RETRY_SECONDS)
    store.write(EXPORT_FILE, manifest.to_json().encode(), retry_seconds=_RETRY_SECONDS)


def _check_proof(proof: Proof, export_format: ExportFormat, store: Store) -> None:
    """Raise RunError if an exported file disagrees with distrain."""
    if proof.passed:
        return
    if not proof.stored.images + proof.resized.images:
        raise RunError(
            f"{store.redacted_url}/{export_format.file} is not proved, since none of "
            "the images could be decoded: name another data set (--data)"
        )
    names = [*proof.stored.disagreeing, *proof.resized.disagreeing]
    shown = ", ".join(names[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    raise RunError(
        f"{store.redacted_url}/{export_format.file} disagrees with distrain on "
        f"{len(names):,} images ({shown}{more}): do not use it; {EXPORT_FILE} beside "
        "it has the differences"
    )
