"""Train where the arguments say: in this process, on this machine's GPUs, or on Ray."""

from distrain.config import Config, format_workers_override, override_config
from distrain.data.storage.store import Store
from distrain.launch.local import count_local_ranks, train_locally
from distrain.monitor.consoles import LogFileConsole
from distrain.monitor.sinks import Console
from distrain.monitor.terminal import create_console
from distrain.trainer import Summary


def train(
    config: Config,
    *,
    workers: int | str | None = None,
    address: str | None = None,
    resume: bool = False,
    accept_other_hardware: bool = False,
    console: Console | None = None,
) -> Summary:
    """Train a run to its end, on this machine's GPUs or CPU cores or on a Ray cluster.

    A run that was stopped or killed resumes from its newest complete checkpoint. The
    first Ctrl-C or SIGTERM saves a checkpoint and returns a summary whose status is
    "stopped"; the second ends the process.

    Args:
        config: the run, from `load_config`.
        workers: "auto" (one per GPU), N or "MIN-MAX"; a number, even 1, means workers
            of Ray's. Default: the config's cluster.workers.
        address: train on this Ray cluster: "auto" (the one that this machine belongs
            to), HOST:PORT or ray://HOST:PORT. Default: this machine.
        resume: fail if there is no checkpoint.
        accept_other_hardware: resume even if this hardware does not reproduce the
            checkpoint's bits.
        console: where progress is printed; the run directory gets a copy. Default:
            stdout, with a progress bar if that is a terminal.

    Returns:
        How the run ended, its last training and validation records, and a hash of its
        weights.

    Raises:
        UserError: config, data, hardware or run directory do not fit together.
        RunError: too many bad samples, a loss that is not finite, too many failures
            without a new checkpoint, or no complete checkpoint.
        AttemptError: damaged data, failed storage, or another process that has taken
            over the run directory.
    """
    if workers is not None:
        config = override_config(config, format_workers_override(str(workers)))
    with LogFileConsole(console or create_console(), Store(str(config.run))) as logged:
        summary, _ = train_here_or_on_ray(
            config,
            logged,
            workers=workers,
            address=address,
            must_resume=resume,
            accept_other_hardware=accept_other_hardware,
        )
    return summary


def train_here_or_on_ray(
    config: Config,
    console: Console,
    *,
    workers: int | str | None,
    address: str | None,
    must_resume: bool,
    accept_other_hardware: bool,
) -> tuple[Summary, int | None]:
    """Train; return the summary, and the signal that stopped the run early if any.

    Several ranks need Ray even on one machine; a single rank trains in this process
    unless an address or a number of workers is given.
    """
    is_cluster = address is not None or workers not in (None, "auto")
    if is_cluster or count_local_ranks(config) > 1:
        # Ray is slow to import, and one rank does not need it.
        from distrain.launch.ray_driver import train_on_ray

        return train_on_ray(
            config,
            console,
            address=address,
            must_resume=must_resume,
            accept_other_hardware=accept_other_hardware,
        )
    return train_locally(
        config,
        console,
        must_resume=must_resume,
        accept_other_hardware=accept_other_hardware,
    )
