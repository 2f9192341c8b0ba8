"""Suggestions for keys that a config does not have."""

import difflib
from collections.abc import Collection, Sequence

# Names that torch, torchvision, Lightning, timm and Ray have for keys of a recipe. A
# dotted name is that of one section; any other stands for itself in all sections.
_SYNONYMS: dict[str, Sequence[str]] = {
    # Training.
    "batch": ["global_batch"],
    "batch_size": ["global_batch"],
    "train_batch_size": ["global_batch"],
    "evaluate.batch_size": ["evaluate.batch"],
    "val_batch_size": ["evaluate.batch"],
    "max_epochs": ["epochs"],
    "num_epochs": ["epochs"],
    "n_epochs": ["epochs"],
    "manual_seed": ["seed"],
    "random_seed": ["seed"],
    "amp": ["precision"],
    "dtype": ["precision"],
    "accelerator": ["device"],
    "output_dir": ["run"],
    "default_root_dir": ["run"],
    "log_interval": ["log.every"],
    "print_freq": ["log.every"],
    "log_every_n_steps": ["log.every"],
    # Choices.
    "arch": ["model.name"],
    "architecture": ["model.name"],
    "network": ["model"],
    "pretrained": ["model.init_from"],
    "weights": ["model.init_from"],
    "finetune": ["model.init_from"],
    "freeze_layers": ["model.freeze"],
    "criterion": ["loss"],
    "smoothing": ["loss.label_smoothing"],
    "optim": ["optimizer"],
    "opt": ["optimizer"],
    "scheduler": ["schedule"],
    "lr_scheduler": ["schedule"],
    "model.type": ["model.name"],
    "loss.type": ["loss.name"],
    "optimizer.type": ["optimizer.name"],
    "schedule.type": ["schedule.name"],
    # Optimizer and schedule.
    "learning_rate": ["schedule.lr"],
    "base_lr": ["schedule.lr"],
    "max_lr": ["schedule.lr"],
    "wd": ["optimizer.weight_decay"],
    "betas": ["optimizer.beta1", "optimizer.beta2"],
    "clip_grad_norm": ["optimizer.clip_norm"],
    "gradient_clip_val": ["optimizer.clip_norm"],
    "max_grad_norm": ["optimizer.clip_norm"],
    "gamma": ["schedule.factor"],
    "lr_gamma": ["schedule.factor"],
    "milestones": ["schedule.drop_epochs"],
    "warmup": ["schedule.warmup_epochs"],
    "lr_warmup_epochs": ["schedule.warmup_epochs"],
    # Data and cluster.
    "dataset": ["data"],
    "data_dir": ["data.train"],
    "data_path": ["data.train"],
    "image_size": ["augment.crop"],
    "img_size": ["augment.crop"],
    "crop_size": ["augment.crop"],
    "train_crop_size": ["augment.crop"],
    "resize": ["augment.short_side"],
    "hflip": ["augment.mirror"],
    "prefetch_factor": ["data.read_ahead"],
    "data.workers": ["data.decode_threads"],
    "data.num_workers": ["data.decode_threads"],
    "cluster.num_workers": ["cluster.workers"],
    "num_workers": ["data.decode_threads", "cluster.workers"],
    "devices": ["cluster.workers"],
    "gpus": ["cluster.workers"],
    "num_gpus": ["cluster.workers"],
    "world_size": ["cluster.workers"],
    "nproc_per_node": ["cluster.workers"],
}
# Suggest that many keys at most: more of them are no help.
_MAX_SUGGESTIONS = 3
# Least similarity of names (difflib's ratio): in the section of the key, and in others,
# where it must be higher, or `model.lrm` would suggest schedule.lr.
_SECTION_CUTOFF = 0.76
_CUTOFF = 0.85


def suggest_keys(key: str, known: Collection[str]) -> list[str]:
    """Suggest what may be meant by an unknown key; the list is empty rather than wrong.

    Args:
        key: dotted key that the config does not have.
        known: dotted keys that it may have, and its sections.
    """
    key = key.lower().replace("-", "_")
    section, _, last = key.rpartition(".")
    # What other toolkits call it.
    for name in (key, last):
        synonyms = [other for other in _SYNONYMS.get(name, ()) if other in known]
        if synonyms:
            return synonyms
    # The same words with other separators, or the same name in another section.
    joined = key.replace(".", "_")
    same = [other for other in known if other.replace(".", "_") == joined]
    same = same or _find_names(known, last)
    if same:
        return same if len(same) <= _MAX_SUGGESTIONS else []
    # A similar name, in the same section or else in any.
    in_section = [other for other in known if other.rpartition(".")[0] == section]
    for keys, cutoff in ((in_section, _SECTION_CUTOFF), (known, _CUTOFF)):
        names = dict.fromkeys(other.rpartition(".")[2] for other in keys)
        for similar in difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            found = _find_names(keys, similar)
            return found if len(found) <= _MAX_SUGGESTIONS else []
    return []


def _find_names(keys: Collection[str], name: str) -> list[str]:
    """Find the keys whose last part is a name."""
    return [key for key in keys if key.split(".")[-1] == name]
