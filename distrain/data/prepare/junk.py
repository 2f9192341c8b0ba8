"""Files and folders that systems leave beside images: never images, never classes.

One list for every kind of source, compared without regard to case.
"""

_JUNK_FOLDERS = {
    # macOS, in archives.
    "__macosx",
    # Windows.
    "$recycle.bin",
    "system volume information",
    # Linux, at the root of an ext file system.
    "lost+found",
    # Synology and QNAP.
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    # Spark, while it writes.
    "_temporary",
}
_JUNK_FILES = {
    # Windows.
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    # macOS; the name ends in a carriage return.
    "icon\r",
    # Picasa.
    "picasa.ini",
    # Spark, Hive and Dask.
    "_success",
    "_metadata",
    "_common_metadata",
}
# Alternate data streams of NTFS, as WSL and 7-Zip write them: cat.jpg:Zone.Identifier.
_JUNK_SUFFIXES = (":zone.identifier",)


def is_junk(path: str) -> bool:
    """Return whether a path is hidden or of the list, or lies in such a folder.

    Args:
        path: relative to the source, with `/` between its parts.
    """
    *folders, name = [part for part in path.lower().split("/") if part != "."]
    if any(_is_hidden(folder) or folder in _JUNK_FOLDERS for folder in folders):
        return True
    return (
        _is_hidden(name)
        or name in _JUNK_FOLDERS
        or name in _JUNK_FILES
        or name.endswith(_JUNK_SUFFIXES)
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".."
