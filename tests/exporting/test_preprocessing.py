"""The graph's preprocessing has the pixels of the evaluation's, as Pillow computes them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.config import Augment
from distrain.data.decoding.augment import make_eval_params
from distrain.data.decoding.decoder import normalize_images
from distrain.data.decoding.image import crop_and_resize
from distrain.exporting.preprocessing import Preprocessing
from distrain.rundir.model_info import ModelInfo

INFO = ModelInfo(
    distrain="0",
    model={},
    classes=("a", "b"),
    channels="RGB",
    mean=(120.5, 110.25, 100.125),
    std=(60.0, 61.0, 62.5),
    crop=20,
    short_side=23,
    image_size=None,
    interpolation="bilinear",
    antialias=True,
)


def draw_pixels(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def expect(pixels, crop, short_side):
    """What an evaluation with Pillow feeds to the network, before normalization."""
    sizes = np.array([pixels.shape[:2]])
    params = make_eval_params(sizes, Augment(crop=crop, short_side=short_side))
    return crop_and_resize(pixels, params.window_start[0], params.window_size[0], crop)


def resize(info, pixels):
    found = Preprocessing(info).resize_and_crop(torch.from_numpy(pixels)[None])
    return found[0].permute(1, 2, 0).numpy()


@given(st.integers(1, 300), st.integers(0, 300))
def test_wide_images_have_pillows_pixels(height, more):
    pixels = draw_pixels(height, height + more)
    assert np.array_equal(resize(INFO, pixels), expect(pixels, 20, 23))


@given(st.integers(1, 300), st.integers(1, 300))
def test_tall_images_have_them_but_for_the_order_of_the_passes(width, more):
    """Which Pillow chooses by its version: each pass rounds once."""
    pixels = draw_pixels(width + more, width)
    assert np.abs(resize(INFO, pixels) - expect(pixels, 20, 23)).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(23, 23), (23, 40), (41, 23)])
def test_images_of_the_short_side_are_cut_alone(height, width):
    """An odd margin is larger at the bottom and the right."""
    pixels = draw_pixels(height, width)
    top = (height - 20) // 2
    left = (width - 20) // 2
    cut = pixels[top : top + 20, left : left + 20]
    assert np.array_equal(resize(INFO, pixels), cut)


def test_stored_sizes_are_used_as_they_are():
    info = replace(INFO, short_side=None, image_size=(30, 26))
    pixels = draw_pixels(30, 26)
    assert np.array_equal(resize(info, pixels), pixels[5:25, 3:23])
    wide = draw_pixels(50, 60)
    assert np.array_equal(resize(info, wide), expect(wide, 20, 26))


def test_normalization_is_that_of_the_loader():
    pixels = np.stack([draw_pixels(23, 31), draw_pixels(23, 31)[::-1]])
    found = Preprocessing(INFO)(torch.from_numpy(pixels))
    cut = np.stack([expect(image, 20, 23) for image in pixels])
    mean = np.tile(np.array(INFO.mean, np.float32), (2, 1))
    std = np.array(INFO.std, np.float32)
    wanted = normalize_images(torch.from_numpy(cut), np.zeros(2), mean, std)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
