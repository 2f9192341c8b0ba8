"""Lists beside images: labels of an archive, class names, the devkit of ILSVRC-2012."""

import io
import tarfile

from distrain.data.prepare.source import RETRY_SECONDS
from distrain.data.storage.retry import PERMANENT_ERRORS
from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAX_DEVKIT_BYTES = 64 << 20
_GROUND_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
_META_FILE = "meta.mat"
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
        url: lines of class and name, or of one name per class; or the devkit.

    Raises:
        UserError: the file does not exist, or has no name for a class.
    """
    if url.endswith((".tar.gz", ".tgz")):
        _, name_by_class = read_devkit(url)
    else:
        name_by_class = _parse_class_names(classes, read_lines(url))
    missing = [key for key in classes if key not in name_by_class]
    if missing:
        raise UserError(
            f"{Store(url).redacted_url} has no name for {len(missing)} of "
            f"{len(classes)} classes (first: {missing[0]}): add a line for each"
        )
    names = [name_by_class[key] for key in classes]
    return tuple(
        f"{name} ({key})" if names.count(name) > 1 else name
        for key, name in zip(classes, names, strict=True)
    )


def _parse_class_names(classes: tuple[str, ...], lines: list[str]) -> dict[str, str]:
    """Parse lines of class and name (split at the first space or comma), or of names.

    Lines are taken for names alone only if there is one per class and none of them
    begins with a class.
    """
    lines = [line.replace("\t", " ") for line in lines if line.strip()]
    name_by_class = {}
    for line in lines:
        key, separator, name = line.partition(" " if " " in line else ",")
        if separator:
            name_by_class[key.strip(" ,")] = name.strip()
    if len(lines) == len(classes) and not any(key in name_by_class for key in classes):
        names = [line.strip() for line in lines]
        return dict(zip(classes, names, strict=True))
    return name_by_class


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


def read_lines(url: str) -> list[str]:
    """Read the lines of a text file. Raises UserError if it is missing or not UTF-8."""
    try:
        # Files from Windows may start with a byte order mark.
        return _read_file(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"{Store(url).redacted_url} is not UTF-8 text: it must have one line per "
            "file or class"
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
