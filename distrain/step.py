"""What is computed of one micro-batch, in training, evaluation and the check of the hardware alike."""

import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.loader import MicroBatch
from distrain.losses import loss_of
from distrain.model import randomness


def forward(config: Config, model: nn.Module, step: int, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Logits (b, classes) in fp32, and the loss sum over valid samples."""
    with randomness(config.seed, step, batch.virtual_worker), autocast(config, batch.images.device):
        logits: Tensor = model(batch.images)
    logits = logits.float()
    return logits, (loss_of(config.loss, logits, batch.labels) * batch.weights).sum()


def score(config: Config, model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes) in fp32 of a model in evaluation mode."""
    with torch.inference_mode(), autocast(config, images.device):
        logits: Tensor = model(images)
    return logits.float()


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The config's arithmetic for forward and backward."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
