import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import bomb, encoded, lying, picture
from shapes import CLASSES, SHAPES, folder, hub, images, tar_of, tar_of_tars, webdataset

from distrain.data.prepare import row_groups as row_groups_module
from distrain.data.prepare import source as source_module
from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject, Sample
from distrain.errors import UserError


def samples(source):
    rows = [row for block in source.blocks for row in source.reader.read_block(block)]
    return sorted((row.label, row.data) for row in rows if isinstance(row, Sample))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_images(tmp_path, shape):
    found = images()
    source, columns = open_source(SHAPES[shape](tmp_path, found))
    assert samples(source) == sorted((image.label, image.data) for image in found)
    assert source.rejects == []
    assert source.classes == (("0", "1", "2") if shape == "webdataset" else CLASSES)
    assert (columns is not None) == (shape == "hub")
    assert sum(block.num_rows for block in source.blocks) == len(found)


def test_one_file_or_a_pattern(tmp_path):
    found = images()
    hub(tmp_path, found)
    webdataset(tmp_path, found)
    one = open_source(str(tmp_path / "hub" / "train-00001-of-00003.parquet")).source
    some = open_source(str(tmp_path / "hub" / "train-0000[12]*")).source
    tars = open_source(str(tmp_path / "wds" / "*-0001.tar")).source
    assert [
        sum(block.num_rows for block in source.blocks) for source in (one, some, tars)
    ] == [20, 40, 25]


def test_a_pattern_that_means_other_files(tmp_path):
    place = Path(folder(tmp_path, images(2)))
    (place / "LICENSE").write_text("free")
    assert open_source(f"{place}/*").source.format_name == "image folder", (
        "it means the folder all the same"
    )
    with pytest.raises(UserError, match="no images in"):
        open_source(f"{place}/{CLASSES[0]}/*")


def test_several_splits_in_one_folder_are_not_mixed(tmp_path):
    hub(tmp_path, images())
    (tmp_path / "hub" / "train-00002-of-00003.parquet").rename(
        tmp_path / "hub" / "validation-00000-of-00001.parquet"
    )
    with pytest.raises(
        UserError,
        match=r"several splits \(train, validation\): take one of them, such as .*train-",
    ):
        open_source(str(tmp_path / "hub"))


def test_an_option_for_another_kind_of_source_is_not_ignored(tmp_path):
    found = images(2)
    (tmp_path / "labels.txt").write_text("a\n" * 6)
    labels = {"labels_url": str(tmp_path / "labels.txt")}
    for shape, kind in (
        ("folder", "is an image folder"),
        ("hub", "holds Parquet files"),
    ):
        url = SHAPES[shape](tmp_path, found)
        with pytest.raises(UserError, match=f"^labels are for .* {kind}.*: lea"):
            open_source(url, **labels)
    url = tar_of_tars(tmp_path, found)
    with pytest.raises(UserError, match=r"^labels .*holds one archive per class: lea"):
        open_source(url, **labels)
    for shape in ("folder", "webdataset", "archive of archives"):
        (tmp_path / shape).mkdir()
        url = SHAPES[shape](tmp_path / shape, found)
        for option in ("image_column", "label_column"):
            with pytest.raises(UserError, match=r"for Parquet files, and .* has none"):
                open_source(url, **{option: "x"})


def test_a_folder_in_the_place_of_a_list_is_one_sentence(tmp_path):
    place = folder(tmp_path, images(2))
    with pytest.raises(
        UserError, match=r"cannot read .* \(Is a directory\): check the"
    ):
        open_source(place, names_url=place)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing at .*none.tar: check the path"):
        open_source(str(tmp_path / "none.tar"))
    (tmp_path / "train").mkdir()
    with pytest.raises(
        UserError, match=r"no file matches .*tr\*: a pattern is for .tar and .parquet"
    ):
        open_source(str(tmp_path / "tr*"))
    with pytest.raises(UserError, match="no folder at"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match="nothing at http.*, or its host does not ans"):
        open_source("http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("000.JPG", "an image: pass the folder that holds the folders of the classes"),
        ("bare.tar.gz", "a compressed archive: unpack it to a folder or a plain .tar"),
        (
            "notes.txt",
            "neither a folder nor a .tar or .parquet file: pass one of these",
        ),
    ],
)
def test_another_file_is_called_what_it_is(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} is {kind}$"):
        open_source(str(tmp_path / name))


def test_a_folder_names_what_it_leaves_out(tmp_path, monkeypatch):
    found = images(2)
    place = Path(folder(tmp_path, found))
    (place / "readme.txt").write_text("x")
    (place / "stray.JPG").write_bytes(b"x")
    (place / ".hidden").write_text("x")
    (place / CLASSES[1] / "huge.png").write_bytes(b"x" * 9000)
    monkeypatch.setattr("distrain.data.prepare.image_folder.MAX_FILE_BYTES", 8000)
    source = open_source(str(place)).source
    assert samples(source) == sorted((image.label, image.data) for image in found)
    assert source.rejects == [
        Reject("stray.JPG", "an image outside the class folders"),
        Reject(f"{CLASSES[1]}/huge.png", "9000 bytes are over the limit of 8000"),
    ]


# --- archives


def labelled(found):
    """Members as WebDataset names them."""
    return [
        member
        for i, im in enumerate(found)
        for member in ((f"{i}.jpg", im.data), (f"{i}.cls", b"%d" % im.label))
    ]


def hostile(files):
    """A tar with these files, and members that nobody should unpack."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [
            *files,
            ("/etc/0001.jpg", b"abs"),
            ("a/../../0002.jpg", b"up"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        kinds = {
            "sym": tarfile.SYMTYPE,
            "hard": tarfile.LNKTYPE,
            "dev": tarfile.CHRTYPE,
            "pipe": tarfile.FIFOTYPE,
        }
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    return sink.getvalue()


def test_members_that_lead_elsewhere_are_refused_and_counted(tmp_path):
    found = images(2)
    files = [
        (f"{i}.{kind}", data)
        for i, im in enumerate(found)
        for kind, data in (("jpg", im.data), ("cls", b"%d" % im.label))
    ]
    (tmp_path / "x.tar").write_bytes(hostile(files))
    source = open_source(str(tmp_path / "x.tar")).source
    assert samples(source) == sorted((image.label, image.data) for image in found)
    assert source.rejects == [
        Reject("x.tar//etc/0001.jpg", "its name leads out of the archive"),
        Reject("x.tar/a/../../0002.jpg", "its name leads out of the archive"),
        Reject("x.tar/sym.jpg", "a link: archive it again with tar --dereference"),
        Reject(
            "x.tar/hard.jpg", "a link: archive it again with tar --hard-dereference"
        ),
        Reject("x.tar/dev.jpg", "a device or another special file"),
        Reject("x.tar/pipe.jpg", "a device or another special file"),
    ]


def test_a_sparse_member_is_refused(tmp_path):
    """It claims a terabyte and holds nothing."""
    (tmp_path / "hole.jpg").touch()
    with (tmp_path / "hole.jpg").open("r+b") as file:
        file.truncate(1 << 40)
    subprocess.run(
        ["tar", "--sparse", "-cf", tmp_path / "x.tar", "-C", tmp_path, "hole.jpg"],
        check=True,
    )
    with pytest.raises(UserError, match="a sparse file"):
        open_source(str(tmp_path / "x.tar"))


def test_members_that_claim_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.data.prepare.tar_members.MAX_FILE_BYTES", 8000)
    found = images(2)
    files = [
        (f"{i}.{kind}", data)
        for i, im in enumerate(found)
        for kind, data in (("jpg", im.data), ("cls", b"%d" % im.label))
    ]
    (tmp_path / "x.tar").write_bytes(
        tar_of([*files, ("big.jpg", bytes(9000)), ("big.cls", b"0")])
    )
    source = open_source(str(tmp_path / "x.tar")).source
    assert source.rejects == [
        Reject("x.tar/big.jpg", "9000 bytes are over the limit of 8000")
    ]


def test_an_archive_that_is_cut_damaged_or_compressed_is_said(tmp_path):
    path = Path(tar_of_tars(tmp_path, images(3)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match="is truncated or damaged .*download it again"):
        open_source(str(path))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        second = tar.getmembers()[1].offset
        data_start = tar.getmembers()[1].offset_data
    path.write_bytes(whole[: data_start + 1])
    with pytest.raises(UserError, match="damaged .it ends inside .*download it again"):
        open_source(str(path))
    damaged = bytearray(whole)
    damaged[second + 10] ^= (
        1  # its checksum is wrong now; tarfile itself would end here without a word
    )
    path.write_bytes(bytes(damaged))
    with pytest.raises(
        UserError, match=f"is truncated or damaged .no header at byte {second}"
    ):
        open_source(str(path))
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"PK\3\4", "zip"), (b"Rar!", "rar")):
        (tmp_path / "x.tar").write_bytes(magic + bytes(600))
        with pytest.raises(UserError, match=rf"is compressed \({kind}\): unpack it"):
            open_source(str(tmp_path / "x.tar"))
    (tmp_path / "y.tar").write_bytes(b"hello" * 300)
    with pytest.raises(UserError, match="is not a tar archive"):
        open_source(str(tmp_path / "y.tar"))


def test_a_header_that_claims_a_gigabyte_is_not_read(tmp_path):
    """A long name of 2 GB, in a file that has them (as a hole)."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate((2 << 30) + 4096)
    code = "from distrain.data.prepare.open import open_source; open_source(__import__('sys').argv[1])"
    child = run_measured(code, str(tmp_path / "x.tar"))
    assert "a header of 2147483648 bytes" in child.error
    assert child.mib < 50


def test_webdataset_samples_without_image_or_label_are_named(tmp_path):
    good = [
        (f"{i}.{kind}", data)
        for i, im in enumerate(images(1))
        for kind, data in (("jpg", im.data), ("cls", b"%d" % im.label))
    ]
    other = [
        ("a.jpg", b"x"), ("b.cls", b"1"), ("c.jpg", b"x"), ("c.cls", b"1.5"), ("d.jpg", b"x"), ("d.png", b"x"),
        ("d.cls", b"1"), ("e.jpg", b"x"), ("e.json", b"{}"), ("f.jpg", b"x"), ("f.cls", b"-1"), ("g.txt", b"x"),
        ("h.jpg", b"x"), ("h.jpg", b"y"), ("h.cls", b"0"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(good + other))
    source = open_source(str(tmp_path / "x.tar")).source
    assert len(source.blocks) == 4, "the three, and h"
    assert source.rejects == [
        Reject("x.tar/h.jpg", "replaced by a later member of the same name"),
        Reject("x.tar/a.jpg", "no label"),
        Reject("x.tar/b.", "0 images in one sample"),
        Reject("x.tar/c.jpg", "its .cls holds no label"),
        Reject("x.tar/d.jpg", "2 images in one sample"),
        Reject("x.tar/d.png", "2 images in one sample"),
        Reject("x.tar/e.jpg", "its .json holds no label"),
        Reject("x.tar/f.jpg", "label -1: no label"),
    ]
    (tmp_path / "y.tar").write_bytes(tar_of([("a.txt", b"x")]))
    with pytest.raises(
        UserError, match="y.tar holds no labeled images in the WebDataset.*--labels"
    ):
        open_source(str(tmp_path / "y.tar"))


def test_what_stands_behind_the_end_of_an_archive_is_not_lost_in_silence(tmp_path):
    """Two archives one after the other; a hole where a header should be; no end mark at all."""
    first, second = tar_of(labelled(images(1))), tar_of(labelled(images(2)))
    path = tmp_path / "x.tar"
    path.write_bytes(first + second)
    with pytest.raises(
        UserError, match=r"x\.tar has data after its end mark at byte \d+: if cat"
    ):
        open_source(str(path))
    path.write_bytes(first[: 512 * 3] + bytes(1024) + first[512 * 3 :])
    with pytest.raises(UserError, match="is truncated or damaged"):
        open_source(str(path))
    path.write_bytes(first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512))
    with pytest.raises(UserError, match="is truncated or damaged .no header at byte"):
        open_source(str(path))
    path.write_bytes(first + bytes(3 << 20))
    assert len(open_source(str(path)).source.blocks) == 3, "zeros are padding"


def test_headers_that_would_never_end(tmp_path):
    """A negative size, which leads back to itself; long names of long names; labels that are no numbers."""
    info = tarfile.TarInfo("x.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(UserError, match="is (truncated or damaged|not a tar)"):
        open_source(str(path))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1
    path.write_bytes(
        (name.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511)) * 3000 + bytes(1024)
    )
    with pytest.raises(UserError, match="is (truncated or damaged|not a tar)"):
        open_source(str(path))
    texts = [
        b'{"label": Infinity}',
        b'{"label": 3.7}',
        b"[" * 60_000,
        b'{"label": true',
        b'{"label": 2.0}',
    ]
    members = [
        part
        for i, text in enumerate(texts)
        for part in ((f"{i}.jpg", b"x"), (f"{i}.json", text))
    ]
    path.write_bytes(tar_of([*members, ("a.jpg", b"x"), ("a.cls", b"0")]))
    source = open_source(str(path)).source
    assert [block.label for block in source.blocks] == [2, 0]
    assert {reject.reason for reject in source.rejects} == {"its .json holds no label"}
    assert len(source.rejects) == 4


def test_dots_in_a_key_and_empty_members_are_named(tmp_path):
    members = [
        *labelled(images(1)),
        ("photo.v2.jpg", b"x"),
        ("photo.v2.cls", b"0"),
        ("e.jpg", b""),
        ("e.cls", b"0"),
    ]
    extra = [("f.jpg", b"x"), ("f.cls", b"1"), ("f.seg.png", b"x")]
    (tmp_path / "x.tar").write_bytes(tar_of(members + extra))
    source = open_source(str(tmp_path / "x.tar")).source
    assert len(source.blocks) == 4, (
        "a second image with a name of its own takes nothing from f"
    )
    assert source.rejects == [
        Reject("x.tar/photo.v2.jpg", "more than one dot in its name"),
        Reject("x.tar/e.jpg", "no bytes"),
    ]


def test_links_to_folders_are_folders(tmp_path):
    found = images(2)
    place = Path(folder(tmp_path, found))
    (place / CLASSES[1]).rename(tmp_path / "elsewhere")
    (place / CLASSES[1]).symlink_to(tmp_path / "elsewhere")
    (place / CLASSES[0] / "broken.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(place / CLASSES[0] / "pipe.jpg")
    source = open_source(str(place)).source
    assert samples(source) == sorted((image.label, image.data) for image in found)
    reason = "a broken link or a device where an image should be"
    assert source.rejects == [
        Reject(f"{CLASSES[0]}/{name}.jpg", reason) for name in ("broken", "pipe")
    ]


def test_a_named_file_is_no_pattern(tmp_path):
    parquet(tmp_path / "y1.parquet", [0, 1])
    parquet(tmp_path / "y[1].parquet", [0, 1, 1])
    assert open_source(str(tmp_path / "y[1].parquet")).source.blocks[0].num_rows == 3


# --- labels and names


@pytest.fixture
def val(tmp_path):
    """`ILSVRC2012_img_val.tar`, out of order, and the class of each file."""
    found = images(4)
    order = np.random.default_rng(0).permutation(len(found))
    files = [
        (f"ILSVRC2012_val_{i + 1:08d}.JPEG", found[k]) for i, k in enumerate(order)
    ]
    (tmp_path / "val.tar").write_bytes(
        tar_of([(name, image.data) for name, image in reversed(files)])
    )
    return tmp_path, found, files


def test_a_list_of_synsets_by_file_order(val):
    place, found, files = val
    (place / "labels.txt").write_text(
        "".join(f"{CLASSES[image.label]}\n" for _, image in files)
    )
    source = open_source(
        str(place / "val.tar"), labels_url=str(place / "labels.txt")
    ).source
    assert samples(source) == sorted((image.label, image.data) for image in found)
    assert source.classes == CLASSES
    (place / "labels.txt").write_text(f"{CLASSES[0]}\n" * 11)
    with pytest.raises(UserError, match="the list has 11 labels for 12 files"):
        open_source(str(place / "val.tar"), labels_url=str(place / "labels.txt"))


def test_a_table_of_files_and_synsets(val):
    place, found, files = val
    with (place / "LOC_val_solution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, image in files[1:]:
            writer.writerow(
                [name.removesuffix(".JPEG"), f"{CLASSES[image.label]} 85 1 499 272"]
            )
    source = open_source(
        str(place / "val.tar"), labels_url=str(place / "LOC_val_solution.csv")
    ).source
    left = files[0][1]
    assert samples(source) == sorted(
        (image.label, image.data) for image in found if image is not left
    )
    assert source.rejects == [
        Reject(f"val.tar/{files[0][0]}", "the list has no label for it")
    ]


def test_a_list_tells_files_of_one_name_apart(tmp_path):
    one, two, three = (im.data for im in images(1))
    (tmp_path / "x.tar").write_bytes(
        tar_of([("a/1.jpg", one), ("b/1.jpg", two), ("c/1.jpg", three)])
    )
    (tmp_path / "labels.txt").write_text("a/1.jpg cat\nb/1.jpg dog\n")
    source = open_source(
        str(tmp_path / "x.tar"), labels_url=str(tmp_path / "labels.txt")
    ).source
    assert samples(source) == [(0, one), (1, two)]
    assert source.rejects == [Reject("x.tar/c/1.jpg", "the list has no label for it")]


def devkit(place, files):
    """As the real one: ids are not in the order of synsets, and inner nodes stand beside the leaves."""
    from scipy.io import savemat

    kinds = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
    ]
    words = {
        "n01440764": "tench, Tinca tinca",
        "n01443537": "goldfish, Carassius auratus",
        "n01484850": "white shark",
    }
    ids = {CLASSES[2]: 1, CLASSES[0]: 2, CLASSES[1]: 3}
    rows = [(i, name, words[name], "a fish", 0) for name, i in ids.items()] + [
        (4, "n00001740", "entity", "all", 3)
    ]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    truth = "".join(f"{ids[CLASSES[image.label]]}\n" for _, image in files)
    root = "ILSVRC2012_devkit_t12/data"
    members = [
        (f"{root}/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        (f"{root}/meta.mat", mat.getvalue()),
    ]
    with tarfile.open(place / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(place / "ILSVRC2012_devkit_t12.tar.gz")


def test_the_devkit_gives_labels_and_names(val):
    place, found, files = val
    kit = devkit(place, files)
    source = open_source(str(place / "val.tar"), labels_url=kit, names_url=kit).source
    assert samples(source) == sorted((image.label, image.data) for image in found)
    assert source.classes == (
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
        "white shark",
    )
    train = open_source(tar_of_tars(place, found), names_url=kit).source
    assert train.classes == source.classes, "so that they can be used together"


def test_what_is_no_devkit(val, monkeypatch):
    place, _, files = val
    with tarfile.open(place / "other.tar.gz", "w:gz") as tar:
        tar.add(place / "val.tar")
    with pytest.raises(
        UserError, match="other.tar.gz is not the devkit of ILSVRC-2012"
    ):
        open_source(str(place / "val.tar"), labels_url=str(place / "other.tar.gz"))
    (place / "noise.tar.gz").write_bytes(b"\x1f\x8bnoise")
    with pytest.raises(
        UserError, match="noise.tar.gz is not the devkit of ILSVRC-2012"
    ):
        open_source(str(place / "val.tar"), labels_url=str(place / "noise.tar.gz"))
    monkeypatch.setattr("distrain.data.prepare.labels._MAX_DEVKIT_BYTES", 100)
    with pytest.raises(UserError, match="unpacks to more than 100 bytes"):
        open_source(str(place / "val.tar"), labels_url=devkit(place, files))


def test_readable_names(tmp_path):
    place = folder(tmp_path, images(1))
    names = tmp_path / "synset_words.txt"
    names.write_text(
        "n01484850 crane\nn01440764 tench, Tinca tinca\nn00000001 unused\nn01443537 crane\n"
    )
    assert open_source(place, names_url=str(names)).source.classes == (
        "tench, Tinca tinca", "crane (n01443537)", "crane (n01484850)",
    )  # fmt: skip
    names.write_text("tench\nwhite shark\nray\n")
    assert open_source(place, names_url=str(names)).source.classes == (
        "tench",
        "white shark",
        "ray",
    )
    names.write_text("n01440764 tench\n")
    with pytest.raises(
        UserError, match="has no name for 2 of 3 classes .first: n01443537.: add a line"
    ):
        open_source(place, names_url=str(names))
    with pytest.raises(UserError, match="no file at"):
        open_source(place, names_url=str(tmp_path / "none.txt"))


# --- Parquet


def parquet(
    path,
    labels=(0, 1, 1, 2),
    data=None,
    features=None,
    image=None,
    label_type=None,
    **options,
):
    data = data or [im.data for im in images(2)][: len(labels)]
    image = image or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = (
        data
        if not pa.types.is_struct(image)
        else [d if d is None else {"bytes": d, "path": "x"} for d in data]
    )
    table = pa.table(
        {
            "image": pa.array(rows, image),
            "other": [[1]] * len(rows),
            "label": pa.array(labels, label_type),
        }
    )
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, **options)
    return str(path)


@pytest.mark.parametrize(
    "compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]
)
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), None])
def test_parquet_as_others_write_it(tmp_path, compression, kind):
    path = parquet(
        tmp_path / "x.parquet",
        compression=compression,
        image=kind,
        row_group_size=3,
        label_type=pa.int8(),
    )
    source, columns = open_source(path)
    assert columns.image == ("image.bytes" if kind is None else "image")
    assert source.classes == ("0", "1", "2")
    assert [block.num_rows for block in source.blocks] == [3, 1]
    assert samples(source) == sorted(
        zip((0, 1, 1, 2), [im.data for im in images(2)][:4], strict=True)
    )


def test_columns_by_the_hubs_metadata_or_by_name(tmp_path):
    place = hub(tmp_path, images(4), column="img")
    source, columns = open_source(place)
    assert columns == ("img.bytes", "label")
    assert len(samples(source)) == 12
    path = parquet(tmp_path / "x.parquet")
    with pytest.raises(
        UserError,
        match="no column photo: .* image_column and label_column; it has image, ",
    ):
        open_source(path, image_column="photo")
    with pytest.raises(UserError, match="column other of .* does not hold labels"):
        open_source(path, label_column="other")
    with pytest.raises(
        UserError,
        match="column label of .* does not hold image files: its type is int64",
    ):
        open_source(path, image_column="label")
    two = {
        "image": {"_type": "Image"},
        "thumb": {"_type": "Image"},
        "fine": {"_type": "ClassLabel", "names": ["a"]},
    }
    with pytest.raises(UserError, match="has no column fine"):
        open_source(parquet(tmp_path / "y.parquet", features=two))


def test_rows_that_cannot_be_used_are_named(tmp_path):
    data = [im.data for im in images(2)][:4]
    told = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["a", "b"]},
    }
    path = parquet(
        tmp_path / "x.parquet",
        [0, 7, 1, None],
        [data[0], data[1], None, data[3]],
        features=told,
    )
    source = open_source(path).source
    (block,) = source.blocks
    assert source.reader.read_block(block) == [
        Sample("x.parquet row group 0 row 0", 0, data[0]),
        Reject("x.parquet row group 0 row 1", "label 7 is not one of 2 classes"),
        Reject("x.parquet row group 0 row 2", "no bytes"),
        Reject("x.parquet row group 0 row 3", "no label"),
    ]


def test_files_of_two_kinds_are_not_mixed(tmp_path):
    kinds = {
        "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
        "image": {"_type": "Image"},
    }
    parquet(tmp_path / "1.parquet", features=kinds)
    parquet(
        tmp_path / "2.parquet",
        features={**kinds, "label": {"_type": "ClassLabel", "names": ["c", "b", "a"]}},
    )
    with pytest.raises(
        UserError, match=r"2.parquet has other columns or class names than 1.parquet"
    ):
        open_source(str(tmp_path))


def test_a_row_group_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups_module, "MAX_SOURCE_GROUP_BYTES", 1 << 20)
    data = [bytes(3 << 20), b"x", b"x", b"x"]
    path = parquet(
        tmp_path / "x.parquet", data=data, compression="zstd", row_group_size=2
    )
    assert Path(path).stat().st_size < 50_000
    source = open_source(path).source
    assert [block.row_group for block in source.blocks] == [1]
    (refused,) = source.rejects
    assert refused.name == "x.parquet row group 0"
    assert re.fullmatch(
        "its 2 rows claim 31457.. bytes, over the limit of 1048576: "
        "write smaller row groups",
        refused.reason,
    )


def test_footers_that_claim_too_much_are_refused_unread(tmp_path, monkeypatch):
    """One image for all rows of a group, which a dictionary holds once; and more rows than any group needs."""
    monkeypatch.setattr(row_groups_module, "MAX_SOURCE_GROUP_BYTES", 1 << 20)
    same = [bytes(50_000)] * 100
    path = parquet(
        tmp_path / "x.parquet",
        [0, 1] * 50,
        same,
        use_dictionary=["image.bytes"],
        data_page_size=1 << 20,
    )
    source = open_source(path).source
    (refused,) = [source.reader.read_block(block) for block in source.blocks]
    assert refused.num_images == 100
    assert re.fullmatch(
        "a column unpacks to at least [0-9]+ bytes, over the limit of 1048576: "
        "write smaller row groups",
        refused.reason,
    )
    monkeypatch.setattr(row_groups_module, "MAX_SOURCE_GROUP_ROWS", 3)
    path = parquet(tmp_path / "y.parquet", row_group_size=4)
    with pytest.raises(
        UserError, match="its 4 rows are over the limit of 3: write smaller row groups"
    ):
        open_source(path)


def test_damaged_parquet(tmp_path):
    path = Path(parquet(tmp_path / "x.parquet", row_group_size=2, compression="snappy"))
    whole = path.read_bytes()
    source = open_source(str(path)).source
    damaged = bytearray(whole)
    first = source.blocks[0]
    damaged[first.start : first.start + 30] = bytes(30)
    path.write_bytes(bytes(damaged))
    source = open_source(str(path)).source
    refused = source.reader.read_block(source.blocks[0])
    assert refused.name == "x.parquet row group 0 of 2 rows"
    assert refused.reason.startswith("damaged row group")
    assert len(source.reader.read_block(source.blocks[1])) == 2
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="is not a complete Parquet file"):
        open_source(str(path))
    path.write_bytes(whole[:-60] + bytes(52) + whole[-8:])
    with pytest.raises(UserError, match="cannot be read .damaged footer"):
        open_source(str(path))


# --- bombs


class Measured:
    """A child process: what it said last, and how much memory it took beyond what it had before."""

    def __init__(self, error: str, mib: float) -> None:
        self.error, self.mib = error, mib


def run_measured(code: str, *arguments: str) -> Measured:
    # The kernel keeps the peak of this program's memory; getrusage would tell that of its parent, if that had more.
    program = (
        "import re, sys\nfrom pathlib import Path\nimport PIL.PngImagePlugin\n"
        "import distrain.data.prepare.pack, distrain.data.prepare.open\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "before = peak()\n"
        f"try:\n    {code}\nexcept Exception as error:\n    sys.stderr.write(str(error))\n"
        "print(peak() - before)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return Measured(child.stderr, float(child.stdout))


def true_bomb(side: int) -> bytes:
    """A PNG of one bit a pixel that is what it claims to be: RGB of it takes side^2 * 3 bytes."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body))
            + kind
            + body
            + struct.pack(">I", zlib.crc32(kind + body))
        )

    row = b"\0" + bytes((side + 7) // 8)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(row * side)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


PACK = (
    "from distrain.data.prepare.pack import *; "
    "from distrain.data.prepare.pack_options import *; "
    "opened = distrain.data.prepare.open.open_source(sys.argv[1]); "
    "p = pack_dataset(opened.source, sys.argv[2], PackOptions(Geometry('square', 32))); "
    "sys.stderr.write(repr(p.rejects))"
)


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    found = images(2)
    place = Path(folder(tmp_path, found))
    (place / CLASSES[0] / "bomb.png").write_bytes(true_bomb(20_000))
    (place / CLASSES[1] / "bomb.jpg").write_bytes(
        lying(encoded(picture(0, 60, 60)), 20_000, 20_000)
    )
    (place / CLASSES[2] / "claim.png").write_bytes(bomb(60_000))
    child = run_measured(PACK, str(place), str(tmp_path / "packed"))
    assert child.error.count("20000 x 20000 pixels are over the limit of 50000000") == 2
    assert child.error.count("60000 x 60000 pixels are over the limit of 50000000") == 1
    assert child.mib < 60


def test_a_zip_bomb_is_refused_before_memory_is_taken(tmp_path):
    """Half a gigabyte of zeros in half a megabyte, beside good images; the limit is 256 MiB a file."""
    assert source_module.MAX_FILE_BYTES == 256 << 20
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for image in images(2):
            file.writestr(f"{CLASSES[image.label]}/{image.name}", image.data)
        with file.open(f"{CLASSES[0]}/bomb.jpg", "w") as member:
            for _ in range(512):
                member.write(bytes(1 << 20))
    child = run_measured(
        PACK, f"zip://::{tmp_path / 'x.zip'}", str(tmp_path / "packed")
    )
    assert "536870912 bytes are over the limit of 268435456" in child.error
    assert child.mib < 60


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, name):
    """A clone without Git LFS, and a page that says that nothing was found."""
    path = tmp_path / name
    kind = {"x.tar": "a tar archive", "x.parquet": "a Parquet file"}[name]
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError) as raised:
        open_source(str(path))
    pointer = "a Git LFS pointer: run git lfs pull"
    assert str(raised.value) == f"{path} is not {kind}, but {pointer}"
    path.write_bytes(b"<!doctype html><html>" + b"x" * 5000)
    with pytest.raises(UserError, match="but an HTML page: download it again$"):
        open_source(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="again$"):
        open_source(str(path))
