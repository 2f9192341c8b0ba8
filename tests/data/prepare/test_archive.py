"""Archives of class folders, archives of archives, and images with a list of labels."""

import json

import pytest
from shapes import tar_of

from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject
from distrain.errors import UserError


def opened(place, members, labels=None, name="x.tar"):
    (place / name).write_bytes(tar_of(members))
    if labels is not None:
        (place / "labels.csv").write_bytes(
            labels if isinstance(labels, bytes) else labels.encode()
        )
        return open_source(
            str(place / name), labels_url=str(place / "labels.csv")
        ).source
    return open_source(str(place / name)).source


def found(source):
    """Class of each image, by its name."""
    return {
        block.name.partition("/")[2]: source.classes[block.label]
        for block in source.blocks
    }


def bare(*names):
    return [(name, b"x") for name in names]


# --- class folders


@pytest.mark.parametrize("top", ["", "./", "photos/", "./a/.b/"])
def test_folders_in_an_archive_are_classes(tmp_path, top):
    names = ["dog/2.jpg", "cat/1.jpg", "cat/deep/er/3.JPG", "dog/1.x.png"]
    source = opened(tmp_path, bare(*(top + name for name in names)))
    assert source.format_name == "archive of class folders"
    assert source.classes == ("cat", "dog")
    assert [block.name.removeprefix(f"x.tar/{top}") for block in source.blocks] == [
        "cat/1.jpg",
        "cat/deep/er/3.JPG",
        "dog/1.x.png",
        "dog/2.jpg",
    ]
    assert source.rejects == []
    assert source.notes == []


def test_junk_lists_and_folders_without_an_image_are_no_classes(tmp_path):
    members = bare(
        "photos/._cat",
        "photos/cat/._1.jpg",
        "photos/cat/1.jpg",
        "photos/cat/Thumbs.db",
        "photos/dog/2.jpg",
        "photos/docs/readme.txt",
        "photos/classes.txt",
        "__MACOSX/photos/cat/._1.jpg",
        "README.md",
    )
    source = opened(tmp_path, members)
    assert found(source) == {"photos/cat/1.jpg": "cat", "photos/dog/2.jpg": "dog"}
    assert source.rejects == []
    assert source.notes == ["these folders hold no image, and are no classes: docs"]


def test_class_folders_in_several_archives(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of(bare("p/cat/1.jpg", "p/dog/1.jpg")))
    (tmp_path / "1.tar").write_bytes(tar_of(bare("p/cat/2.jpg", "p/emu/1.jpg")))
    source = open_source(str(tmp_path)).source
    assert source.classes == ("cat", "dog", "emu")
    assert [block.name for block in source.blocks] == [
        "0.tar/p/cat/1.jpg",
        "1.tar/p/cat/2.jpg",
        "0.tar/p/dog/1.jpg",
        "1.tar/p/emu/1.jpg",
    ]


def test_class_folders_that_cannot_be_told(tmp_path):
    with pytest.raises(
        UserError, match=r"x.tar holds an image outside the class folders, 3.jpg, and"
    ):
        opened(tmp_path, bare("cat/1.jpg", "dog/2.jpg", "3.jpg"))
    with pytest.raises(
        UserError, match=r"x.tar holds several splits \(train, val\): unpack it"
    ):
        opened(tmp_path, bare("d/train/cat/1.jpg", "d/val/cat/2.jpg"))
    with pytest.raises(
        UserError, match=r"x.tar holds several splits \(training_set, test_set\)"
    ):
        opened(tmp_path, bare("training_set/a/1.jpg", "test_set/a/2.jpg"))
    with pytest.raises(
        UserError,
        match=r"x.tar holds several splits in its class folders \(cat/test, cat/train",
    ):
        opened(tmp_path, bare("cat/train/1.jpg", "cat/test/2.jpg", "dog/train/1.jpg"))
    with pytest.raises(UserError, match=r"several splits \(train2017, val2017\)"):
        opened(tmp_path, bare("train2017/1.jpg", "val2017/2.jpg"))
    inner = r"x.tar holds several splits in its class folders \(cat/test, cat/train\)"
    with pytest.raises(UserError, match=inner):
        opened(tmp_path, bare("d/cat/train/1.jpg", "d/cat/test/2.jpg", "d/dog/3.jpg"))
    with pytest.raises(UserError, match="x.tar holds no labeled images"):
        opened(tmp_path, bare("cat/1.jpg", "cat/2.jpg"))
    with pytest.raises(UserError, match="x.tar holds no labeled images"):
        opened(tmp_path, [("1.jpg", b"x"), ("1.json", b'{"caption": "a"}')])


# --- archives of archives


def test_a_refused_archive_is_named_and_not_its_folder(tmp_path):
    one = [("cat.tar", tar_of(bare("1.jpg")))]
    with pytest.raises(UserError, match=r"/x.tar holds one class, cat: "):
        opened(tmp_path, one)
    with pytest.raises(UserError, match=r"^no images in .*/x.tar: it must hold"):
        opened(tmp_path, [("cat.tar", tar_of([("1.jpg", b"")]))])


def test_an_archive_of_archives_with_junk(tmp_path):
    members = [
        ("README.txt", b"read me"),
        ("._a.tar", b"mac"),
        ("a.tar", tar_of(bare("._1.jpg", "1.jpg", ".DS_Store"))),
        ("b.tar", tar_of([])),
        ("c.tar", tar_of([("1.jpg", b"old"), ("1.jpg", b"new")])),
    ]
    source = opened(tmp_path, members)
    assert found(source) == {"a.tar/1.jpg": "a", "c.tar/1.jpg": "c"}
    assert source.classes == ("a", "c")
    (note,) = source.notes
    assert note.endswith("hold no file, and are no classes: b.tar")
    assert source.rejects == [
        Reject("x.tar/README.txt", "not a .tar of a class"),
        Reject("x.tar/c.tar/1.jpg", "replaced by a later member of the same name"),
    ]
    inner = tar_of(bare("1.jpg"))
    with pytest.raises(UserError, match="2 archives named a.tar, in several folders"):
        opened(tmp_path, [("p/a.tar", inner), ("q/a.tar", inner)])


# --- lists of labels

FOUR = bare("img0.jpg", "img1.jpg", "img2.jpg", "img3.jpg")
DOGS = ["golden retriever", "golden eagle", "tabby cat", "tabby cat"]
EXPECTED = {f"img{i}.jpg": name for i, name in enumerate(DOGS)}


def rows(mark, header="", quote=""):
    lines = [f"img{i}.jpg{mark}{quote}{name}{quote}" for i, name in enumerate(DOGS)]
    return "\n".join([*([header] if header else []), *lines]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        rows(","),
        rows(",", "filename,label"),
        rows(", ", "Image, Class name"),
        rows(";"),
        rows(";", "file;category"),
        rows("\t", "path\ttarget"),
        rows("|"),
        rows(": "),
        rows(" "),
        rows("   "),
        rows(" ", "filename label"),
        rows(",", quote='"'),
        rows(" ", quote='"'),
        rows(",", "# made by hand"),
        rows(",").replace("\n", "\r\n"),
        rows(",").replace("\n", "\r"),
        rows(",").replace("\n", "\n\n"),
        rows(",").replace("\n", ",\n"),
        rows(";").replace("img", "./img"),
        rows(",").replace("img", "C:\\data\\img"),
        rows(",").replace(".jpg", ""),
        rows(",").replace(".jpg", ".png"),
        "\ufeff" + rows(",", "filename,label"),
        rows(",") + rows(","),
        "label;image\n" + "".join(f"{n};img{i}.jpg\n" for i, n in enumerate(DOGS)),
        "".join(f"{n},img{i}.jpg\n" for i, n in enumerate(DOGS)),
        ",filename,label\n"
        + "".join(f"{i},img{i}.jpg,{n}\n" for i, n in enumerate(DOGS)),
        "id,width,image_id,class_name\n"
        + "".join(f"{i},640,img{i},{n}\n" for i, n in enumerate(DOGS)),
        ",label\n" + "".join(f"{i},{n}\n" for i, n in enumerate(DOGS)),
        "class\n" + "".join(f"{n}\n" for n in DOGS),
        "".join(f"{n}\n" for n in DOGS),
        "".join(f'"{n}"\n' for n in DOGS),
        json.dumps(EXPECTED),
        json.dumps({"labels": [list(pair) for pair in EXPECTED.items()]}),
    ],
)
def test_lists_of_labels_in_every_form(tmp_path, text):
    source = opened(tmp_path, FOUR, text)
    assert found(source) == EXPECTED
    assert source.classes == ("golden eagle", "golden retriever", "tabby cat")
    assert source.rejects == []
    assert source.notes == []


def test_a_list_in_utf_16_by_excel(tmp_path):
    source = opened(tmp_path, FOUR, rows("\t", "file\tlabel").encode("utf-16"))
    assert found(source) == EXPECTED


def test_file_names_with_spaces_commas_and_accents(tmp_path):
    names = ["my photo (1).jpg", "my photo.jpg", "a,b.jpg", "caf\u00e9.jpg", "x.y.jpg"]
    labels = ["n 0", "n1", "n1", "n1", "n 0"]
    for mark, quote in ((",", '"'), (";", ""), ("\t", ""), (" ", "")):
        text = "".join(
            f"{quote}{name}{quote}{mark}{label}\n"
            for name, label in zip(names, labels, strict=True)
        ).replace("\u00e9", "e\u0301")
        source = opened(tmp_path, bare(*names), text)
        assert found(source) == dict(zip(names, labels, strict=True)), mark


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    names = [f"{i}.jpg" for i in range(12)]
    text = "".join(f"val/{i}.jpg {i % 11}\n" for i in range(12))
    source = opened(tmp_path, bare(*names), text)
    assert source.classes == tuple(str(i) for i in range(11))
    assert found(source) == {f"{i}.jpg": str(i % 11) for i in range(12)}
    # As pandas writes them beside a missing one; -1 is no label either.
    source = opened(
        tmp_path,
        FOUR,
        "file,label\nimg0.jpg,1.0\nimg1.jpg,0.0\nimg2.jpg,\nimg3.jpg,-1\n",
    )
    assert found(source) == {"img0.jpg": "1", "img1.jpg": "0"}
    assert source.rejects == [
        Reject("x.tar/img2.jpg", "the list has no label for it"),
        Reject("x.tar/img3.jpg", "label -1: no label"),
    ]
    # Codes keep their zeros.
    source = opened(tmp_path, FOUR, "01\n1\n01\n1\n")
    assert source.classes == ("01", "1")


def test_numbers_among_names_are_names(tmp_path):
    source = opened(tmp_path, FOUR, "0\nA\n0\n1\n")
    assert source.classes == ("0", "1", "A")
    (note,) = source.notes
    assert note.endswith("are taken for names, since 'A' is no number")


def test_boxes_beside_the_label(tmp_path):
    text = "ImageId,PredictionString\n" + "".join(
        f"img{i},n0{i % 2} 85 1 499 272 n07 1 2 3 4\n" for i in range(4)
    )
    source = opened(tmp_path, FOUR, text)
    assert source.classes == ("n00", "n01")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img0.jpg,a\nimg1.jpg,b\nimg0.jpg,b\n", r"gives img0.jpg two labels, a in line"
         " 1 and b in line 3: keep the right one"),
        ("img0.jpg=a\nimg1.jpg=b\nimg2.jpg=a\nimg3.jpg=b\n", r"line 1 of .*labels.csv is "
         r"taken for a label, and names an image .* \(img0.jpg=a\): a list has"),
        ("x0,a\nx1,b\nx2,a\nx3,b\n", "as many classes as images, 4 .first: x0,a"),
        ("0,img0.jpg,a\n1,img1.jpg,b\n", "has 3 columns, and it is not clear which one"
         " holds the labels: begin it with a line that names the columns"),
        ("image,breed,age\nimg0.jpg,a,3\n", "has 3 columns, and it is not clear"),
        ("img0.jpg,tench\nimg1.jpg,pug, pug-dog\n", "line 2 of .* has 3 columns, and the"
         " first line 2: put names"),
        ("filename,label\nx0.jpg,a\nx1.jpg,b\n", r"names no image of the source .first:"
         " x0.jpg a.: check"),
        ("a\nb\na\n", "the list has 3 labels for 4 files in .*x.tar: it must have one"),
        ('{"x0.jpg": "a"}', "names no image of .*x.tar .first: x0.jpg.: check that"),
        ('{"images": [{"id": 1}]}', "labels.csv is not JSON of the form {file: label}"),
        ('{"file_name": "img0.jpg", "label": 1}\n{"file_name": "img1.jpg",',
         r"labels.csv is not JSON of the form .* \(Extra data"),
        ('[{"file": "img0.jpg", "label": {"id": 1}}]', "it holds a list of objects.: w"),
        ('[{"file": "img0.jpg", "breed": 1, "age": 2}]', "has 3 columns, and it is not"),
        ("", "labels.csv is empty: it must have one label per image"),
        ("img0.jpg,-1\nimg1.jpg,-1\n", "all labels of .*x.tar are -1"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, FOUR, text)


def test_as_many_classes_as_images_are_no_labels(tmp_path):
    names = [f"{i:02d}.jpg" for i in range(10)]
    for line in ("{}.jpg,{}\n", "{1}\n"):
        text = "".join(line.format(f"{i:02d}", i) for i in range(10))
        with pytest.raises(UserError, match="as many classes as images, 10 "):
            opened(tmp_path, bare(*names), text)


def test_other_files_in_the_archive_are_not_counted(tmp_path):
    members = [
        ("._img0.jpg", b"mac"),
        ("README.txt", b"x"),
        *FOUR,
        ("__MACOSX/._img1.jpg", b"mac"),
        ("img0.jpg", b"new"),
    ]
    source = opened(tmp_path, members, "a\nb\na\nb\n")
    assert list(found(source).values()) == ["a", "b", "a", "b"]
    assert source.rejects == [
        Reject("x.tar/img0.jpg", "replaced by a later member of the same name")
    ]
    assert source.notes == [
        "passed over files that are no images by their names: 1 .txt (x.tar/README.txt)"
    ]
    # Without an extension of images, each file may be one.
    source = opened(tmp_path, bare("val/0", "val/1"), "0 a\n1 b\n")
    assert found(source) == {"val/0": "a", "val/1": "b"}


def test_lines_without_an_image_are_named(tmp_path):
    source = opened(tmp_path, FOUR, rows(",") + "img9.jpg,owl\nimg8.jpg,owl\n")
    assert found(source) == EXPECTED, "an owl is no class"
    (note,) = source.notes
    assert note.startswith("no image of ")
    assert " has the name in 2 lines of " in note
    assert note.endswith("labels.csv (first: img9.jpg)")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    members = bare("p/a/1.jpg", "p/b/1.jpg", "p/c/1.jpg", "p/c/2.jpg")
    text = "/data/p/a/1.jpg cat\nb/1.jpg dog\nq/2.jpg dog\n"
    source = opened(tmp_path, members, text)
    assert found(source) == {"p/a/1.jpg": "cat", "p/b/1.jpg": "dog", "p/c/2.jpg": "dog"}
    assert source.rejects == [Reject("x.tar/p/c/1.jpg", "the list has no label for it")]


def test_several_columns_of_labels(tmp_path):
    text = "file,class_id,label\nimg0.jpg,7,a\nimg1.jpg,8,b\n"
    source = opened(tmp_path, FOUR, text)
    assert source.classes == ("a", "b")
    (note,) = source.notes
    assert "are those of its column label, not of classid" in note


def test_names_in_another_order_than_their_numbers_are_a_note(tmp_path):
    names = [f"{i}.jpg" for i in range(11)]
    source = opened(tmp_path, bare(*names), "a\n" * 5 + "b\n" * 6)
    (note,) = source.notes
    assert "in which 10.jpg comes before 2.jpg: check that the list has" in note


def test_a_line_that_may_be_of_several_images_is_refused(tmp_path):
    members = bare("x/1.jpg", "y/1.jpg", "x/2.jpg")
    message = r"line 1 of .*labels.csv, 1.jpg, may be x/1.jpg or y/1.jpg: write the names with their folders"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, members, "1.jpg,a\n2.jpg,b\n")
    source = opened(tmp_path, members, "x/1.jpg,a\ny/1.jpg,b\n2.jpg,b\n")
    assert found(source) == {"x/1.jpg": "a", "y/1.jpg": "b", "x/2.jpg": "b"}


def test_a_list_whose_column_names_several_splits_is_refused(tmp_path):
    text = "file,label,split\n1.jpg,a,train\n2.jpg,b,train\n3.jpg,a,test\n"
    message = r"several splits, as its column split says \(test, train\): keep the lines of one$"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, bare("1.jpg", "2.jpg", "3.jpg"), text)
    # The images of the other split are in another archive.
    source = opened(tmp_path, bare("1.jpg", "2.jpg"), text)
    assert source.classes == ("a", "b")


def test_the_keys_of_json_objects_are_columns(tmp_path):
    text = '[{"file": "1.jpg", "label": "a"}, {"file": "2.jpg", "label": "b"}]'
    source = opened(tmp_path, bare("1.jpg", "2.jpg"), text)
    assert found(source) == {"1.jpg": "a", "2.jpg": "b"}
