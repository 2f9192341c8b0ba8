import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.augment import centre, draw

IDS = np.arange(50_000)
AXES = np.diag([50.0, 10.0, 2.0])


def draws(ids=IDS, seed=0, epoch=0, **changes):
    options = {"size": (256, 240), "crop": 224, "mirror": True, "colour": 0.1 * AXES}
    return draw(seed, epoch, ids, **{**options, **changes})


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 500))
def test_a_draw_depends_on_its_sample_alone(ids, epoch):
    together = draws(np.array(ids), epoch=epoch)
    for i, sample in enumerate(ids):
        alone = draws(np.array([sample]), epoch=epoch)
        for field in ("start", "mirror", "colour"):
            assert np.array_equal(getattr(together, field)[i], getattr(alone, field)[0])


def test_windows_are_uniform_and_inside():
    start = draws().start
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
    colour = draws().colour.astype(np.float64)
    np.testing.assert_allclose(colour.std(0), [5, 1, 0.2], rtol=0.02)
    np.testing.assert_allclose(colour.mean(0) / [5, 1, 0.2], 0, atol=0.02)
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.02
    kurtosis = (colour**4).mean(0) / (colour**2).mean(0) ** 2
    np.testing.assert_allclose(kurtosis, 3, atol=0.15)
    assert not draws(colour=np.zeros((3, 3))).colour.any()


def test_epochs_and_seeds_differ():
    base = draws()
    for other in (draws(epoch=1), draws(seed=1)):
        assert (base.start == other.start).all(1).mean() < 0.01
        assert (base.colour == other.colour).mean() < 0.01


def test_centre():
    d = centre(3, size=(256, 255), crop=224)
    assert d.start.tolist() == [[16, 15]] * 3
    assert not d.mirror.any()
    assert not d.colour.any()
