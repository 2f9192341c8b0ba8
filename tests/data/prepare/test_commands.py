import pytest
from PIL import Image

from distrain.data.prepare import commands


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / "a.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("gib", "geometry", "expected"),
    [(64, "square:8", 8), (3, "square:8", 5), (3, "keep", 1), (0.1, "square:8", 1)],
)
def test_memory_bounds_the_number_of_processes(
    monkeypatch, photos, tmp_path, gib, geometry, expected
):
    monkeypatch.setattr(commands, "count_available_cores", lambda: 8)
    monkeypatch.setattr(commands, "count_available_memory", lambda: int(gib * 2**30))
    used = []
    monkeypatch.setattr(
        commands,
        "pack_dataset",
        lambda *_, num_processes, **__: used.append(num_processes),
    )
    notes = []
    commands.pack(
        photos,
        tmp_path / "out",
        geometry=geometry,
        on_source=lambda source: notes.extend(source.notes),
    )
    assert used == [expected]
    found = [note for note in notes if f"{expected} of 8 cores are used" in note]
    assert len(found) == (expected < 8)
    # Who names a number gets it.
    commands.pack(photos, tmp_path / "out", geometry=geometry, processes=7)
    assert used == [expected, 7]
