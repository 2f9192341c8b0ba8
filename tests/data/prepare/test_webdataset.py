"""WebDataset shards as other makers of tars write them."""

import io
import itertools
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import tar_of, webdataset

from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject
from distrain.errors import UserError


def opened(place, members, name="x.tar"):
    (place / name).write_bytes(tar_of(members))
    return open_source(str(place / name)).source


def found(source):
    """Name, content and class of each image."""
    rows = [row for block in source.blocks for row in source.reader.read_block(block)]
    return [
        (row.name.partition("/")[2], row.data, source.classes[row.label])
        for row in rows
    ]


PARTS = [
    ("0000.jpg", b"p"),
    ("0000.cls", b"0"),
    ("0001.jpg", b"q"),
    ("0001.cls", b"1"),
]
EXPECTED = [("0000.jpg", b"p", "0"), ("0001.jpg", b"q", "1")]


def test_hidden_files_of_macos_are_passed_over(tmp_path):
    """As bsdtar writes them on a Mac: ._name before each name."""
    members = [("./._.", b"mac")]
    for name, data in PARTS:
        folder = f"./{name}"
        members += [(f"./._{name}", b"mac"), (folder, data)]
    source = opened(tmp_path, members)
    assert [row[1:] for row in found(source)] == [row[1:] for row in EXPECTED]
    assert source.rejects == []


def test_splits_in_one_archive_are_refused(tmp_path):
    members = [(f"d/{f}/{n}", b) for f in ("val", "train") for n, b in PARTS]
    message = r"x.tar holds several splits \(train, val\): write each one to archives of its own$"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, members)
    assert len(found(opened(tmp_path, members[:4]))) == 2


@pytest.mark.parametrize(
    "junk",
    [
        "README",
        "LICENSE",
        ".DS_Store",
        "__MACOSX/._0000.jpg",
        "Thumbs.db",
        "PaxHeaders.7/0000.jpg",
        "dir/PaxHeader/0001.jpg",
        "@eaDir/0000.jpg",
        "__meta__/0000.jpg",
        "notes.txt",
        "index.json",
        "0000.",
    ],
)
@pytest.mark.parametrize("position", range(5))
def test_members_that_are_no_parts_of_samples(tmp_path, junk, position):
    members = list(PARTS)
    members.insert(position, (junk, b"{}"))
    source = opened(tmp_path, members)
    assert found(source) == EXPECTED
    assert source.rejects == []


def test_hidden_folders_that_hold_everything_came_with_the_archive(tmp_path):
    source = opened(
        tmp_path, [(f"home/.cache/data/{name}", data) for name, data in PARTS]
    )
    assert len(found(source)) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_members_in_any_order(tmp_path, order):
    source = opened(tmp_path, [PARTS[i] for i in order])
    assert sorted(found(source)) == EXPECTED
    assert source.rejects == []


def test_samples_keep_the_order_of_their_first_members(tmp_path):
    keys = ["2", "0", "1"]
    members = [(f"{key}.jpg", key.encode()) for key in keys]
    members += [(f"{key}.cls", b"%d" % (key == "0")) for key in sorted(keys)]
    source = opened(tmp_path, members)
    assert [row[1].decode() for row in found(source)] == keys


names = st.text("ab1-_ \u00e9", min_size=1, max_size=4)
folders = st.sampled_from(["", "a.b/", "x/y/"])
JUNK = ["._0.jpg", "a/.DS_Store", "README", "@eaDir/0.jpg", "x/Thumbs.db", "notes.txt"]


@st.composite
def shards(draw):
    """Members of a shard in any order, and what they should be read as."""
    keys = draw(st.lists(st.builds("{}{}".format, folders, names), unique=True))
    members = [(name, b"junk") for name in draw(st.lists(st.sampled_from(JUNK)))]
    expected = []
    for i, key in enumerate(keys):
        label = draw(st.integers(0, 3))
        image = f"{key}.{draw(st.sampled_from(['jpg', 'PNG', 'webp', 'v2.jpeg']))}"
        extension = draw(st.sampled_from(["cls", "json", "txt", None]))
        text = f'{{"label": {label}}}' if extension == "json" else str(label)
        members.append((image, b"%d" % i))
        if extension is not None:
            members.append((f"{key}.{extension}", text.encode()))
        if extension in ("cls", "json"):
            expected.append((image, b"%d" % i, str(label)))
    return draw(st.permutations(members)), expected


@settings(max_examples=20)
@given(shards())
def test_shards_of_random_members(made):
    members, expected = made
    with tempfile.TemporaryDirectory() as place:
        if len({row[2] for row in expected}) < 2 or expected[0][2] == "0":
            members = [*members, ("end/0.jpg", b"end"), ("end/0.cls", b"9")]
            expected = [*expected, ("end/0.jpg", b"end", "9")]
        source = opened(Path(place), members)
        assert sorted(found(source)) == sorted(expected)
        images = {name for name, _ in members if name not in JUNK}
        images = {name for name in images if not name.endswith(("cls", "json", "txt"))}
        rejected = {reject.name.removeprefix("x.tar/") for reject in source.rejects}
        replaced = {r.name for r in source.rejects if r.reason.startswith("replaced")}
        assert {name for name, _, _ in expected} | rejected == images | {
            name.removeprefix("x.tar/") for name in replaced
        }


def test_a_member_that_was_appended_again_replaces_the_earlier_one(tmp_path):
    """As `tar -r` and `tar -u` leave it; tar unpacks the last one."""
    for name, data in PARTS:
        (tmp_path / name).write_bytes(data)
    names = [name for name, _ in PARTS]
    tar = ["tar", "-C", tmp_path]
    subprocess.run([*tar, "-cf", tmp_path / "x.tar", *names], check=True)
    (tmp_path / "0000.jpg").write_bytes(b"new")
    (tmp_path / "0000.cls").write_bytes(b"1")
    subprocess.run([*tar, "-rf", tmp_path / "x.tar", *names[:2]], check=True)
    source = open_source(str(tmp_path / "x.tar")).source
    assert found(source) == [("0000.jpg", b"new", "1"), EXPECTED[1]]
    assert source.rejects == [
        Reject(f"x.tar/{name}", "replaced by a later member of the same name")
        for name in names[:2]
    ]


def test_a_member_appended_by_another_spelling(tmp_path):
    source = opened(tmp_path, [*PARTS, ("./0000.jpg", b"new")])
    assert [row[1] for row in found(source)] == [b"new", b"q"]
    assert len(source.rejects) == 1


def test_equal_keys_in_two_shards_are_two_samples(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of(PARTS))
    (tmp_path / "1.tar").write_bytes(tar_of(PARTS))
    assert len(open_source(str(tmp_path)).source.blocks) == 4


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_formats_of_tar_and_long_names(tmp_path, format):
    sink = io.BytesIO()
    folder = "long/" * 25
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in PARTS:
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            if format == tarfile.PAX_FORMAT:
                info.pax_headers = {"SCHILY.xattr.com.apple.provenance": "x"}
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(sink.getvalue())
    source = open_source(str(tmp_path / "x.tar")).source
    assert [row[1] for row in found(source)] == [b"p", b"q"]


def test_an_archive_by_tar_itself_of_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name, data in PARTS:
        (tmp_path / "data" / name).write_bytes(data)
    subprocess.run(
        ["tar", "--format=v7", "-C", tmp_path / "data", "-cf", tmp_path / "x.tar", "."],
        check=True,
    )
    source = open_source(str(tmp_path / "x.tar")).source
    assert sorted(row[1] for row in found(source)) == [b"p", b"q"]


def test_a_backup_by_tar_has_the_names_of_its_files(tmp_path):
    """GNU tar writes times where other formats have the first part of a name."""
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    command = ["tar", "--format=gnu", "-C", tmp_path / "data", "--label=all"]
    for more in ([], [f"--listed-incremental={tmp_path / 'list'}"]):
        path = tmp_path / "x.tar"
        subprocess.run([*command, *more, "-cf", path, "."], check=True)
        source = open_source(str(path)).source
        assert source.classes == ("cat", "dog")
        assert [row[0] for row in found(source)] == ["./cat/1.jpg", "./dog/1.jpg"]
        assert source.rejects == []


def test_links_say_how_to_archive_again(tmp_path):
    for name, data in PARTS:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "0002.jpg").hardlink_to(tmp_path / "0001.jpg")
    (tmp_path / "0003.jpg").symlink_to("0001.jpg")
    names = [*(name for name, _ in PARTS), "0002.jpg", "0003.jpg"]
    subprocess.run(
        ["tar", "-C", tmp_path, "-cf", tmp_path / "x.tar", *names], check=True
    )
    source = open_source(str(tmp_path / "x.tar")).source
    assert source.rejects == [
        Reject(
            "x.tar/0002.jpg", "a link: archive it again with tar --hard-dereference"
        ),
        Reject("x.tar/0003.jpg", "a link: archive it again with tar --dereference"),
    ]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cls", b"1"),
        ("cls", b" 1\n"),
        ("cls", b"1.0\r\n"),
        ("cls", b"\xef\xbb\xbf1"),
        ("CLS", b"001"),
        ("label", b"1"),
        ("class", b"1"),
        ("json", b'{"label": 1}'),
        ("json", b'{"cls": 1.0}'),
        ("json", b'{"label": "1"}'),
        ("json", b'{"label": null, "class": 1, "caption": "a cat"}'),
        ("json", b'{"target": 1}'),
    ],
)
def test_numbers_as_labels(tmp_path, name, label):
    source = opened(tmp_path, [*PARTS, ("a.b/x.jpg", b"r"), (f"a.b/x.{name}", label)])
    assert found(source) == [*EXPECTED, ("a.b/x.jpg", b"r", "1")]
    assert source.classes == ("0", "1")


@pytest.mark.parametrize(
    "label",
    [b"", b"1.5", b"\x80\x04K\x03.", b"nan", b"inf", b"a\nb", b"x" * 300, b"9" * 99],
)
def test_what_is_no_label(tmp_path, label):
    source = opened(tmp_path, [*PARTS, ("x.jpg", b"r"), ("x.cls", label)])
    assert found(source) == EXPECTED
    assert source.rejects == [Reject("x.tar/x.jpg", "its .cls holds no label")]


def test_names_as_labels(tmp_path):
    labels = [
        ("cls", b"golden retriever\n"),
        ("json", json.dumps({"label": "golden eagle"}).encode()),
        ("cls", b"tabby cat"),
        ("cls", b"tabby cat"),
    ]
    members = [
        member
        for i, (extension, label) in enumerate(labels)
        for member in ((f"{i}.jpg", b"x"), (f"{i}.{extension}", label))
    ]
    source = opened(tmp_path, members)
    assert source.classes == ("golden eagle", "golden retriever", "tabby cat")
    assert [block.label for block in source.blocks] == [1, 0, 2, 2]


def test_booleans_as_labels(tmp_path):
    members = [
        ("0.jpg", b"x"),
        ("0.json", b'{"label": true}'),
        ("1.jpg", b"x"),
        ("1.json", b'{"label": false}'),
    ]
    source = opened(tmp_path, members)
    assert source.classes == ("False", "True")
    assert [block.label for block in source.blocks] == [1, 0]


def test_numbers_and_names_are_not_mixed(tmp_path):
    with pytest.raises(
        UserError, match=r"such as 0 of x.tar/0000.jpg and 'cat' of x.tar/x.jpg: labels"
    ):
        opened(tmp_path, [*PARTS, ("x.jpg", b"r"), ("x.cls", b"cat")])


def test_captions_are_no_classes(tmp_path):
    members = [
        member
        for i in range(12)
        for member in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"photo %d of a cat" % i))
    ]
    with pytest.raises(UserError, match="as many classes as images, 12"):
        opened(tmp_path, members)


def test_labels_below_zero_and_from_one(tmp_path):
    members = [
        member
        for i, label in enumerate((1, 2, -1))
        for member in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"%d" % label))
    ]
    source = opened(tmp_path, members)
    assert source.rejects == [Reject("x.tar/2.jpg", "label -1: no label")]
    assert source.classes == ("0", "1", "2")
    (note,) = source.notes
    assert "are labels counted from 1?" in note
    with pytest.raises(UserError, match="all labels of .*x.tar are -1"):
        opened(tmp_path, members[4:])


def test_an_image_whose_name_has_more_than_one_dot(tmp_path):
    members = [
        *PARTS,
        ("2.img.JPG", b"r"),
        ("2.cls", b"1"),
        ("3.left.jpg", b"x"),
        ("3.right.jpg", b"x"),
        ("3.cls", b"1"),
    ]
    source = opened(tmp_path, members)
    assert found(source) == [*EXPECTED, ("2.img.JPG", b"r", "1")]
    assert source.rejects == [
        Reject("x.tar/3.left.jpg", "2 images in one sample"),
        Reject("x.tar/3.right.jpg", "2 images in one sample"),
    ]


def test_images_of_rarer_formats(tmp_path):
    """They count in a sample that has no usual image; none is lost."""
    members = [
        *PARTS,
        ("2.avif", b"r"),
        ("2.cls", b"1"),
        ("3.heic", b"x"),
        ("0001.pgm", b"depth"),
    ]
    source = opened(tmp_path, members)
    assert found(source) == [*EXPECTED, ("2.avif", b"r", "1")]
    assert source.rejects == [Reject("x.tar/3.heic", "no label")]


@pytest.mark.parametrize(
    "extension", ["png", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
)
def test_every_extension_of_images(tmp_path, extension):
    source = opened(tmp_path, [*PARTS, (f"x.{extension}", b"r"), ("x.cls", b"0")])
    assert len(source.blocks) == 3


def test_shards_by_webdataset_with_members_shuffled_are_the_same_set(tmp_path):
    from shapes import images

    place = webdataset(tmp_path, images(4))
    before = sorted(found(open_source(place).source))
    for path in sorted((tmp_path / "wds").iterdir()):
        with tarfile.open(path) as tar:
            members = [(info.name, tar.extractfile(info).read()) for info in tar]
        random.Random(0).shuffle(members)
        path.write_bytes(tar_of(members))
    source = open_source(place).source
    assert sorted(found(source)) == before
    assert source.rejects == []
