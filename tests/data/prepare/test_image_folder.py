"""Image folders as people have them: nested, with links, junk and empty folders."""

import os
import zipfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrain.data.prepare.image_folder import open_image_folder
from distrain.data.prepare.junk import is_junk
from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject
from distrain.data.storage.store import Store
from distrain.errors import UserError


def put(root: Path, *paths: str) -> str:
    """Write files, whose content is their path; a path that ends in / is a folder."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(path)
    return str(root)


def labelled(source):
    return [(block.path, source.classes[block.label]) for block in source.blocks]


def test_images_at_any_depth_belong_to_the_first_level(tmp_path):
    url = put(
        tmp_path, "cat/b.jpg", "cat/a/1.jpg", "cat/a.b/2.jpg", "cat/a/x/3.png",
        "dog/images/4.JPEG", "dog/5.jpg",
    )  # fmt: skip
    source = open_source(url).source
    assert labelled(source) == [
        ("cat/a/1.jpg", "cat"), ("cat/a/x/3.png", "cat"), ("cat/a.b/2.jpg", "cat"), ("cat/b.jpg", "cat"),
        ("dog/5.jpg", "dog"), ("dog/images/4.JPEG", "dog"),
    ]  # fmt: skip
    assert source.rejects == []
    assert source.notes == []
    assert source.reader.read_block(source.blocks[1])[0].data == b"cat/a/x/3.png"


def test_a_folder_without_an_image_is_no_class_and_is_named(tmp_path):
    url = put(
        tmp_path, "cat/1.jpg", "dog/1.jpg", "bare/", "deep/a/b/", "notes/todo.txt", "labels/cat/1.XML",
        "thumbs/Thumbs.db", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "lost+found/", "__MACOSX/._cat", ".git/1.jpg",
    )  # fmt: skip
    source = open_source(url).source
    assert source.classes == ("cat", "dog")
    assert [block.label for block in source.blocks] == [0, 1]
    assert source.rejects == []
    assert source.notes == [
        "5 folders hold no image, so they are no classes: bare, deep, labels, notes and "
        "1 more"
    ]
    put(tmp_path / "one", "cat/1.jpg", "dog/1.jpg", "bare/")
    (note,) = open_source(str(tmp_path / "one")).source.notes
    assert note == "the folder bare holds no image, so it is no class"


def test_junk_within_a_class_is_skipped_and_all_else_is_not(tmp_path):
    """A file that only its content shows to be no image is rejected when it is read."""
    url = put(
        tmp_path, "cat/1.jpg", "cat/Thumbs.db", "cat/desktop.ini", "cat/.DS_Store", "cat/@eaDir/1.jpg/M.jpg",
        "cat/noextension", "dog/2.jpg", "dog/3.jpg.crdownload", "dog/4.jpg.part",
    )  # fmt: skip
    source = open_source(url).source
    assert [block.path for block in source.blocks] == [
        "cat/1.jpg", "cat/noextension", "dog/2.jpg",
    ]  # fmt: skip
    assert source.rejects == [
        Reject("dog/3.jpg.crdownload", "an unfinished download"),
        Reject("dog/4.jpg.part", "an unfinished download"),
    ]


def test_other_files_beside_the_images_of_a_class_are_counted_by_kind(tmp_path):
    """As Tiny ImageNet has boxes in each class folder."""
    url = put(
        tmp_path,
        "n01/images/1.jpg",
        "n01/n01_boxes.txt",
        "n02/images/1.jpg",
        "n02/n02_boxes.TXT",
        "n02/more.zip",
    )
    source = open_source(url).source
    assert source.classes == ("n01", "n02")
    assert [block.path for block in source.blocks] == [
        "n01/images/1.jpg",
        "n02/images/1.jpg",
    ]
    assert source.rejects == []
    assert source.notes == [
        "passed over files that are no images by their names: 2 .txt "
        "(n01/n01_boxes.txt), 1 .zip (n02/more.zip)"
    ]


def test_a_class_of_files_without_extension_is_one(tmp_path):
    url = put(tmp_path, "cat/0001", "dog/img.0002")
    assert open_source(url).source.classes == ("cat", "dog")


def test_links_that_lead_back_are_named_and_others_are_followed(tmp_path):
    place = tmp_path / "photos"
    url = put(place, "cat/a/1.jpg", "dog/2.jpg")
    put(tmp_path, "elsewhere/deep/3.jpg")
    (place / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (place / "cat" / "a" / "self").symlink_to(".")
    (place / "cat" / "a" / "up").symlink_to("..")
    (place / "dog" / "all").symlink_to(place)
    (place / "me").symlink_to(place)
    (place / "dog" / "circle.jpg").symlink_to("circle.jpg")
    source = open_source(url).source
    assert labelled(source) == [
        ("cat/a/1.jpg", "cat"), ("cat/more/deep/3.jpg", "cat"), ("dog/2.jpg", "dog"),
    ]  # fmt: skip
    reason = "a link to a folder that it lies in"
    assert source.rejects == [
        Reject("cat/a/self", reason),
        Reject("cat/a/up", reason),
        Reject("dog/all", reason),
        Reject("me", reason),
        Reject("dog/circle.jpg", "a broken link or a device where an image should be"),
    ]


def test_links_between_two_classes_end(tmp_path):
    url = put(tmp_path / "photos", "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "photos" / "cat" / "x").symlink_to("../dog")
    (tmp_path / "photos" / "dog" / "y").symlink_to("../cat")
    source = open_source(url).source
    assert [block.path for block in source.blocks] == [
        "cat/1.jpg", "cat/x/2.jpg", "dog/2.jpg", "dog/y/1.jpg",
    ]  # fmt: skip
    assert [reject.name for reject in source.rejects] == ["cat/x/y", "dog/y/x"]


def test_folders_without_end_are_cut(tmp_path, monkeypatch):
    """A server may show a loop as folders with names of their own."""
    monkeypatch.setattr("distrain.data.prepare.image_folder._MAX_DEPTH", 3)
    url = put(tmp_path, "cat/1/2/3.jpg", "cat/1/2/3/4.jpg", "dog/1.jpg")
    source = open_source(url).source
    assert [block.path for block in source.blocks] == ["cat/1/2/3.jpg", "dog/1.jpg"]
    assert source.rejects == [Reject("cat/1/2/3", "a folder below 3 others")]


def test_a_zip_made_by_macos(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in ("photos/cat/1.jpg", "photos/cat/sub/2.jpg", "photos/dog/3.jpg"):
            file.writestr(name, b"x")
            file.writestr(f"__MACOSX/{name.replace('/', '/._', 1)}", b"x")
        file.writestr("photos/.DS_Store", b"x")
    zip_path = tmp_path / "photos.zip"
    source = open_source(f"zip://photos::{zip_path}").source
    assert labelled(source) == [
        ("cat/1.jpg", "cat"), ("cat/sub/2.jpg", "cat"), ("dog/3.jpg", "dog"),
    ]  # fmt: skip
    assert (source.notes, source.rejects) == ([], [])
    with pytest.raises(UserError) as raised:
        open_source(f"zip://::{zip_path}")
    assert str(raised.value) == (
        f"zip://::{zip_path} holds one class, photos, which holds 2 folders of images: "
        f"if they are the classes, pass zip://photos::{zip_path}"
    )


def test_the_root_of_splits_is_refused_with_a_folder_to_pass(tmp_path):
    url = put(
        tmp_path / "p", "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "test/4.jpg", "annotations/1.json",
    )  # fmt: skip
    message = rf"^{url} holds several splits \(train, test, val\): pass each one by itself, such as {url}/train$"
    with pytest.raises(UserError, match=message):
        open_source(url)
    assert open_source(f"{url}/train").source.classes == ("cat", "dog")
    for names in (("Train", "Validation"), ("train2017", "val2017")):
        url = put(tmp_path / names[0], *(f"{name}/cat/1.jpg" for name in names))
        with pytest.raises(UserError, match=f"several splits .{names[0]}, {names[1]}"):
            open_source(url)
    url = put(tmp_path / "m", "train/cat/1.jpg", "val/cat/1.jpg", "unlabelled/2.jpg")
    with pytest.raises(UserError, match=r"several splits \(train, val\)"):
        open_source(url)


def test_folders_that_differ_in_the_split_alone_are_refused(tmp_path):
    """As on Kaggle: seg_train/seg_train/sea and seg_test/seg_test/sea."""
    url = put(
        tmp_path, "seg_train/seg_train/sea/1.jpg", "seg_test/seg_test/sea/2.jpg", "seg_pred/seg_pred/3.jpg",
    )  # fmt: skip
    message = rf"^{url} holds several splits \(seg_train, seg_test\): pass each one by itself, such as {url}/seg_train$"
    with pytest.raises(UserError, match=message):
        open_source(url)


def test_classes_with_the_names_of_splits_are_classes_among_others(tmp_path):
    url = put(tmp_path, "train/1.jpg", "test/2.jpg", "bus/3.jpg", "bus/x/4.jpg")
    assert open_source(url).source.classes == ("bus", "test", "train")


def test_splits_within_the_classes_are_refused(tmp_path):
    url = put(
        tmp_path, "bottle/train/good/1.jpg", "bottle/test/bad/2.jpg", "nut/train/3.jpg"
    )
    with pytest.raises(
        UserError,
        match=r"several splits in its class folders .bottle/test, bottle/train.: put th",
    ):
        open_source(url)
    url = put(tmp_path / "one", "a/train/1.jpg", "b/train/images/2.jpg", "b/x/3.jpg")
    assert open_source(url).source.classes == ("a", "b")


def test_one_class_whose_folders_are_no_classes_says_so_alone(tmp_path):
    url = put(tmp_path, "cat/1.jpg", "cat/a/2.jpg", "cat/b/3.jpg")
    with pytest.raises(UserError, match=r"holds one class, cat: training needs"):
        open_source(url)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ("data/train/0.parquet", "data/test/0.parquet", "README.md"),
            r"holds its .parquet or .tar files in folders \(data/test, data/train\): "
            r"pass one of them, such as .*/data/test$",
        ),
        (
            ("default/train/0000.PARQUET", "assets/logo.png"),
            r"in folders \(default/train\): pass [^ ]*/default/train$",
        ),
        (("wds/train-0.tar", "docs/a.md"), r"in folders \(wds\): pass [^ ]*/wds$"),
        (
            ("x/label=cat/part-0.parquet", "x/label=dog/part-0.parquet"),
            r"partitioned by the column label \(x/label=cat, x/label=dog\), which its",
        ),
        (
            ("split=train/0.parquet", "split=test/0.parquet"),
            r"pass one of them, such as .*/split=test$",
        ),
    ],
)
def test_folders_of_shards_are_named(tmp_path, paths, message):
    url = put(tmp_path, *paths)
    with pytest.raises(UserError, match=message):
        open_source(url)


@pytest.mark.parametrize("name", ["a.AVIF", "a.jp2", "a.pgm", "a.jfif", "a.heic"])
def test_images_of_rarer_formats_outside_the_classes_are_named(tmp_path, name):
    url = put(tmp_path, "cat/1.jpg", "dog/2.jpg", name, "list.txt")
    reason = "an image outside the class folders"
    assert open_source(url).source.rejects == [Reject(name, reason)]


def test_classes_that_look_the_same_are_noted(tmp_path):
    url = put(
        tmp_path, "caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "Dog/1.jpg", "dog/2.jpg", "owl/1.jpg", "owl - Copy/2.jpg",
    )  # fmt: skip
    source = open_source(url).source
    assert len(source.classes) == 6
    assert sorted(source.notes) == [
        r"'Dog' and 'dog' (and 1 more) look the same and are different classes: "
        "give them one name if one class is meant",
        "the class 'owl - Copy' looks like a copy of the class 'owl': if it is one, delete it",
    ]  # fmt: skip


def test_a_bucket_gives_the_same_as_a_disk(tmp_path):
    """But for empty folders, which it cannot have."""
    paths = [
        "cat/1.jpg",
        "cat/a/2.jpg",
        "dog/3.jpg",
        "notes/a.txt",
        "@eaDir/1.jpg/M.jpg",
    ]
    here = open_source(put(tmp_path, *paths)).source
    files = fsspec.filesystem("memory")
    try:
        for path in paths:
            files.pipe_file(f"/photos/{path}", path.encode())
        there = open_source("memory://photos").source
        assert there.blocks == here.blocks
        assert (there.classes, there.notes) == (here.classes, here.notes)
    finally:
        files.store.clear()
        files.pseudo_dirs[:] = [""]


NAMES = st.sampled_from(
    ["cat", "dog", "a b", "Cat", "@eaDir", ".hidden", "__MACOSX", "1.jpg", "2.PNG", "x", "notes.txt", "Thumbs.db"]
)  # fmt: skip


@given(st.lists(st.lists(NAMES, min_size=2, max_size=4).map(tuple), max_size=12))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_tree_gives_what_a_plain_walk_gives(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    for parts in paths:
        path = root.joinpath(*parts)
        # A name may be taken by a file or a folder already.
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    # A folder of texts alone is no class.
    images_by_class: dict[str, list[str]] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = (Path(folder) / name).relative_to(root)
            is_image = path.suffix != ".txt" and not is_junk(path.as_posix())
            if path.parts[:-1] and is_image:
                images_by_class.setdefault(path.parts[0], []).append(path.as_posix())
    wanted = {name: sorted(found) for name, found in images_by_class.items()}
    try:
        source = open_image_folder(Store(str(root)))
    except UserError:
        source = None
    if source is None:
        assert len(wanted) == 1, "its folders look like the classes"
        return
    found_by_class = {name: [] for name in source.classes}
    for path, name in labelled(source):
        found_by_class[name].append(path)
    assert list(found_by_class) == sorted(wanted)
    assert {name: sorted(found) for name, found in found_by_class.items()} == wanted
