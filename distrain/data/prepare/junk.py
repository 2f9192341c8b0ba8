"""Files and folders that systems leave beside images: never images, never classes.

One list for every kind of source, compared without regard to case.
"""

import re

_JUNK_NAMES = {
    # Folders. macOS, in archives and on network drives.
    "__macosx",
    "network trash folder",
    "temporary items",
    # Windows.
    "$recycle.bin",
    "recycler",
    "system volume information",
    # Android, on memory cards.
    "lost.dir",
    # Linux, at the root of an ext file system.
    "lost+found",
    # Synology and QNAP.
    "@eadir",
    "@tmp",
    "@sharebin",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "@__thumb",
    "@transcode",
    # NetApp; its folders hold copies of all files.
    "~snapshot",
    # Python.
    "__pycache__",
    # Spark and Delta Lake.
    "_temporary",
    "_spark_metadata",
    "_delta_log",
    # Files. Windows.
    "thumbs.db",
    "thumbs.db:encryptable",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    # macOS; the name ends in a carriage return, which SMB maps to another character.
    "icon\r",
    "icon\uf00d",
    "desktop db",
    "desktop df",
    # Picasa and Paint Shop Pro.
    "picasa.ini",
    "pspbrwse.jbf",
    # Spark, Hive and Dask.
    "_success",
    "_metadata",
    "_common_metadata",
}
_JUNK_PREFIXES = (
    # Netatalk writes the dot of a hidden file as :2e.
    ":2e",
    # Lock files of office programs.
    "~$",
    # Databricks.
    "_started_",
    "_committed_",
)
_JUNK_SUFFIXES = (
    # Alternate data streams of NTFS, as WSL and 7-Zip write them.
    ":zone.identifier",
    # Synology.
    "@synoeastream",
    "@synoresource",
)
# Folders of what CHKDSK finds on a damaged disk.
_CHKDSK_FOLDER = re.compile(r"found\.\d{3}")
# Extensions of files that a browser, rclone or another program has not finished.
_UNFINISHED_EXTENSIONS = (
    "!qb",
    "!ut",
    "aria2",
    "crdownload",
    "download",
    "filepart",
    "gstmp",
    "incomplete",
    "opdownload",
    "part",
    "partial",
)


def is_junk(path: str) -> bool:
    """Return whether a path is hidden or of the list, or lies in such a folder.

    Args:
        path: relative to the source, with `/` between its parts.
    """
    return any(_is_junk_name(part) for part in path.lower().split("/"))


def is_unfinished(name: str) -> bool:
    """Return whether a file's name says that its download has not finished."""
    return name.rpartition(".")[2].lower() in _UNFINISHED_EXTENSIONS and "." in name


def _is_junk_name(name: str) -> bool:
    is_hidden = name.startswith(".") and name not in (".", "..")
    return (
        is_hidden
        or name in _JUNK_NAMES
        or name.startswith(_JUNK_PREFIXES)
        or name.endswith(_JUNK_SUFFIXES)
        or _CHKDSK_FOLDER.fullmatch(name) is not None
    )
