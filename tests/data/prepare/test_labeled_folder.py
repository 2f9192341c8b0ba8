"""A folder of images whose labels are in a list."""

import json

import pytest
from shapes import images

from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.prepare.source import Reject
from distrain.errors import UserError


def opened(place, names, labels, list_name="labels.csv"):
    for name in names:
        path = place / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (place / list_name).write_text(labels)
    return open_source(str(place / "photos"), labels_url=str(place / list_name)).source


def found(source):
    """Class of each image, by its path."""
    return {block.path: source.classes[block.label] for block in source.blocks}


def test_a_flat_folder_with_a_table(tmp_path):
    """As Kaggle's dog-breed-identification: names without extensions."""
    source = opened(
        tmp_path,
        ["b.jpg", "a.jpg", "c.PNG", "notes.txt", ".DS_Store", "d.jpg", "e.mystery"],
        "id,breed\na,collie\nb,border collie\nc,collie\n",
    )
    assert source.format_name == "labeled folder"
    assert source.classes == ("border collie", "collie")
    assert found(source) == {
        "a.jpg": "collie",
        "b.jpg": "border collie",
        "c.PNG": "collie",
    }
    assert sorted(source.rejects) == [
        Reject("d.jpg", "the list has no label for it"),
        Reject("e.mystery", "no image, by its extension"),
    ]


def test_one_folder_of_images_beside_their_list(tmp_path):
    """As Tiny-ImageNet's val: boxes behind the label, images in one folder."""
    names = [f"images/val_{i}.JPEG" for i in range(4)]
    lines = [f"val_{i}.JPEG\tn0{1 + i // 2}\t0\t32\t44\t62\n" for i in range(4)]
    header = "filename\tlabel\tx0\ty0\tx1\ty1\n"
    source = opened(
        tmp_path, names, header + "".join(lines), "photos/val_annotations.txt"
    )
    assert source.classes == ("n01", "n02")
    assert list(found(source).values()) == ["n01", "n01", "n02", "n02"]
    assert source.rejects == []


def test_a_list_of_labels_follows_the_order_of_names(tmp_path):
    source = opened(tmp_path, ["2.jpg", "1.jpg", "3.jpg"], "0\n1\n1\n")
    assert found(source) == {"1.jpg": "0", "2.jpg": "1", "3.jpg": "1"}


@pytest.mark.parametrize("form", ["list", "lines"])
def test_json_objects_are_a_table(tmp_path, form):
    """As the metadata.jsonl of the hub's image folders."""
    rows = [
        {"file_name": "1.jpg", "caption": "a, b", "label": "cat"},
        {"file_name": "2.jpg", "label": "dog", "caption": None},
    ]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    source = opened(tmp_path, ["1.jpg", "2.jpg"], text, "metadata.jsonl")
    assert found(source) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_class_folders_are_not_ignored(tmp_path):
    with pytest.raises(UserError, match=r"^labels .* is an image folder of classes: l"):
        opened(tmp_path, ["cat/1.jpg", "dog/2.jpg"], "1.jpg,cat\n2.jpg,dog\n")


def test_a_list_of_other_images(tmp_path):
    with pytest.raises(UserError, match="names no image of the source"):
        opened(tmp_path, ["1.jpg", "2.jpg"], "file,label\nx.jpg,a\ny.jpg,b\n")


def test_it_packs(tmp_path):
    (tmp_path / "photos").mkdir()
    labels = {}
    for i, image in enumerate(images(2)):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(image.data)
        labels[f"{i}.jpg"] = "even" if i % 2 == 0 else "odd"
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    source = open_source(
        str(tmp_path / "photos"), labels_url=str(tmp_path / "labels.json")
    ).source
    packed = pack_dataset(
        source, str(tmp_path / "dst"), PackOptions(Geometry("square", 8), "jpeg")
    )
    assert packed.rejects == []
    assert packed.manifest.classes == ("even", "odd")
    assert packed.manifest.num_rows == len(labels)
