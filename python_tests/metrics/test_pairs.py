"""Pairs with and without identity: pixels by hand, SSIM against scikit-image, cosines by hand."""

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from idcore.errors import InputError
from idcore.metrics.pairs import cosine, pixel_distance, structure_similarity


def picture(seed, size=(24, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_pixels():
    black, white = Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "white")
    assert pixel_distance(black, white) == 1 and pixel_distance(white, white) == 0
    a, b = picture(0), picture(1)
    x, y = (np.asarray(p, np.float64) / 255 for p in (a, b))
    assert pixel_distance(a, b) == pytest.approx(np.sqrt(((x - y) ** 2).mean()))


def test_ssim_is_scikit_images():
    a = picture(0)
    b = Image.blend(a, picture(1), 0.4)
    luma = [np.asarray(p, np.float64) / 255 @ [0.299, 0.587, 0.114] for p in (a, b)]
    # scikit-image pads at the edges: compare its map where the whole window lies inside
    full = structural_similarity(*luma, data_range=1.0, full=True)[1][3:-3, 3:-3].mean()
    assert structure_similarity(a, b) == pytest.approx(full, abs=1e-9)
    assert structure_similarity(a, a) == pytest.approx(1)


def test_cosines():
    found = cosine(np.array([[1.0, 0], [2, 2], [0, 0]]), np.array([[0, 3.0], [1, 1], [1, 1]]))
    np.testing.assert_allclose(found, [0, 1, 0])


def test_sizes_that_are_refused():
    with pytest.raises(InputError, match="one size, got 24x20 and 10x20; make both with one width"):
        pixel_distance(picture(0), picture(0, (10, 20)))
    with pytest.raises(InputError, match="at least 7 pixels"):
        structure_similarity(picture(0, (5, 5)), picture(1, (5, 5)))
