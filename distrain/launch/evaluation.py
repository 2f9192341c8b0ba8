"""Evaluate models where the arguments say: in this process, or by workers of Ray."""

from collections.abc import Callable, Sequence
from pathlib import Path

from distrain.config import Config, format_workers_override
from distrain.data.shards.dataset import Dataset
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.inference.ensemble import CROPS, Crops
from distrain.inference.evaluation import Evaluation
from distrain.inference.image_table import ImageTable
from distrain.inference.scoring import EvalPart, evaluate_part, fit_to_images
from distrain.inference.trained_model import TrainedModel, open_trained_model
from distrain.launch.eval_request import EvalRequest, make_eval_world
from distrain.launch.local import compute_local_allocation, count_local_ranks
from distrain.monitor.sinks import Console
from distrain.monitor.terminal import create_console
from distrain.parsing import OptionOverride, parse_section
from distrain.training.run_data import open_dataset


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    checkpoint: str | int = "newest",
    crops: str = "center",
    overrides: Sequence[str] = (),
    workers: int | str | None = None,
    address: str | None = None,
    console: Console | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a trained model, or the average of several, on a data set.

    Each image counts once. The result is the same, to the last digit, for any number of
    workers, lanes and threads on hardware of one kind, and equals what training
    reported for the same checkpoint.

    Args:
        models: run directory, a folder in its `checkpoints`, or an exported folder
            (path or URL). Of several, the class probabilities are averaged, as for the
            paper's ensembles of five and seven networks.
        data: packed or indexed data set (path or URL). Default: the validation set of
            the first model's run.
        checkpoint: which checkpoint of a run directory: "newest", "best" (by its top-1
            in validation), or the number of a step.
        crops: "center", as in validation; or "ten": the four corners and the center,
            and their mirror images, whose probabilities are averaged.
        overrides: `key.sub=value` changes to fields of the run's config that do not
            decide the weights, such as lanes, device or data.backend.
        workers: "auto" (one per GPU), or a number of workers of Ray's.
        address: evaluate on this Ray cluster: "auto", HOST:PORT or ray://HOST:PORT.
            Default: this machine.
        console: where lines are printed. Default: stdout.
        on_progress: gets the number of images done, and that of all.

    Raises:
        UserError: models, data and arguments do not fit together.
        RunError: a checkpoint has another format, or the Ray cluster was lost.
        AttemptError: the data cannot be read.
    """
    urls = [models] if isinstance(models, str | Path) else list(models)
    if not urls:
        raise UserError("there is no model to evaluate: name a run directory")
    if crops not in CROPS:
        raise UserError(f"crops {crops!r} is not one of {', '.join(CROPS)}")
    console = console or create_console()
    opened = [
        open_trained_model(str(url), checkpoint=checkpoint, overrides=overrides)
        for url in urls
    ]
    for model in opened:
        for note in model.notes:
            console.log(f"{note}: evaluating {model.origin.checkpoint}")

    # Which data, and how many workers.
    first = opened[0]
    data_url = str(data or first.config.data.val or "")
    if not data_url:
        raise UserError(
            f"the run {first.origin.run} had no validation set: name a data set"
        )
    config = _set_workers(fit_to_images(first, data_url).config, workers)
    dataset = open_dataset(data_url, config.data, config.augment)
    request = EvalRequest(
        tuple(model.url for model in opened),
        tuple(overrides),
        data_url,
        crops,
    )

    # Evaluate, and join what the workers found.
    is_cluster = address is not None or workers not in (None, "auto")
    if is_cluster or count_local_ranks(config) > 1:
        # Ray is slow to import, and one process does not need it.
        from distrain.launch.ray_evaluation import evaluate_on_ray

        parts = evaluate_on_ray(
            config,
            request,
            num_rows=len(dataset),
            address=address,
            console=console,
            on_progress=on_progress,
        )
    else:
        allocation, _ = compute_local_allocation(config)
        world = make_eval_world(config, allocation, rank=0, world_size=1)
        if on_progress is not None:
            on_progress(0, len(dataset))
        parts = [
            evaluate_part(opened, data_url, CROPS[crops], world, on_progress),
        ]
    return _build_evaluation(opened, dataset, CROPS[crops], parts)


def _set_workers(config: Config, workers: int | str | None) -> Config:
    """Return the config with a number of workers in place of that of its training.

    Raises:
        UserError: `workers` has another form.
    """
    # Not an override of the config, which would allow no more than virtual_workers.
    overrides = [
        OptionOverride(override.option, override.text.removeprefix("cluster."))
        for override in format_workers_override(workers, "workers=")
    ]
    tree = {**config.cluster.model_dump(mode="json"), "workers": "auto"}
    cluster = parse_section(Cluster, tree, "the config", overrides)
    return config.model_copy(update={"cluster": cluster})


def _build_evaluation(
    models: Sequence[TrainedModel],
    dataset: Dataset,
    crops: Crops,
    parts: Sequence[EvalPart],
) -> Evaluation:
    """Join the parts of all workers.

    Raises:
        UserError: they computed different bits.
    """
    for rank, part in enumerate(parts):
        if part.hardware_hash != parts[0].hardware_hash:
            raise UserError(
                f"worker {rank} of {len(parts)} computes other bits than worker 0, so "
                "the result would depend on who evaluates which image: use nodes of "
                f"one kind ({part.environment['device']} and "
                f"{parts[0].environment['device']})"
            )
    table = ImageTable.merge([part.table for part in parts])
    first = models[0]
    config = first.config
    return Evaluation(
        origins=tuple(model.origin for model in models),
        data=dataset.store.redacted_url,
        data_fingerprint=dataset.manifest.fingerprint,
        crops=crops.name,
        loss_name=config.loss.name,
        settings={
            "batch": config.evaluate.batch,
            "precision": config.precision,
            "decoder": config.data.backend,
            "normalise": config.data.normalise,
            "reduction": config.reduction.mode,
        },
        classes=first.info.classes,
        result=table.summarize(),
        images=table,
        left_out={
            dataset.describe_sample(sample): reason
            for sample, reason in table.bad_samples.items()
        },
        hardware_hash=parts[0].hardware_hash,
        environment=parts[0].environment,
    )
