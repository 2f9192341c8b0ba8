"""Which names are those of systems and programs, not of images."""

import pytest

from distrain.data.prepare.junk import is_junk, is_unfinished


@pytest.mark.parametrize(
    "path",
    [
        "__MACOSX/cat/._1.jpg", "cat/.DS_Store", ".Spotlight-V100", ".fseventsd", "Icon\r", "._cat",
        "Network Trash Folder", "cat/Thumbs.db", "ehthumbs_vista.db", "Desktop.ini", "$RECYCLE.BIN", "RECYCLER",
        "System Volume Information", "cat/1.jpg:Zone.Identifier", "lost+found", ".Trash-1000", ".directory",
        "cat/.nfs000001", "@eaDir", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/1.jpg@SynoEAStream", "#recycle",
        ".@__thumb", "@__thumb", "@Recently-Snapshot", ".zfs", ".git", ".svn", ".dvc", ".ipynb_checkpoints",
        "__pycache__", "_SUCCESS", "_metadata", ".part-0.parquet.crc", "_temporary", "_committed_123", ".picasa.ini",
        "LOST.DIR/1", "FOUND.000/FILE0000.CHK", "~snapshot/hourly.0/cat/1.jpg", "cat/@Transcode",
        "cat/~$list.xlsx", ":2eDS_Store", "cat/.1.jpg.Ab3dEf", ".nomedia",
    ],
)  # fmt: skip
def test_junk(path):
    assert is_junk(path)


@pytest.mark.parametrize(
    "path",
    [
        "cat/1.jpg", "cat/1 (conflicted copy).jpg", "cat/_1.jpg", "cat/1.jpg~", "recycle/1.jpg", "thumbs/1.jpg",
        "cat/desktop.jpg", "@home/1.jpg", "./cat/1.jpg", "cat/1.jpg.part", "metadata/1.jpg", "tmp/1.jpg",
        "found.jpg", "found.0001/1.jpg", "snapshot/1.jpg",
    ],
)  # fmt: skip
def test_no_junk(path):
    assert not is_junk(path)


def test_unfinished_downloads():
    for name in (
        "1.jpg.crdownload", "x.tar.PART", "1.jpg.1a2b.partial", "x.aria2", "x.tar.!qB", "x.tar.!ut",
        "1.jpg_.gstmp", "x.tar.incomplete",
    ):  # fmt: skip
        assert is_unfinished(name)
    for name in ("1.jpg", "part", "part-0.parquet", "x.part.jpg"):
        assert not is_unfinished(name)
