"""Train a recipe in one process, undisturbed, up to the step that was last read from the standard input."""

import sys

import torch

from distrain.config import load_config
from distrain.distributed.world import World
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train


class Paused(SilentConsole):
    """Waits after a step until a later one is asked for; ends where nobody asks any more."""

    def __init__(self) -> None:
        self._last = 0

    def set_step(self, step: int) -> None:
        """Go on if a step after the last one that was asked for may be made."""
        while step > self._last:
            self._last = int(sys.stdin.readline() or sys.exit())


if __name__ == "__main__":
    train(load_config(sys.argv[1]), World(torch.device("cpu")), Paused())
