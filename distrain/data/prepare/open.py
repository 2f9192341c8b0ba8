"""Finds out what a URL holds, an image folder, archives, hub Parquet or WebDataset, and opens it as a source."""

import io
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import NamedTuple

from distrain.data.prepare.archive import IMAGES, first_member, open_labelled, open_tar_of_tars, open_webdataset
from distrain.data.prepare.hub import open_parquet
from distrain.data.prepare.source import FILE_LIMIT, PATIENCE, Block, FileReader, Refused, Source
from distrain.data.shards.parquet import Columns
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_AT_ONCE = 16
_IMAGES = IMAGES | {"gif", "bmp", "tif", "tiff", "ppm"}
_DEVKIT_LIMIT = 64 << 20
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"


class Opened(NamedTuple):
    """A source, and how its Parquet files name their columns, if it is made of such."""

    source: Source
    columns: Columns | None


def open_source(
    url: str,
    *,
    labels: str | None = None,
    names: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Opened:
    """Look at a URL and open what is there.

    Args:
        url: a folder of folders, a .tar or .parquet file, a folder of those, or a pattern with `*` for some of them.
        labels: for an archive of images without labels, a list of them (`archive.open_labelled` says how) or the
            devkit of ILSVRC-2012 (a .tar.gz).
        names: names for people: a file with lines of class and name, or of a name for each label; or that devkit.
        image_column: of Parquet files, where their metadata leaves it open.
        label_column: the same.

    Raises:
        UserError: nothing to train on is there.
        OSError: it cannot be read.
    """
    store, files = _look(url)
    kind, columns = files[0].name.rpartition(".")[2] if files else "", None
    if kind == "parquet":
        source, columns = open_parquet(store, files, image_column, label_column)
    elif kind == "tar":
        source = _open_tars(store, files, labels)
    else:
        source = _open_folder(store)
    if not source.blocks:
        first = f" ({source.refused[0].name}: {source.refused[0].reason})" if source.refused else ""
        raise UserError(f"no images in {store.name}: it must hold one folder of images a class, or shards{first}")
    if names is not None:
        source.classes = _named(source.classes, names)
    if len(source.classes) < 2:
        raise UserError(f"{store.name} holds one class, {source.classes[0]}, so there is nothing to tell apart")
    return Opened(source, columns)


def _look(url: str) -> tuple[Store, list[Entry]]:
    """The store of a URL, and the archives or Parquet files in it that it means; none: it is a folder of folders."""
    parent, _, last = url.rstrip("/").rpartition("/")
    if "*" in last or last.endswith((".tar", ".parquet")):
        store = Store(parent or ("/" if url.startswith("/") else "."))
        meant = (lambda name: fnmatchcase(name, last)) if "*" in last else (lambda name: name == last)
        files = [entry for entry in store.entries() if meant(entry.name) and not entry.folder]
        if not files and "*" not in last and store.exists(last):  # a server that lists nothing
            files = [Entry(last, store.size(last), False)]
        if not files and not store.is_folder(last):
            raise UserError(f"nothing at {Store(url).name}: check the path")
    else:
        store, files = Store(url), []
    if not files:
        store = Store(url)
        if not store.exists():
            raise UserError(f"no folder at {store.name}: check the path")
        entries = [entry for entry in store.entries() if not entry.folder]
        files = [e for e in entries if e.name.endswith(".parquet")] or [e for e in entries if e.name.endswith(".tar")]
    if len({file.name.rpartition(".")[2] for file in files}) > 1:
        raise UserError(f"{Store(url).name} means files of several kinds: take one, such as *.tar")
    splits = {file.name.rpartition("/")[2].partition("-")[0] for file in files} if len(files) > 1 else set()
    if len(splits) > 1 and all("-of-" in file.name for file in files):
        some = sorted(splits)[0]
        raise UserError(
            f"{store.name} holds several splits ({', '.join(sorted(splits))}): take one of them, such as "
            f"'{store.name}/{some}-*'"
        )
    return store, files


def _open_tars(store: Store, files: Sequence[Entry], labels: str | None) -> Source:
    first = files[0].name
    if first_member(store, first).endswith(".tar"):
        if len(files) > 1:
            raise UserError(f"{store.name}: {first} is an archive of archives: name it alone")
        return open_tar_of_tars(store, first)
    if labels is None:
        return open_webdataset(store, files)
    if len(files) > 1:
        raise UserError(f"--labels goes with one archive, and {store.name} has {len(files)}: name it")
    if labels.endswith((".tar.gz", ".tgz")):
        truth, synsets = _devkit(labels)
        return open_labelled(store, first, truth, sorted(synsets))
    return open_labelled(store, first, _lines(labels), None)


def _open_folder(store: Store) -> Source:
    """A folder of one folder of images a class."""
    classes, refused, blocks = list[str](), list[Refused](), list[Block]()
    for entry in store.entries():
        if entry.folder and not entry.name.startswith("."):
            classes.append(entry.name)
        elif entry.name.rpartition(".")[2].lower() in _IMAGES:  # others are notes, lists and licences
            refused.append(Refused(entry.name, "an image beside the folders of classes"))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for label, (name, entries) in enumerate(zip(classes, pool.map(store.entries, classes), strict=True)):
            for entry in entries:
                path = f"{name}/{entry.name}"
                shown = path.encode("utf-8", "backslashreplace").decode()  # a name need not be text
                if entry.name.startswith("."):
                    continue
                if entry.folder or entry.other:
                    what = "a folder" if entry.folder else "a link to nowhere, or a device,"
                    refused.append(Refused(shown, f"{what} where an image should be"))
                elif (entry.size or 0) > FILE_LIMIT:
                    refused.append(Refused(shown, f"{entry.size} bytes are over the limit of {FILE_LIMIT}"))
                else:
                    blocks.append(Block(path, shown, label, None, entry.size or 0))
    return Source(store, "image folder", tuple(classes), blocks, FileReader(store.url), refused)


# --- names and labels


def _named(classes: tuple[str, ...], url: str) -> tuple[str, ...]:
    """Names for people, in the order of classes; where two are the same, each with its class behind it."""
    if url.endswith((".tar.gz", ".tgz")):
        by_class = _devkit(url)[1]
    else:
        lines = [line.replace("\t", " ") for line in _lines(url) if line.strip()]
        pairs = [line.split(" ", 1) if " " in line else line.split(",", 1) for line in lines]
        by_class = {pair[0].strip(" ,"): pair[1].strip() for pair in pairs if len(pair) == 2}
        if not any(name in by_class for name in classes) and len(lines) == len(classes):
            by_class = dict(zip(classes, (line.strip() for line in lines), strict=True))
    missing = [name for name in classes if name not in by_class]
    if missing:
        raise UserError(
            f"{Store(url).name} has no name for {len(missing)} of {len(classes)} classes, {missing[0]} first"
        )
    names = [by_class[name] for name in classes]
    return tuple(f"{name} ({key})" if names.count(name) > 1 else name for key, name in zip(classes, names, strict=True))


def _file(url: str) -> bytes:
    parent, _, last = url.rpartition("/")
    store = Store(parent or ("/" if url.startswith("/") else "."))
    try:
        return store.read(last, patience=PATIENCE)
    except FileNotFoundError:
        raise UserError(f"no file at {Store(url).name}: check the path") from None


def _lines(url: str) -> list[str]:
    try:
        return _file(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{Store(url).name} is no text: it must hold a line for each file or class") from None


def _devkit(url: str) -> tuple[list[str], dict[str, str]]:
    """Synsets of the validation files in their order, and the words of all 1,000, from the devkit of ILSVRC-2012.

    Raises:
        UserError: it is not that devkit, or scipy, which reads its table, is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the devkit's table is a MATLAB file: pip install 'distrain[ilsvrc]'") from None
    found = dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(_file(url)), mode="r:gz") as tar:
            taken = 0
            for info in tar:
                taken += info.size
                if taken > _DEVKIT_LIMIT:
                    raise UserError(f"{Store(url).name} unpacks to more than {_DEVKIT_LIMIT} bytes: this is no devkit")
                last = info.name.rpartition("/")[2]
                if last in (_TRUTH, _META) and (file := tar.extractfile(info)) is not None:
                    found[last] = file.read()
        synsets = loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        truth = [by_id[int(line)] for line in found[_TRUTH].decode().split()]
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError) and error.errno is not None:
            raise
        raise UserError(
            f"{Store(url).name} is not the devkit of ILSVRC-2012 ({type(error).__name__}: {error})"
        ) from None
    return truth, words
