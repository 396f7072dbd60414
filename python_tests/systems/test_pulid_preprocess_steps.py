"""The steps from a photo to PuLID's features, each against loops or published figures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from idcore.encoders.align import similarity_transform, template
from idcore.encoders.eva_clip import CLIP_MEAN, CLIP_STD
from idcore.encoders.face_parsing import LABELS
from idcore.encoders.pulid_preprocess import (
    WHITENED,
    clip_pixels,
    lmeds_transform,
    shrink,
    warp_bilinear,
    whiten,
)
from idcore.errors import InputError

FFHQ = template("ffhq")


@pytest.mark.parametrize("size,want", [
    ((300, 200), (300, 200)), ((1024, 10), (1024, 10)), ((2048, 1000), (1024, 500)), ((999, 3000), (340, 1024)),
])  # fmt: skip
def test_photos_are_shrunk_and_never_enlarged(size, want):
    image = Image.new("RGB", size)
    out = shrink(image)
    assert out.size == want and (out is image) == (size == want)


def test_least_median_of_squares_equals_least_squares_where_all_points_fit():
    turn = np.array([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    source = FFHQ @ turn * 1.7 + (40, -9)
    np.testing.assert_allclose(lmeds_transform(source, FFHQ), similarity_transform(source, FFHQ), atol=1e-9)
    moved = source @ lmeds_transform(source, FFHQ)[:, :2].T + lmeds_transform(source, FFHQ)[:, 2]
    np.testing.assert_allclose(moved, FFHQ, atol=1e-9)


@pytest.mark.parametrize("wrong", range(5))
def test_least_median_of_squares_throws_one_wrong_landmark_out(wrong):
    source = FFHQ * 0.5 + (100, 50)
    source[wrong] += (90, -70)
    matrix = lmeds_transform(source, FFHQ)
    rest = [i for i in range(5) if i != wrong]
    moved = source @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(moved[rest], FFHQ[rest], atol=1e-6)
    plain = similarity_transform(source, FFHQ)
    assert np.abs(source[rest] @ plain[:, :2].T + plain[:, 2] - FFHQ[rest]).max() > 10


@pytest.mark.parametrize("source,want", [
    ([[151.46, 141.27], [240.78, 154.96], [212.21, 185.43], [184.24, 217.4], [239.06, 213.92]],
     (2.10256, 0.01595, -185.06513, -84.94168)),
    ([[131.28, 171.48], [204.87, 174.19], [191.08, 198.24], [141.49, 236.21], [198.54, 240.08]],
     (1.9748, -0.12336, -107.68611, -78.19923)),
    ([[89.62, 228.13], [196.32, 219.18], [170.86, 253.46], [145.73, 286.56], [198.05, 285.73]],
     (2.04765, 0.12032, -60.04681, -232.1059)),
])  # fmt: skip
def test_least_median_of_squares_gives_opencvs_result(source, want):
    """estimateAffinePartial2D(source, template, method=LMEDS) of OpenCV 5.0.0; in the first case it matters which
    pairs of landmarks are drawn, in the others which landmarks are thrown out."""
    a, b, x, y = want  # which OpenCV works out in float32
    np.testing.assert_allclose(lmeds_transform(source, FFHQ), [[a, -b, x], [b, a, y]], atol=3e-4)


def test_landmarks_that_coincide_are_named():
    with pytest.raises(InputError, match="coincide"):
        lmeds_transform(np.ones((5, 2)), FFHQ)
    with pytest.raises(InputError, match=r"five points \[5, 2\] twice, got \(4, 2\)"):
        lmeds_transform(np.ones((4, 2)), FFHQ)


@pytest.mark.parametrize("angle,scale,shift", [
    (0, 1, (0, 0)), (0.4, 0.7, (9, -4)), (-1.2, 2.3, (-30, 25)), (0, 1, (500, 0)),
])  # fmt: skip
def test_warp_equals_bilinear_loops_with_a_coloured_border(angle, scale, shift):
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = np.array([[c, -s, shift[0]], [s, c, shift[1]]])
    fill, size = (132, 133, 135), 36
    got = warp_bilinear(image, matrix, size, fill)

    def pixel(x, y):
        inside = 0 <= x < image.shape[1] and 0 <= y < image.shape[0]
        return image[y, x].astype(float) if inside else np.array(fill, float)

    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    for v in range(size):
        for u in range(size):
            x, y, _ = back @ (u, v, 1)
            x0, y0 = math.floor(x), math.floor(y)
            fx, fy = x - x0, y - y0
            want = ((1 - fx) * (1 - fy) * pixel(x0, y0) + fx * (1 - fy) * pixel(x0 + 1, y0)
                    + (1 - fx) * fy * pixel(x0, y0 + 1) + fx * fy * pixel(x0 + 1, y0 + 1))  # fmt: skip
            assert np.abs(got[v, u] - want).max() <= 0.5 + 1e-6, (u, v)


def test_whitening_keeps_face_and_hair_in_grey():
    assert [LABELS[i] for i in WHITENED] == [
        "background", "left ear", "right ear", "earring", "neck", "necklace", "cloth", "hat"]  # fmt: skip
    chips = torch.rand(2, 3, 4, 19)
    labels = torch.arange(19).expand(2, 4, 19)
    out = whiten(chips, labels)
    for n in range(2):
        for y in range(4):
            for x in range(19):
                r, g, b = chips[n, :, y, x].double()
                want = 1.0 if x in (0, 7, 8, 9, 14, 15, 16, 18) else 0.299 * r + 0.587 * g + 0.114 * b
                assert torch.allclose(out[n, :, y, x].double(), torch.full((3,), float(want)).double(), atol=1e-6)


def cubic(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_resize_is_plain_bicubic_and_antialias_is_an_option():
    """One row, 512 -> 336, by hand: four taps with a = -0.75, edges repeated, overshoot kept."""
    torch.manual_seed(1)
    row = (torch.rand(512) > 0.5).double()
    chip = row.expand(1, 3, 512, 512).float()
    out = clip_pixels(chip, 336, antialias=False)
    for i in (0, 1, 100, 335):
        x = (i + 0.5) * 512 / 336 - 0.5
        x0 = math.floor(x)
        want = sum(cubic(x - (x0 + j)) * float(row[min(max(x0 + j, 0), 511)]) for j in range(-1, 3))
        for c in range(3):
            assert abs(float(out[0, c, 50, i]) - (want - CLIP_MEAN[c]) / CLIP_STD[c]) < 1e-4
    values = out[0, 0] * CLIP_STD[0] + CLIP_MEAN[0]
    assert values.max() > 1.01 and values.min() < -0.01
    assert (clip_pixels(chip, 336, antialias=True) - out).abs().max() > 0.1
