"""Early stopping: a run ends when its validation has not improved for some epochs."""

from dataclasses import dataclass

from distrain.fields import Section, operation_field


class StopConfig(Section):
    """End of a run before its last epoch."""

    patience: int | None = operation_field(None, ge=1)
    """Epochs without a new highest count of correct validation images after which the
    run ends; null: never. It does not change the weights of any step, so it may be
    raised to train a run that has ended early on. [operation]"""


# The field names are keys of a checkpoint's state.json: renaming one breaks old runs.
@dataclass(frozen=True)
class StopState:
    """Validation results at the ends of epochs as early stopping remembers them.

    Integers alone, so that all ranks have the same and take the same decision.
    """

    best: int = -1
    """Highest count of correct validation samples after any epoch; -1: none yet."""
    epochs: int = 0
    """Epochs since that one."""

    def update(self, top1_count: int) -> "StopState":
        """Return the state after the evaluation at the end of one more epoch.

        Args:
            top1_count: validation samples whose highest logit is their label's.
        """
        if top1_count > self.best:
            return StopState(top1_count, 0)
        return StopState(self.best, self.epochs + 1)

    def is_over(self, config: StopConfig) -> bool:
        """Return whether the run ends here."""
        return config.patience is not None and self.epochs >= config.patience
