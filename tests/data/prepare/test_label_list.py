"""Lists of labels in random forms, by the csv module, against what they were made of."""

import csv
import io
import json
import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.prepare import label_match
from distrain.data.prepare.label_match import match_labels
from distrain.errors import UserError

ALPHABET = "abZ019 _-.,;|:'\"()\u00e9\u00fc\u732b#=&%+"
# A first line that begins with "# " is a comment.
words = (
    st.text(ALPHABET, min_size=1, max_size=8)
    .map(lambda text: text.strip().replace("# ", "#"))
    .filter(bool)
)
file_names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "a/", "a/b c/"]),
    words.filter(lambda word: not word.startswith((".", "#", '"'))),
    st.sampled_from(["jpg", "JPEG", "png"]),
)
HEADERS = [("filename", "label"), ("image_id", "Class Name"), ("path", "target")]


@st.composite
def lists(draw):
    """Files, the label of each, and a list of them."""
    files = draw(st.lists(file_names, min_size=2, max_size=9, unique_by=spelling))
    classes = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    labels = {file: draw(st.sampled_from(classes)) for file in files}
    rows = [[file, labels[file]] for file in draw(st.permutations(files))]

    header = draw(st.sampled_from([None, *HEADERS]))
    if header:
        rows.insert(0, list(header))
    if draw(st.booleans()):
        rows = [row[::-1] for row in rows]
    if header and draw(st.booleans()):
        rows = [[str(i - 1) if i else "", *row] for i, row in enumerate(rows)]
    if draw(st.integers(0, 5)) == 0:
        return labels, json.dumps(labels)
    sink = io.StringIO()
    csv.writer(
        sink,
        delimiter=draw(st.sampled_from(",;\t|")),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
    ).writerows(rows)
    return labels, sink.getvalue()


def spelling(file):
    """What a list may leave out: folders and extension."""
    stem = file.rpartition("/")[2].rpartition(".")[0]
    return unicodedata.normalize("NFC", stem).lower()


@settings(max_examples=50)
@given(lists())
def test_a_list_gives_the_labels_that_it_was_made_of(made):
    labels, text = made
    message = ""
    try:
        matched = match_labels(sorted(labels), text, "x.tar", "labels.csv")
    except UserError as error:
        message = str(error)
    if message:
        assert "labels.csv" in message
        return
    found = matched.value_by_file
    if all(isinstance(value, int) for value in found.values()):
        assert found == {file: float(label) for file, label in labels.items()}
    else:
        assert found == labels


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=9),
    st.sampled_from([" ", "   ", "\t"]),
    st.sampled_from(["{}.jpg", "val/{}.jpg", "{}"]),
)
def test_a_list_of_files_and_numbers(numbers, gap, name):
    files = [f"img {i}.jpg" for i in range(len(numbers))]
    lines = [
        f"{name.format(f'img {i}')}{gap}{number}\n" for i, number in enumerate(numbers)
    ]
    matched = match_labels(files, "".join(lines), "x.tar", "labels.txt")
    assert matched.value_by_file == dict(zip(files, numbers, strict=True))
    assert matched.notes == []


def test_images_of_one_name_in_many_folders_are_not_compared_with_each_other(
    monkeypatch,
):
    """Else a set of 1,000 classes with an image 1.jpg each takes hours."""
    labels = {f"train/{c}/{i}.jpg": f"class {c}" for c in range(50) for i in range(3)}
    rank = label_match._rank
    ranked = []
    monkeypatch.setattr(
        label_match, "_rank", lambda *paths: ranked.append(paths) or rank(*paths)
    )
    for start, end in (("train/", ""), ("", ""), ("", ".jpg"), ("train/", ".jpg")):
        lines = [
            f"{file.removeprefix(start).removesuffix(end)},{label}\n"
            for file, label in labels.items()
        ]
        ranked.clear()
        matched = match_labels(list(labels), "".join(lines), "x.tar", "labels.csv")
        assert matched.value_by_file == labels
        assert len(ranked) == 2 * len(labels)
