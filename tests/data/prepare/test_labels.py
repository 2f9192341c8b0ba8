"""Readable class names in the forms that people have them."""

import json
import time

import pytest

from distrain.data.prepare.labels import read_class_names
from distrain.errors import UserError

CLASSES = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench, Tinca tinca", "goldfish", "white shark")
NUMBERS = ("0", "1", "2")


def write(place, text, encoding="utf-8"):
    (place / "names.txt").write_bytes(text.encode(encoding))
    return str(place / "names.txt")


def lines(mark, keys=CLASSES, quote="", header=""):
    pairs = zip(keys, NAMES, strict=True)
    text = "".join(f"{key}{mark}{quote}{name}{quote}\n" for key, name in pairs)
    return header + text


@pytest.mark.parametrize(
    "text",
    [
        lines(" "),
        lines("\t"),
        lines(","),
        lines(", "),
        lines(";"),
        lines(": "),
        lines(",", quote='"'),
        lines(",", quote='"', header="class,name\n"),
        lines(" ").replace("\n", "\r\n"),
        "\ufeff" + lines(" "),
        lines("  ") + "n00000001 unused\n" + lines("  "),
        "".join(f'"{name}",{key}\n' for key, name in zip(CLASSES, NAMES, strict=True)),
        "".join(f"{name}\n" for name in NAMES),
        json.dumps(dict(zip(CLASSES, NAMES, strict=True))),
        json.dumps(
            {str(i): pair for i, pair in enumerate(zip(CLASSES, NAMES, strict=True))}
        ),
        json.dumps(NAMES),
    ],
)
def test_names_of_synsets(tmp_path, text):
    assert read_class_names(CLASSES, write(tmp_path, text)) == NAMES


@pytest.mark.parametrize(
    "text",
    [
        lines(" ", NUMBERS),
        lines(": ", NUMBERS),
        lines(",", NUMBERS, header="id,name\n"),
        repr(dict(enumerate(NAMES))),
        json.dumps(dict(zip(NUMBERS, NAMES, strict=True))),
        json.dumps({name: i for i, name in enumerate(NAMES)}),
    ],
)
def test_names_of_numbers(tmp_path, text):
    assert read_class_names(NUMBERS, write(tmp_path, text)) == NAMES


def test_classes_with_spaces(tmp_path):
    classes = ("golden eagle", "golden retriever")
    for mark in (",", ";", "\t", " "):
        text = f"golden retriever{mark}Retriever\ngolden eagle{mark}Eagle\n"
        assert read_class_names(classes, write(tmp_path, text)) == (
            "Eagle",
            "Retriever",
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(",") + "n01443537,carp\n", "gives n01443537 two names, goldfish and carp"
         " in line 4: keep the right one"),
        ("n01440764 tench\n", "has no name for 2 of 3 classes .first: n01443537"),
        ("tench\ngoldfish\n", "has no name for 3 of 3 classes"),
        ("{oops", "names.txt is not a JSON object of classes and names"),
        ('{"n01440764": {"name": "tench"}}', "has no name for 2 of 3 classes"),
    ],
)  # fmt: skip
def test_names_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_class_names(CLASSES, write(tmp_path, text))


def test_text_in_utf_16(tmp_path):
    url = write(tmp_path, lines("\t"), "utf-16")
    assert read_class_names(CLASSES, url) == NAMES
    url = write(tmp_path, lines(" ").replace("tench", "caf\u00e9"), "latin-1")
    with pytest.raises(UserError, match="names.txt is not UTF-8 text: save it as"):
        read_class_names(CLASSES, url)


def test_names_of_twenty_thousand_classes(tmp_path):
    """As many as ImageNet-21k has: to compare all with all takes ten seconds."""
    classes = tuple(f"n{i:08d}" for i in range(20_000))
    text = "".join(f"{key} {int(key[1:]) // 2}\n" for key in classes)
    start = time.thread_time()
    names = read_class_names(classes, write(tmp_path, text))
    assert time.thread_time() - start < 3
    assert names[:3] == ("0 (n00000000)", "0 (n00000001)", "1 (n00000002)")
