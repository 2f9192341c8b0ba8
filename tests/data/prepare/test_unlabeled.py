import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import encoded, picture

from distrain.data.prepare.source import Reject, Sample
from distrain.data.prepare.unlabeled import iter_unlabeled
from distrain.errors import UserError


@pytest.fixture
def files():
    return [encoded(picture(i, 40, 40)) for i in range(3)]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(url):
    items = list(iter_unlabeled(str(url)))
    assert all(item.label == -1 for item in items if isinstance(item, Sample))
    return items


def names(url):
    return [item.name for item in read(url)]


def test_a_single_file_is_read_as_it_is(tmp_path, files):
    (tmp_path / "a.jpg").write_bytes(files[0])
    (tmp_path / "no-extension").write_bytes(b"anything")
    (one,) = read(tmp_path / "a.jpg")
    assert one == Sample(f"{tmp_path}/a.jpg", -1, files[0])
    assert read(tmp_path / "no-extension")[0].data == b"anything"


def test_a_folder_at_any_depth_without_junk(tmp_path, files, monkeypatch):
    for place in ("b.jpg", "a/1.jpg", "a/deep/er/2.jpg", ".hidden.jpg", "note.txt"):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / place).write_bytes(files[0])
    wanted = ["b.jpg", "a/1.jpg", "a/deep/er/2.jpg"]
    assert names(f"{tmp_path}/in/") == [f"{tmp_path}/in/{name}" for name in wanted]
    monkeypatch.chdir(tmp_path / "in")
    assert names(".") == wanted


def test_a_tar_and_tars_in_it(tmp_path, files):
    write_tar(tmp_path / "inner.tar", {"1.jpg": files[1]})
    inner = (tmp_path / "inner.tar").read_bytes()
    members = {"x/0.jpg": files[0], "x/0.cls": b"5", "cats.tar": inner, "._y.jpg": b"j"}
    write_tar(tmp_path / "outer.tar", members)
    items = read(tmp_path / "outer.tar")
    assert [item.data for item in items] == files[:2]
    assert items[0].name == f"{tmp_path}/outer.tar/x/0.jpg"


def test_a_folder_of_shards(tmp_path, files):
    (tmp_path / "shards").mkdir()
    for i, data in enumerate(files):
        write_tar(tmp_path / f"shards/{i}.tar", {"a.jpg": data})
    assert [item.data for item in read(tmp_path / "shards")] == files


@pytest.mark.parametrize(
    "columns",
    [{}, {"label": [-1, -1, -1]}, {"label": [None] * 3}, {"label": ["a", "b", "c"]}],
    ids=["none", "-1", "null", "text"],
)
def test_parquet_needs_no_labels(tmp_path, files, columns):
    """The hub's test splits have -1, or nothing."""
    structs = [{"bytes": data, "path": "x.jpg"} for data in files]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": structs, **columns}), path, row_group_size=2)
    items = read(path)
    assert [item.data for item in items] == files
    assert items[2].name == f"{path} row group 1 row 0"


def test_an_image_that_is_missing_in_parquet(tmp_path, files):
    rows = pa.array([files[0], None], pa.binary())
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    first, second = read(tmp_path / "x.parquet")
    assert isinstance(first, Sample)
    assert isinstance(second, Reject)


def test_a_data_set_and_its_bad_images(tmp_path, damaged_set):
    damaged_set(tmp_path / "set", {1}, rows=3)
    items = read(tmp_path / "set")
    assert [item.name[-5:] for item in items] == ["row 0", "row 1", "row 2"]
    assert items[1].data == b"junk"


def test_a_pattern(tmp_path, files):
    """As the source of pack may be; a shell expands it, but not in a bucket."""
    for i, data in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(data)
        write_tar(tmp_path / f"{i}.tar", {"a.jpg": data})
    assert [item.data for item in read(tmp_path / "[01].jpg*")] == files[:2]
    assert [item.data for item in read(tmp_path / "*.tar")] == files


@pytest.mark.parametrize("name", ["none", "none.jpg", "none.tar", "empty", "*.png"])
def test_nothing_is_a_sentence_at_once(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing at|no images in|no file matches"):
        iter_unlabeled(str(tmp_path / name))
