"""Lists beside images: labels of an archive, class names, the devkit of ILSVRC-2012."""

import codecs
import io
import json
import tarfile
from ast import literal_eval
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distrain.data.prepare.label_list import get_key_column, split_table
from distrain.data.prepare.source import RETRY_SECONDS
from distrain.data.storage.retry import PERMANENT_ERRORS
from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAX_DEVKIT_BYTES = 64 << 20
_GROUND_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
_META_FILE = "meta.mat"
# Exceptions of JSON, and of values that are no names.
_JSON_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    SyntaxError,
    RecursionError,
    MemoryError,
)
# Exceptions of tarfile, gzip, scipy and the lookups on a file of some other kind.
_DEVKIT_ERRORS = (
    tarfile.TarError,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    IndexError,
    TypeError,
)


def read_class_names(classes: tuple[str, ...], url: str) -> tuple[str, ...]:
    """Return readable names in the order of classes.

    Names that occur twice are followed by their class, in parentheses.

    Args:
        classes: class names of a source, by label.
        url: a table of classes and names, one name per line and class, a JSON object
            such as Keras's imagenet_class_index.json, or the devkit.

    Raises:
        UserError: the file does not exist, has no name for a class, or two.
    """
    if url.endswith((".tar.gz", ".tgz")):
        _, name_by_class = read_devkit(url)
    else:
        location = Store(url).redacted_url
        name_by_class = _parse_class_names(classes, read_text(url), location)
    missing = [key for key in classes if key not in name_by_class]
    if missing:
        raise UserError(
            f"{Store(url).redacted_url} has no name for {len(missing)} of "
            f"{len(classes)} classes (first: {missing[0]}): add a line for each"
        )
    names = [name_by_class[key] for key in classes]
    count_by_name = Counter(names)
    return tuple(
        f"{name} ({key})" if count_by_name[name] > 1 else name
        for key, name in zip(classes, names, strict=True)
    )


def _parse_class_names(
    classes: Sequence[str], text: str, location: str
) -> dict[str, str]:
    """Parse a table of classes and names, or lines of names.

    Lines are taken for names alone only if there is one per class and none of them
    begins with a class.
    """
    if text.lstrip().startswith(("{", "[")):
        return _parse_json_names(classes, text, location)
    known = frozenset(classes)
    rows, score_by_column = split_table(text, lambda cell: 2 * (cell in known))
    if not score_by_column:
        names = [" ".join(row.cells) for row in rows]
        return (
            dict(zip(classes, names, strict=True)) if len(names) == len(classes) else {}
        )

    # What follows the class is its name, even if it has commas.
    column = get_key_column(score_by_column)
    name_by_class: dict[str, str] = {}
    for row in rows:
        key = row.cells[column] if column < len(row.cells) else ""
        name = ", ".join(row.cells[:column] + row.cells[column + 1 :])
        if key in known and name_by_class.setdefault(key, name) != name:
            raise UserError(
                f"{location} gives {key} two names, {name_by_class[key]} and {name} "
                f"in line {row.line_number}: keep the right one"
            )
    return name_by_class


def _parse_json_names(
    classes: Sequence[str], text: str, location: str
) -> dict[str, str]:
    """Parse JSON, or a dict of Python: {class: name}, {number: [class, name]}, [name].

    Raises UserError if it is none of these.
    """
    try:
        tree = _parse_tree(text)
        if isinstance(tree, list):
            tree = dict(zip(classes, tree, strict=True))
        name_by_class: dict[str, str] = {}
        for key, value in tree.items():
            if isinstance(value, list):
                synset, name = value
                name_by_class[synset] = name
            elif isinstance(value, int):
                # torchvision's class_to_idx.
                name_by_class[str(value)] = key
                continue
            else:
                name = value
            name_by_class[str(key)] = name
        return {key: str(name) for key, name in name_by_class.items()}
    except _JSON_ERRORS as error:
        raise UserError(
            f"{location} is not a JSON object of classes and names "
            f"({type(error).__name__}: {error}): write lines of class and name"
        ) from None


def _parse_tree(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return literal_eval(text.strip())


def _read_file(url: str) -> bytes:
    parent, _, name = url.rpartition("/")
    store = Store(parent or ("/" if url.startswith("/") else "."))
    try:
        return store.read(name, retry_seconds=RETRY_SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"no file at {Store(url).redacted_url}: check the path"
        ) from None
    except PERMANENT_ERRORS as error:
        raise UserError(
            f"cannot read {Store(url).redacted_url} ({error.strerror or error}): check "
            "the path and its permissions"
        ) from None


def read_text(url: str) -> str:
    """Read a text file. Raises UserError if it is missing or not UTF-8 or UTF-16."""
    data = _read_file(url)
    # Files from Windows may start with a byte order mark; Excel also writes UTF-16.
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{Store(url).redacted_url} is not UTF-8 text: save it as CSV or text in "
            "UTF-8, one line per file or class"
        ) from None


def read_devkit(url: str) -> tuple[list[str], dict[str, str]]:
    """Read the devkit of ILSVRC-2012: validation labels and readable class names.

    Returns:
        The synset of each validation file, in their order, and the words of each of
        the 1,000 synsets.

    Raises:
        UserError: the file is not that devkit, or scipy, which reads its table, is not
            installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "the devkit's table is a MATLAB file, and scipy, which reads it, is not "
            "installed: pip install 'distrain[ilsvrc]'"
        ) from None
    try:
        files = _extract_devkit_files(url)
        synsets = loadmat(io.BytesIO(files[_META_FILE]), squeeze_me=True)["synsets"]
        # The table also has inner nodes of the hierarchy; classes are its leaves.
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        synset_by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        truth_ids = files[_GROUND_TRUTH_FILE].decode().split()
        truth = [synset_by_id[int(truth_id)] for truth_id in truth_ids]
    # A UserError is a ValueError too, but has its own cause and remedy.
    except UserError:
        raise
    except _DEVKIT_ERRORS as error:
        # gzip reports bad content as an OSError without errno; any other OSError is
        # a failed read.
        is_read_error = isinstance(error, OSError) and error.errno is not None
        if is_read_error and not isinstance(error, tarfile.TarError):
            raise
        raise UserError(
            f"{Store(url).redacted_url} is not the devkit of ILSVRC-2012 "
            f"({type(error).__name__}: {error}): check the path"
        ) from None
    return truth, words


def _extract_devkit_files(url: str) -> dict[str, bytes]:
    """Return the contents of the two files that are needed, by name."""
    files: dict[str, bytes] = {}
    unpacked_bytes = 0
    with tarfile.open(fileobj=io.BytesIO(_read_file(url)), mode="r:gz") as tar:
        for info in tar:
            # Unpacking is unbounded otherwise: the devkit takes a few megabytes.
            unpacked_bytes += info.size
            if unpacked_bytes > _MAX_DEVKIT_BYTES:
                raise UserError(
                    f"{Store(url).redacted_url} unpacks to more than "
                    f"{_MAX_DEVKIT_BYTES} bytes, so it is not the devkit: check the "
                    "path"
                )
            name = info.name.rpartition("/")[2]
            if name not in (_GROUND_TRUTH_FILE, _META_FILE):
                continue
            file = tar.extractfile(info)
            if file is not None:
                files[name] = file.read()
    return files
