"""Options in the `#SBATCH` lines of a script, read and changed as sbatch reads them.

Sbatch joins the words of all these lines to one command line: a line may hold several
options, a word may be quoted, and `#` begins a comment. It stops at the first line that
is a command. Of an option that stands twice, the last counts.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from distrain.errors import UserError

_DIRECTIVE = "#SBATCH"
# The options that are read or changed here, with their short forms. A long form may be
# abbreviated: where that is ambiguous, sbatch refuses the script.
_SHORT_FORMS = {
    "job-name": "J",
    "nodes": "N",
    "ntasks": "n",
    "ntasks-per-node": "",
    "cpus-per-task": "c",
    "gres": "",
    "gpus": "G",
    "gpus-per-node": "",
    "gpus-per-task": "",
    "gpus-per-socket": "",
    "sockets-per-node": "",
    "tres-per-task": "",
}
# Short options without a value: several may be written as one word, -HN4.
_SHORT_FLAGS = "hHkKOQsvVWI"
# A word: quoted parts, escaped characters, and others up to a space or a comment.
_WORD = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\\.|[^\s#"'\\])+)""")
_QUOTED_PART = re.compile(r"""(["'])((?:\\.|(?!\1).)*)\1|\\(.)""")


class _Word(NamedTuple):
    """A word of the directives, without its quotes."""

    text: str
    start: int
    """Offset in the script."""
    end: int


class SbatchOption(NamedTuple):
    """An option with its value."""

    name: str
    """Long form."""
    value: str
    words: tuple[_Word, ...]
    """Where it stands: one word, or one for the option and one for the value."""
    flags: str
    """Short options that its word begins with, such as -H of -HN4."""


def get_option(script: str, name: str) -> str | None:
    """Return the value of an option by its long form; None if it is not set."""
    values = [option.value for option in _iter_options(script) if option.name == name]
    return values[-1] if values else None


def set_option(script: str, name: str, value: str, *, replaced: str = "") -> str:
    """Set `--name=value`, in the script's second line if it has no such option yet.

    Args:
        script: the script.
        name: long form of the option.
        value: what it is set to, everywhere that it stands.
        replaced: long form of an option that is replaced, too.
    """
    is_set = False
    edits: list[tuple[int, int, str]] = []
    for option in _iter_options(script):
        if option.name not in (name, replaced):
            continue
        is_set = True
        first, *others = option.words
        flags = f"-{option.flags} " if option.flags else ""
        edits.append((first.start, first.end, f"{flags}--{name}={value}"))
        edits += [(word.start, word.end, "") for word in others]
    if not is_set:
        return script.replace("\n", f"\n{_DIRECTIVE} --{name}={value}\n", 1)
    # From the last to the first, so that offsets stay valid.
    for start, end, text in reversed(edits):
        before = script[:start]
        if not text:
            before = before.rstrip(" \t")
        script = before + text + script[end:]
    return script


def count_gpus_per_node(script: str, origin: str) -> int:
    """Count the GPUs that a script requests on each node; 0 if it requests none.

    Args:
        script: the script.
        origin: name of the script in messages.

    Raises:
        UserError: the number per node does not follow from the script.
    """
    for name in ("gpus-per-node", "gres"):
        num_gpus = _count_gpus(get_option(script, name), is_gres=name == "gres")
        if num_gpus:
            return num_gpus

    tres_per_task = get_option(script, "tres-per-task")
    per_task = _count_gpus(get_option(script, "gpus-per-task"))
    per_task = per_task or _count_gpus(tres_per_task, is_gres=True)
    if per_task:
        return per_task * _count_tasks_per_node(script)

    per_socket = _count_gpus(get_option(script, "gpus-per-socket"))
    if per_socket:
        num_sockets = _parse_count(get_option(script, "sockets-per-node"))
        if not num_sockets:
            raise UserError(
                f"--gpus-per-socket={per_socket} in {origin} does not say how many "
                "GPUs a node has: use --gpus-per-node, or add --sockets-per-node"
            )
        return per_socket * num_sockets

    # All nodes together, of each type.
    total = get_option(script, "gpus")
    num_gpus = _count_gpus(total)
    num_nodes = _count_nodes(script)
    if any(_count_gpus(entry) % num_nodes for entry in (total or "").split(",")):
        raise UserError(
            f"--gpus={num_gpus} in {origin} cannot be divided equally among its "
            f"{num_nodes} nodes: use --gpus-per-node"
        )
    return num_gpus // num_nodes


def set_number_of_nodes(script: str, nodes: str) -> str:
    """Set the number of nodes, N or MIN-MAX; each keeps what the script requests.

    `--gpus`, which is for all nodes together, becomes `--gpus-per-node`.
    """
    total = get_option(script, "gpus")
    if total is not None:
        per_node = get_option(script, "gpus-per-node")
        if per_node is None:
            per_node = _divide_counts(total, _count_nodes(script))
        script = set_option(script, "gpus-per-node", per_node, replaced="gpus")
    return set_option(script, "nodes", nodes)


def count_cpus_per_task(script: str) -> int:
    """Count the CPUs that a script requests for a task; 0 if it does not say."""
    count = _parse_count(get_option(script, "cpus-per-task"))
    # --tres-per-task=cpu:8,gres/gpu:1
    in_tres = re.search(
        r"(?:^|,)cpu[:=](\d+)", get_option(script, "tres-per-task") or ""
    )
    return count or (int(in_tres[1]) if in_tres else 0)


def _count_gpus(value: str | None, *, is_gres: bool = False) -> int:
    """Sum the GPUs in a value such as `4`, `a100:2,h100:2`, or of --gres, `gpu:a100:4`.

    An entry without a count is one GPU. Other resources of --gres, whose form
    --tres-per-task has, do not count.
    """
    # --gres=gpu:4(S:0-1) names sockets.
    entries = re.sub(r"\(.*?\)", "", value or "").split(",")
    num_gpus = 0
    for entry in filter(None, entries):
        parts = re.split("[:=]", entry)
        if is_gres:
            # Also written as gres/gpu:4 or gres:gpu:4.
            if parts[0] == "gres":
                parts = parts[1:]
            if parts[0].removeprefix("gres/") != "gpu":
                continue
        num_gpus += int(parts[-1]) if parts[-1].isdecimal() else 1
    return num_gpus


def _divide_counts(value: str, num_nodes: int) -> str:
    """Divide each count of `a100:4,h100:4`; all are multiples of the number."""
    return re.sub(
        r"(?<![^:,=])\d+(?=,|$)", lambda count: str(int(count[0]) // num_nodes), value
    )


def _count_nodes(script: str) -> int:
    """Return the number of nodes that a script requests, at least: MIN of MIN-MAX."""
    return _parse_count(get_option(script, "nodes")) or 1


def _count_tasks_per_node(script: str) -> int:
    per_node = _parse_count(get_option(script, "ntasks-per-node"))
    num_tasks = _parse_count(get_option(script, "ntasks"))
    return max(1, per_node or num_tasks // _count_nodes(script))


def _parse_count(value: str | None) -> int:
    """Return the number that a value begins with, 0 if there is none."""
    count = re.match(r"\d+", value or "")
    return int(count[0]) if count else 0


def _iter_options(script: str) -> Iterator[SbatchOption]:
    """Yield the options of a script, in order, that have one of the names above."""
    words = list(_iter_words(script))
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        name, flags, value = _split_word(word.text)
        # The value is the next word, which for an unknown option may be another option:
        # that one has no value.
        used_words: tuple[_Word, ...] = (word,)
        is_followed = i < len(words) and not words[i].text.startswith("-")
        if value is None and is_followed:
            used_words = (word, words[i])
            value = words[i].text
            i += 1
        if name is not None and value is not None:
            yield SbatchOption(name, value, used_words, flags)


def _split_word(word: str) -> tuple[str | None, str, str | None]:
    """Split the word of an option.

    Returns:
        Its long form, None for an option that is not used here; flags before it in the
        same word; and its value, None if that is the next word.
    """
    if word.startswith("--"):
        name, has_value, value = word[2:].partition("=")
        if name not in _SHORT_FORMS:
            # An abbreviation.
            matches = [known for known in _SHORT_FORMS if known.startswith(name)]
            name = matches[0] if name and len(matches) == 1 else ""
        return name or None, "", value if has_value else None
    letters = word[1:] if word.startswith("-") else ""
    flags = letters[: len(letters) - len(letters.lstrip(_SHORT_FLAGS))]
    letter = letters[len(flags) :][:1]
    names = [name for name, short in _SHORT_FORMS.items() if letter and short == letter]
    value = letters[len(flags) + 1 :]
    return (names[0] if names else None), flags, value or None


def _iter_words(script: str) -> Iterator[_Word]:
    """Yield the words of all directives."""
    offset = 0
    for line in script.splitlines(keepends=True):
        is_directive = line.startswith(_DIRECTIVE)
        # Neither empty nor a comment: a command.
        if not is_directive and line.strip() and not line.lstrip().startswith("#"):
            return
        position = len(_DIRECTIVE) if is_directive else len(line)
        while word := _WORD.match(line, position):
            position = word.end()
            text = _QUOTED_PART.sub(_unquote, word[1])
            yield _Word(text, offset + word.start(1), offset + position)
        offset += len(line)


def _unquote(part: re.Match[str]) -> str:
    quoted = part[2]
    return part[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
