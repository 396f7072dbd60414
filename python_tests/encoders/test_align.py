"""Alignment: the transform, the templates and both warps."""

import numpy as np
import pytest
import torch
from PIL import Image

from idcore.encoders.align import (
    align,
    invert,
    similarity_transform,
    template,
    transform_points,
    warp,
    warp_batch,
    warp_bilinear,
)
from idcore.errors import InputError


def similarity(angle, scale, x, y):
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, x], [s, c, y]])


def test_transform_is_found_exactly():
    rng = np.random.default_rng(1)
    for _ in range(20):
        wanted = similarity(rng.uniform(-3, 3), rng.uniform(0.1, 5), *rng.uniform(-100, 100, 2))
        points = rng.uniform(0, 200, (5, 2))
        got = similarity_transform(points, transform_points(points, wanted))
        np.testing.assert_allclose(got, wanted, atol=1e-9)
        np.testing.assert_allclose(transform_points(transform_points(points, got), invert(got)), points, atol=1e-9)


def test_transform_is_the_best_one():
    """No small change of rotation, scale or shift brings noisy points closer."""
    rng = np.random.default_rng(2)
    source = rng.uniform(0, 100, (5, 2))
    target = transform_points(source, similarity(0.3, 1.2, 5, -3)) + rng.normal(0, 4, (5, 2))
    best = similarity_transform(source, target)

    def error(matrix):
        return ((transform_points(source, matrix) - target) ** 2).sum()

    for change in range(4):
        for step in (-1e-3, 1e-3):
            a, b, x, y = best[0, 0], best[1, 0], best[0, 2], best[1, 2]
            values = np.array([a, b, x, y])
            values[change] += step
            a, b, x, y = values
            assert error(np.array([[a, -b, x], [b, a, y]])) > error(best)


def test_no_reflection():
    mirrored = template("arcface") * (-1, 1) + (112, 0)
    matrix = similarity_transform(mirrored, template("arcface"))
    assert np.linalg.det(matrix[:, :2]) > 0


def test_templates():
    assert template("arcface").shape == (5, 2)
    np.testing.assert_allclose(template("arcface", 224), 2 * template("arcface"))
    np.testing.assert_allclose(template("ffhq")[0], [192.98138, 239.94708])
    # More padding moves the points towards the middle; each half of padding 0.5 is a quarter of the chip.
    tight, wide = template("dlib", 100, 0.0), template("dlib", 100, 0.5)
    np.testing.assert_allclose(wide, tight / 2 + 25)
    for name in ("dlib", "arcface", "ffhq"):
        left, right, nose, mouth_left, mouth_right = template(name)
        assert left[0] < nose[0] < right[0] and left[1] < nose[1] < mouth_left[1]
        assert mouth_left[0] < nose[0] < mouth_right[0]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: template("mtcnn"), "Unknown alignment template 'mtcnn': wanted one of dlib, arcface, ffhq"),
        (lambda: template("dlib", 0), "at least 1 pixel, got 0"),
        (lambda: template("dlib", padding=-0.5), "padding must be above -0.5"),
        (lambda: similarity_transform(np.zeros((5, 2)), np.zeros((4, 2))), r"Two sets of points \[P,2\]"),
        (lambda: similarity_transform(np.ones((5, 2)), template("dlib")), "all lie on one point"),
        (lambda: similarity_transform(np.full((5, 2), np.nan), template("dlib")), "must be finite"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(InputError, match=text):
        call()


def ramp(size=200):
    """A picture whose red and green give each pixel's own x and y; blue falls where red rises."""
    rows, cols = np.mgrid[0:size, 0:size]
    return np.stack([cols, rows, 255 - cols], 2).astype(np.uint8)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7])
def test_warp_puts_every_pixel_where_the_matrix_says(scale):
    size = 40
    matrix = similarity(0.2, scale, -30 * scale, -20 * scale)
    chip = warp(ramp(), matrix, size).astype(float)
    rows, cols = np.mgrid[0:size, 0:size]
    sources = transform_points(np.stack([cols, rows], -1).reshape(-1, 2), invert(matrix))
    inside = ((sources > 5) & (sources < 194)).all(1)
    assert inside.sum() > 300
    errors = chip[..., :2].reshape(-1, 2)[inside] - sources[inside]
    assert np.abs(errors).max() < 1.01
    # PIL cuts fractions of a grey level off; between a rising and a falling ramp that cancels and shifts stay.
    x = (chip[..., 0] - chip[..., 2] + 255).ravel()[inside] / 2
    assert abs((x - sources[inside, 0]).mean()) < 0.05


def test_identity_warp_is_exact_and_outside_is_filled():
    image = ramp(50)
    np.testing.assert_array_equal(warp(image, similarity(0, 1, 0, 0), 50), image)
    shifted = warp(image, similarity(0, 1, 10, 0), 50, fill=(7, 8, 9))
    np.testing.assert_array_equal(shifted[:, :8], np.broadcast_to([7, 8, 9], (50, 8, 3)))
    np.testing.assert_array_equal(shifted[:, 12:], image[:, 2:40])


def test_shrinking_does_not_alias():
    stripes = np.zeros((800, 800, 3), np.uint8)
    stripes[:, ::2] = 255
    chip = warp(stripes, similarity(0, 0.1, -5, -5), 60)
    assert np.abs(chip.astype(int) - 127).max() < 16


def test_degenerate_matrix():
    with pytest.raises(InputError, match="no usable scale"):
        warp(ramp(), np.zeros((2, 3)), 10)


def test_align_takes_points_to_the_template():
    points = transform_points(template("arcface"), similarity(0.1, 0.8, 40, 30))
    chip = align(ramp(), points, "arcface")
    assert chip.shape == (112, 112, 3) and chip.dtype == np.uint8
    for point, wanted in zip(points, template("arcface"), strict=True):
        x, y = np.round(wanted).astype(int)
        assert np.abs(chip[y, x, :2] - point).max() < 1.6
    assert align(ramp(), points, "dlib", 64, padding=0.6).shape == (64, 64, 3)
    assert align(Image.fromarray(ramp()), points, "ffhq").shape == (512, 512, 3)


@pytest.mark.parametrize(("resample", "cut"), [("bicubic", warp), ("bilinear", warp_bilinear)])
def test_torch_warp_is_the_warp_but_for_rounding_and_differentiable(resample, cut):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (16, 16, 3), np.uint8)
    image = np.asarray(Image.fromarray(image).resize((90, 70), Image.Resampling.BICUBIC))
    matrices = np.stack([similarity(0.3, 1.5, -20, 5), similarity(-0.4, 0.2, 10, 20)])
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double().repeat(2, 1, 1, 1).requires_grad_()
    chips = warp_batch(batch, torch.from_numpy(matrices), 60, resample)
    assert chips.shape == (2, 3, 60, 60) and chips.dtype == torch.float64
    for chip, matrix in zip(chips, matrices, strict=True):
        difference = np.abs(chip.detach().permute(1, 2, 0).numpy() - cut(image, matrix, 60))
        assert difference.max() <= 0.5 + 1e-3
    chips.sum().backward()
    assert batch.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(
        lambda x: warp_batch(x, matrices[:1], 6, resample),
        (torch.rand(1, 3, 5, 7, dtype=torch.float64) * 100 + 50).requires_grad_(),
    )


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_torch_warp_s_gradient_has_the_same_bits_with_many_threads(resample):
    g = torch.Generator().manual_seed(0)
    pictures = (torch.rand(2, 3, 64, 64, generator=g) * 255).requires_grad_()
    matrices, weights = np.stack([similarity(0.1, 2.3, 1, 2)] * 2), torch.rand(2, 3, 150, 150, generator=g)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grads = [
            torch.autograd.grad((warp_batch(pictures, matrices, 150, resample) * weights).sum(), pictures)[0]
            for _ in range(8)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], other) for other in grads)


def test_torch_warp_refuses_what_does_not_fit():
    with pytest.raises(InputError, match=r"images must be float \[N, 3, H, W\], got \[3, 4, 4\]"):
        warp_batch(torch.zeros(3, 4, 4), np.zeros((1, 2, 3)), 6)
    with pytest.raises(InputError, match="a matrix for each of 2 images, got 1"):
        warp_batch(torch.zeros(2, 3, 4, 4), similarity(0, 1, 0, 0), 6)
    with pytest.raises(InputError, match="resample must be one of bilinear, bicubic, got 'area'"):
        warp_batch(torch.zeros(1, 3, 4, 4), similarity(0, 1, 0, 0), 6, "area")
