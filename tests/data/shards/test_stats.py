import numpy as np

from distrain.data.shards.stats import ColorStatistics, PixelMoments


def test_moments_equal_numpys_in_any_order():
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (rng.integers(1, 40), 17, 3), dtype=np.uint8)
        for _ in range(20)
    ]
    forward, backward = PixelMoments(), PixelMoments()
    for image in images:
        forward.add_image(image)
    for image in images[::-1]:
        backward.add_image(image)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(
        np.float64
    )
    found = forward.to_statistics()
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(pixels.T, bias=True), rtol=1e-10
    )
    assert np.array_equal(found.covariance, backward.to_statistics().covariance)


def test_a_fourth_byte_of_padding_is_not_a_color():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    padded = PixelMoments()
    padded.add_image(pixels)
    plain = PixelMoments()
    plain.add_image(pixels[..., :3])
    assert vars(padded) == vars(plain)


def test_principal_axes_rebuild_the_covariance():
    a = np.random.default_rng(1).normal(size=(3, 3))
    statistics = ColorStatistics.from_covariance(np.zeros(3), a @ a.T)
    axes = statistics.compute_principal_axes()
    np.testing.assert_allclose(axes @ axes.T, a @ a.T, rtol=1e-10)
    lengths = np.linalg.norm(axes, axis=0)
    assert (np.diff(lengths) <= 0).all()
    assert (axes[np.abs(axes).argmax(0), range(3)] > 0).all()
    variances = statistics.compute_principal_axes("variance")
    np.testing.assert_allclose(variances, axes * lengths / 255, rtol=1e-10)


def test_a_grey_set_has_no_axis_of_its_own():
    moments = PixelMoments()
    moments.add_image(np.full((4, 4, 3), 7, np.uint8))
    found = moments.to_statistics()
    assert found.std.tolist() == [1, 1, 1]
    assert not found.compute_principal_axes().any()
