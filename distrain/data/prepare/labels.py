"""Lists that come beside images: labels of an archive's files, names of classes, the devkit of ILSVRC-2012."""

import io
import tarfile

from distrain.data.prepare.source import RETRY_SECONDS
from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAX_DEVKIT_BYTES = 64 << 20
_GROUND_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
_META_FILE = "meta.mat"


def read_class_names(classes: tuple[str, ...], url: str) -> tuple[str, ...]:
    """Names for people, in the order of classes; where two are the same, each with its class behind it."""
    if url.endswith((".tar.gz", ".tgz")):
        by_class = read_devkit(url)[1]
    else:
        found = [line.replace("\t", " ") for line in read_lines(url) if line.strip()]
        pairs = [
            line.split(" ", 1) if " " in line else line.split(",", 1) for line in found
        ]
        by_class = {
            pair[0].strip(" ,"): pair[1].strip() for pair in pairs if len(pair) == 2
        }
        if not any(name in by_class for name in classes) and len(found) == len(classes):
            by_class = dict(zip(classes, (line.strip() for line in found), strict=True))
    missing = [name for name in classes if name not in by_class]
    if missing:
        raise UserError(
            f"{Store(url).redacted_url} has no name for {len(missing)} of {len(classes)} classes, {missing[0]} first"
        )
    names = [by_class[name] for name in classes]
    return tuple(
        f"{name} ({key})" if names.count(name) > 1 else name
        for key, name in zip(classes, names, strict=True)
    )


def _read_file(url: str) -> bytes:
    parent, _, last = url.rpartition("/")
    store = Store(parent or ("/" if url.startswith("/") else "."))
    try:
        return store.read(last, retry_seconds=RETRY_SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"no file at {Store(url).redacted_url}: check the path"
        ) from None


def read_lines(url: str) -> list[str]:
    """The lines of a text file. Raises UserError."""
    try:
        return _read_file(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"{Store(url).redacted_url} is no text: it must hold a line for each file or class"
        ) from None


def read_devkit(url: str) -> tuple[list[str], dict[str, str]]:
    """Synsets of the validation files in their order, and the words of all 1,000, from the devkit of ILSVRC-2012.

    Raises:
        UserError: it is not that devkit, or scipy, which reads its table, is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "the devkit's table is a MATLAB file: pip install 'distrain[ilsvrc]'"
        ) from None
    found = dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(_read_file(url)), mode="r:gz") as tar:
            taken = 0
            for info in tar:
                taken += info.size
                if taken > _MAX_DEVKIT_BYTES:
                    raise UserError(
                        f"{Store(url).redacted_url} unpacks to more than {_MAX_DEVKIT_BYTES} bytes: this is no devkit"
                    )
                last = info.name.rpartition("/")[2]
                if (
                    last in (_GROUND_TRUTH_FILE, _META_FILE)
                    and (file := tar.extractfile(info)) is not None
                ):
                    found[last] = file.read()
        synsets = loadmat(io.BytesIO(found[_META_FILE]), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        truth = [
            by_id[int(line)] for line in found[_GROUND_TRUTH_FILE].decode().split()
        ]
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        IndexError,
        TypeError,
    ) as error:
        if (
            isinstance(error, OSError)
            and not isinstance(error, tarfile.TarError)
            and error.errno is not None
        ):
            raise
        raise UserError(
            f"{Store(url).redacted_url} is not the devkit of ILSVRC-2012 ({type(error).__name__}: {error})"
        ) from None
    return truth, words
