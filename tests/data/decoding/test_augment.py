import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distrain.data.config import Augment
from distrain.data.decoding.augment import draw_augment_params, make_eval_params
from distrain.data.decoding.image import resize_short_side
from distrain.data.order import Cursor

IDS = np.arange(50_000)
AXES = np.diag([50.0, 10.0, 2.0])


def draws(ids=IDS, seed=0, epoch=0, step=0, v=0, size=(256, 240), axes=AXES, **changes):
    sizes = np.tile(size, (len(ids), 1)) if np.ndim(size) == 1 else np.asarray(size)
    return draw_augment_params(
        seed, Cursor(epoch, step), v, ids, sizes, Augment(crop=224, **changes), axes
    )


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 500))
def test_a_draw_depends_on_its_sample_alone(ids, epoch):
    together = draws(np.array(ids), epoch=epoch)
    for i, sample in enumerate(ids):
        alone = draws(np.array([sample]), epoch=epoch)
        for field in ("window_start", "window_size", "mirror", "color_shift"):
            assert np.array_equal(getattr(together, field)[i], getattr(alone, field)[0])


@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=30
    ),
    st.sampled_from(["crop", "random_resized"]),
    st.integers(0, 9),
)
def test_windows_lie_inside_images_of_any_size(sizes, window, epoch):
    d = draws(
        np.arange(len(sizes)), epoch=epoch, size=sizes, short_side=256, window=window
    )
    assert (d.window_start >= 0).all()
    assert (d.window_size > 0).all()
    assert (d.window_start + d.window_size <= np.array(sizes) * (1 + 1e-12)).all()
    c = make_eval_params(np.array(sizes), Augment(crop=224, short_side=256))
    assert (c.window_start >= 0).all()
    assert (c.window_start + c.window_size <= np.array(sizes) * (1 + 1e-12)).all()


@given(st.integers(1, 900), st.integers(1, 900))
def test_a_short_side_is_resized_as_pil_would_be_told_to(height, width):
    """The window, in stored pixels, is the crop's share of the image whose short side has been resized."""
    d = draws(np.arange(50), size=(height, width), short_side=256)
    scale = min(height, width) / 256
    resized = np.floor(np.array([height, width]) / scale + 0.5)
    assert resized.min() == 256
    np.testing.assert_allclose(
        d.window_size, np.tile(224 * np.array([height, width]) / resized, (50, 1))
    )
    place = d.window_start * resized / [height, width]
    np.testing.assert_allclose(place, np.rint(place), atol=1e-6)
    if max(resized) <= 2000:
        assert resize_short_side(Image.new("RGB", (width, height)), 256, 1 << 30).size[
            ::-1
        ] == tuple(resized.astype(int)) or np.any(
            np.abs(np.array([height, width]) / scale % 1 - 0.5) < 1e-9
        )


def test_random_resized_windows_are_as_torchvision_draws_them():
    """Area uniform in 8 to 100 %, the logarithm of the aspect in that of 3:4 to 4:3, places uniform."""
    d = draws(size=(375, 500), window="random_resized")
    assert (d.window_start == np.rint(d.window_start)).all()
    assert (d.window_size == np.rint(d.window_size)).all()
    area, aspect = (
        d.window_size.prod(1) / (375 * 500),
        d.window_size[:, 1] / d.window_size[:, 0],
    )
    assert 0.078 < area.min() < 0.082
    assert area.max() <= 1
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    generator = np.random.default_rng(0)
    expected = []
    while len(expected) < 50_000:  # rejection, as torchvision does it
        share, ratio = (
            generator.uniform(0.08, 1),
            np.exp(generator.uniform(*np.log([3 / 4, 4 / 3]))),
        )
        w, h = (
            round(np.sqrt(375 * 500 * share * ratio)),
            round(np.sqrt(375 * 500 * share / ratio)),
        )
        if w <= 500 and h <= 375:
            expected.append((h, w))
    for axis in (0, 1):
        found, wanted = (
            np.sort(d.window_size[:, axis]),
            np.sort(np.array(expected)[:, axis]),
        )
        assert np.abs(found - wanted).max() < 12, "quantiles agree"
    room = np.array([375, 500]) - d.window_size
    np.testing.assert_allclose(
        (d.window_start / np.maximum(room, 1))[room.min(1) > 50].mean(0), 0.5, atol=0.01
    )


def test_random_resized_falls_back_to_the_centre():
    d = draws(np.arange(200), size=(10, 2000), window="random_resized")
    whole = np.all(d.window_size == [10, 13], 1)
    assert whole.all(), (
        "a strip has no room for any window but 3:4 to 4:3 of its height"
    )
    assert (d.window_start == [0, 993]).all()


def test_windows_are_uniform_and_inside():
    start = draws().window_start.astype(int)
    for axis, span in ((0, 33), (1, 17)):
        counts = np.bincount(start[:, axis], minlength=span)
        assert len(counts) == span
        expected = len(IDS) / span
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert abs(np.corrcoef(start.T)[0, 1]) < 0.02


def test_mirror_is_fair_and_can_be_off():
    assert abs(draws().mirror.mean() - 0.5) < 0.01
    assert not draws(mirror=False).mirror.any()


def test_colour_follows_the_axes():
    """Krizhevsky 2012, section 4.1: the shift is sum of axis * N(0, 0.1)."""
    colour = draws().color_shift.astype(np.float64)
    np.testing.assert_allclose(colour.std(0), [5, 1, 0.2], rtol=0.02)
    np.testing.assert_allclose(colour.mean(0) / [5, 1, 0.2], 0, atol=0.02)
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.02
    kurtosis = (colour**4).mean(0) / (colour**2).mean(0) ** 2
    np.testing.assert_allclose(kurtosis, 3, atol=0.15)
    assert not draws(colour=0.0).color_shift.any()


def test_epochs_and_seeds_differ():
    base = draws()
    for other in (draws(epoch=1), draws(seed=1)):
        assert (base.window_start == other.window_start).all(1).mean() < 0.01
        assert (base.color_shift == other.color_shift).mean() < 0.01


@pytest.mark.parametrize("window", ["crop", "random_resized"])
def test_draws_of_chunks_of_32(window):
    """The released source's: one window and mirror for 32 that follow each other, a colour for each."""
    d = draws(np.arange(1000, 1100), draws="chunk", window=window)
    for field in (d.window_start, d.window_size, d.mirror):
        for chunk in (slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 100)):
            assert (field[chunk] == field[chunk][0]).all()
    assert len({tuple(s) for s in d.window_start}) == 4
    assert len({tuple(c) for c in d.color_shift}) == 100
    assert np.array_equal(d.color_shift, draws(np.arange(1000, 1100)).color_shift), (
        "colours are those of the samples"
    )
    others = draws(np.arange(2000, 2100), draws="chunk", window=window)
    assert np.array_equal(others.window_start, d.window_start), (
        "what the samples are does not matter"
    )


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"step": 1}, {"v": 1}])
def test_chunks_differ_by_seed_epoch_step_and_virtual_worker(change):
    ids = np.arange(32 * 200)
    base, other = draws(ids, draws="chunk"), draws(ids, draws="chunk", **change)
    assert (base.window_start == other.window_start)[::32].all(1).mean() < 0.05
    assert 0.3 < (base.mirror == other.mirror)[::32].mean() < 0.7


def test_chunks_of_neighbouring_virtual_workers_are_all_different():
    """A micro-batch that is no multiple of 32 must not share a chunk with the next one."""
    starts = [
        tuple(s)
        for v in range(50)
        for s in draws(np.arange(40), v=v, draws="chunk").window_start[[0, 32]]
    ]
    assert len(set(starts)) > 85, "33 x 17 places: a few meet by chance"


def test_centre():
    d = make_eval_params(np.tile([256, 255], (3, 1)), Augment(crop=224))
    assert d.window_start.tolist() == [[16, 15]] * 3
    assert not d.mirror.any()
    assert not d.color_shift.any()


def test_no_augmentation_is_the_evaluation_draw():
    sizes = np.array([[256, 255], [300, 224]])
    for short_side in (None, 256):
        none = draws(
            np.arange(2),
            size=sizes,
            window="centre",
            mirror=False,
            colour=0.0,
            short_side=short_side,
        )
        wanted = make_eval_params(sizes, Augment(crop=224, short_side=short_side))
        for field in ("window_start", "window_size", "mirror", "color_shift"):
            assert np.array_equal(getattr(none, field), getattr(wanted, field)), field
    assert draws(window="centre").mirror.any(), "the window alone"
