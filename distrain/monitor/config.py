"""Sections of a config: what is told of a run, and to whom."""

from pydantic import field_validator

from distrain.data.storage.url import forbid_url_secrets
from distrain.fields import Section, operation_field


class LogConfig(Section):
    """What is told of the run."""

    every: int = operation_field(10, ge=1)
    """Steps between metrics lines; numbers stay on the device in between. [operation]"""
    tensorboard: bool = operation_field(False)
    """Write TensorBoard's event files too, in `tensorboard` of the run directory. [operation]"""
    mlflow: str | None = operation_field(None)
    """URI of an MLflow tracking server that is told too; null: none. Credentials are in the environment. [operation]"""

    @field_validator("mlflow")
    @classmethod
    def _check_no_secret(cls, value: str | None) -> str | None:
        return forbid_url_secrets(value)


class MetricsConfig(Section):
    """What Prometheus may read of the run: one page a node, for all ranks of it."""

    port: int | None = operation_field(9477, ge=1, le=65535)
    """Port of the page; if it is taken, the next that is free; null: there is none. [operation]"""
    address: str = operation_field("127.0.0.1")
    """Address that the page is served on; on a cluster that of the nodes, or 0.0.0.0 behind a fence. [operation]"""
    linger: float = operation_field(15.0, ge=0)
    """Seconds for which a run that has ended waits for its page to be read once more, if it was read before.
    [operation]"""
