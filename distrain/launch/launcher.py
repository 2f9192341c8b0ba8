"""Train where the arguments say: in this process, on this machine's GPUs, or on Ray."""

from distrain.config import (
    Config,
    check_is_config,
    format_workers_override,
    override_config,
)
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.launch.local import count_local_ranks, train_locally
from distrain.monitor.consoles import LogFileConsole
from distrain.monitor.sinks import Console
from distrain.monitor.terminal import create_console
from distrain.rundir.checkpoint_loading import (
    find_newest_checkpoint,
)
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
        How the run ended ("finished", "finished early" by `stop.patience`, "stopped",
        or "already finished" if nothing was left to train), its last training and
        validation records, and a hash of its weights.

    Raises:
        UserError: config, data, hardware or run directory do not fit together, or
            there is nothing to resume.
        RunError: too many bad samples, a loss that is not finite, too many failures
            without a new checkpoint, every complete checkpoint is damaged, or the
            newest undamaged one has another format.
        AttemptError: damaged data, failed storage, or another process that has taken
            over the run directory.
    """
    check_is_config(config, "train")
    if console is not None and not isinstance(console, Console):
        raise UserError(
            f"console {console!r} is not a distrain.Console, whose methods the run "
            "calls: leave it out, or give distrain.SilentConsole()"
        )
    if workers is not None:
        config = override_config(config, format_workers_override(workers, "workers="))
    with LogFileConsole(console or create_console(), Store(str(config.run))) as logged:
        summary, _ = train_here_or_on_ray(
            config,
            logged,
            workers=workers,
            address=None if address is None else str(address),
            must_resume=resume,
            accept_other_hardware=accept_other_hardware,
        )
        log_summary(logged, summary, "call train again")
    return summary


def log_summary(console: Console, summary: Summary, how_to_resume: str | None) -> None:
    """Log how a run ended, its validation result, weights and run directory.

    Args:
        console: where the lines go.
        summary: how the run ended.
        how_to_resume: command or call that resumes a stopped run, if there is one.
    """
    # One line on how it ended.
    if summary.status == "already finished":
        done = f"all {summary.steps} steps were done before"
        if summary.step < summary.steps:
            done = (
                f"it ended early after step {summary.step} of {summary.steps}, since "
                "validation did not improve (to train on, raise stop.patience)"
            )
        console.log(
            f"{summary.run} is already finished: {done}. To start afresh, name another "
            "run directory: run=..."
        )
    elif summary.status == "stopped":
        to_resume = f"; to resume: {how_to_resume}" if how_to_resume else ""
        console.log(
            f"stopped and saved after step {summary.step} of {summary.steps}{to_resume}"
        )
    else:
        minutes, seconds = divmod(round(summary.seconds), 60)
        steps = f"{summary.steps} step{'s' * (summary.steps != 1)}"
        if summary.status == "finished early":
            steps = f"early, after step {summary.step} of {summary.steps}"
        console.log(
            f"finished {steps}; this attempt took {minutes} min {seconds:02d} s"
        )

    # The result: the last validation, and a hash to compare runs by.
    if summary.eval:
        result = summary.eval
        # With five classes or fewer, top-5 is always 100 %.
        top5 = f", top-5 {result.top5:.2%}" if result.classes > 5 else ""
        console.log(
            f"validation: top-1 {result.top1:.2%}{top5} of {result.samples:,} images"
        )
    console.log(f"weights   {summary.weights[:16]}  ({summary.reduction} reduction)")
    console.log(f"run       {summary.run}")


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
    try:
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
    except KeyboardInterrupt:
        newest = describe_newest_checkpoint(Store(str(config.run)))
        console.log(f"ended at once: {newest}")
        raise


def describe_newest_checkpoint(store: Store) -> str:
    """Return a sentence on what a run that was ended at once resumes from."""
    try:
        name = find_newest_checkpoint(store)
    except OSError as error:
        return f"{store.redacted_url} cannot be read now ({error})"
    if name is None:
        return "no checkpoint is complete, so the same command starts afresh"
    return f"the newest checkpoint is {name}; run the same command to resume from it"
