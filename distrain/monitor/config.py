"""Config sections of logging and of the Prometheus endpoint."""

from pydantic import field_validator

from distrain.data.storage.url import forbid_url_secrets
from distrain.fields import Section, operation_field


class LogConfig(Section):
    """Logging of metrics."""

    every: int = operation_field(10, ge=1)
    """Steps between metrics lines; in between the numbers stay on the device, so that
    logging does not wait for it at every step. [operation]"""
    tensorboard: bool = operation_field(False)
    """Write TensorBoard event files too, in `tensorboard` of the run directory, which
    must be on a disk. [operation]"""
    mlflow: str | None = operation_field(None)
    """URI of an MLflow tracking server that metrics are sent to as well; null: none.
    Credentials are taken from the environment. [operation]"""

    @field_validator("mlflow")
    @classmethod
    def _check_no_secret(cls, value: str | None) -> str | None:
        return forbid_url_secrets(value)


class MetricsConfig(Section):
    """Prometheus metrics of the run: one page per node, for all ranks on it."""

    port: int | None = operation_field(9477, ge=1, le=65535)
    """Port of the page, from 1 to 65535; if it is taken, the next free one is used;
    null: no page. [operation]"""
    # Nothing protects the page, so the default does not leave this machine.
    address: str = operation_field("127.0.0.1")
    """Address that the page is served on. The default is visible on this machine only;
    on a cluster use the address of the nodes, or 0.0.0.0 behind a firewall.
    [operation]"""
    linger: float = operation_field(15.0, ge=0)
    """Seconds for which a run that has ended waits for its page to be read once more,
    if it was read before. The default is the scrape interval of
    cluster/prometheus/prometheus.yml. [operation]"""
