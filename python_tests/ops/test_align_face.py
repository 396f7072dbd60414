"""`align_face`: every backend against float64, against PIL, and what it may read and write."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from PIL import Image

from idcore import _C
from idcore.backends import align_face as backends
from idcore.ops import align_face

SCALES = (3.0, 1.0, 0.7, 0.5, 0.3, 0.24, 0.1, 0.02, 0.0005)
KINDS = ("bilinear", "bicubic")


def similarity(angle, scale, middle, size):
    """Takes `middle` of the picture to the chip's middle."""
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[c, -s], [s, c]])
    return np.column_stack([linear, np.full(2, size / 2) - linear @ np.asarray(middle, float)])


@pytest.fixture(scope="module")
def picture():
    """Smooth where small, rough where large. [300, 420, 3]"""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 42, 3), np.uint8)).resize((420, 300), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(coarse) // 2 + rng.integers(0, 128, (300, 420, 3), np.uint8))


@pytest.fixture
def all_isas():
    yield _C.usable_isas()
    _C.set_cpu_isa("")


def exact(picture, matrix, size, resample, fill=(0.0, 0.0, 0.0), real=torch.float64):
    """Chips before rounding, [F, 3, S, S]."""
    out = torch.empty(len(matrix), 3, size, size, dtype=real)
    faces = backends.Faces(
        (picture,), torch.as_tensor(matrix), None, out, resample, False, False, fill, (0.0,) * 3, (1.0,) * 3
    )  # fmt: skip
    backends._reference(faces, real)
    return out


@pytest.mark.parametrize("resample", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_cpu_is_as_good_as_pytorch(picture, scale, resample, all_isas):
    size, fill = 67, (12.0, 200.0, 90.0)
    middles = ((210, 150), (3, 290), (-40 / scale, 100))
    matrix = np.stack([similarity(a, scale, m, size) for a, m in zip((0.0, 0.4, 2.5), middles, strict=True)])
    truth = exact(picture, matrix, size, resample, fill)
    limit = 2 * (exact(picture, matrix, size, resample, fill, torch.float32) - truth).abs().max() + 255 * 1e-6
    for isa in all_isas:
        _C.set_cpu_isa(isa)
        common = {"resample": resample, "fill": fill, "backend": "cpu"}
        chips = align_face(picture, matrix, size, dtype=torch.float32, rounded=False, **common)
        error = (chips - truth).abs()
        if resample == "bicubic":
            # on the border between picture and fill one rounding of the position decides
            error = error[error < 1]
            assert error.numel() > 0.999 * chips.numel()
        assert error.max() <= limit, isa
        grey = align_face(picture, matrix, size, **common)
        tie = (truth - truth.floor() - 0.5).abs() < limit
        right = (grey == truth.round()) | tie | ((chips - truth).abs() >= 1)
        assert right.all(), isa


@pytest.mark.parametrize("scale", SCALES[:-1])
def test_bicubic_is_pils(picture, scale):
    """PIL works in steps that each cut or round to whole grey levels: up to two levels, and darker by up to a half."""
    size = 60
    matrix = similarity(0.3, scale, (200, 160), size)
    over, shrink = (2, max(1, int(0.5 / scale))) if scale < 1 else (1, 1)
    corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    back = np.linalg.inv(corner @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(corner)) @ np.diag(
        [1 / over, 1 / over, 1]
    )
    back = np.diag([1 / shrink, 1 / shrink, 1]) @ back
    pil = Image.fromarray(picture.numpy()).reduce(shrink)
    pil = pil.transform((size * over,) * 2, Image.Transform.AFFINE, tuple(back[:2].ravel()), Image.Resampling.BICUBIC)
    wanted = np.asarray(pil.reduce(over)).astype(int)
    got = align_face(picture, matrix, size, layout="nhwc")[0].numpy().astype(int)
    assert np.abs(got - wanted).max() <= 2
    assert -0.1 < (got - wanted).mean() < 0.6


def test_bilinear_by_hand():
    """One pixel at a time, in Python's floats, with a border of fill."""
    rng = np.random.default_rng(4)
    image, fill = rng.integers(0, 256, (5, 7, 3), np.uint8), (9, 99, 199)
    matrix = np.array([[1.3, -0.4, 0.7], [0.2, 0.9, -1.1]])
    padded = np.empty((1005, 1007, 3))
    padded[:] = fill
    padded[500:505, 500:507] = image
    a = np.linalg.inv(matrix[:, :2])
    wanted = np.zeros((9, 9, 3))
    for v in range(9):
        for u in range(9):
            x, y = a @ (np.array([u, v]) - matrix[:, 2]) + 500
            j, i = int(x), int(y)
            fx, fy = x - j, y - i
            wanted[v, u] = (1 - fy) * ((1 - fx) * padded[i, j] + fx * padded[i, j + 1])
            wanted[v, u] += fy * ((1 - fx) * padded[i + 1, j] + fx * padded[i + 1, j + 1])
    for backend in ("cpu", "reference"):
        chips = align_face(
            image, matrix, 9, resample="bilinear", fill=fill, layout="nhwc", dtype=torch.float32, rounded=False,
            backend=backend,
        )  # fmt: skip
        np.testing.assert_allclose(chips[0].numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("resample", KINDS)
def test_forms_of_the_result_are_all_one_chip(picture, resample, backend):
    matrix = np.stack([similarity(0.2, s, (200, 120), 50) for s in (0.4, 1.1)])
    size, common = (41, 50), {"resample": resample, "backend": backend, "fill": (1, 2, 3)}
    grey = align_face(picture, matrix, size, **common)
    assert grey.shape == (2, 3, 41, 50) and grey.dtype == torch.uint8
    assert torch.equal(align_face(picture, matrix, size, layout="nhwc", **common).permute(0, 3, 1, 2), grey)
    assert torch.equal(align_face(picture, matrix, size, bgr=True, **common), grey.flip(1))
    mean, std = (10.0, 127.5, 3.0), (1.0, 127.5, 7.0)
    wanted = (grey.float() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("nchw", "nhwc"):
            got = align_face(
                picture, matrix, size, dtype=dtype, mean=mean, std=std, bgr=True, layout=layout, **common
            ).to(torch.float32)
            got = got if layout == "nchw" else got.permute(0, 3, 1, 2)
            assert torch.equal(got, wanted.flip(1).to(dtype).float())
    out = torch.full((2, 6, 44, 100), float("nan"))
    inside = out[:, ::2, 2:43, ::2]
    assert align_face(picture, matrix, size, dtype=torch.float32, out=inside, **common) is inside
    assert torch.equal(inside, grey.float())
    inside.fill_(float("nan"))
    assert out.isnan().all(), "written beside the given memory"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("resample", KINDS)
def test_pictures_of_any_size_and_strides(picture, resample, backend):
    matrix = similarity(0.5, 0.35, (180, 130), 48)
    common = {"resample": resample, "backend": backend}
    plain = align_face(picture, matrix, 48, **common)
    planes = picture.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.zeros(300, 500, 4, dtype=torch.uint8)[:, 40:460, :3]
    wide.copy_(picture)
    flipped = picture.numpy()[::-1].copy()[::-1]
    for same in (planes, wide, flipped, picture.numpy()):
        assert torch.equal(align_face(same, matrix, 48, **common), plain)
    # every face in its own picture; a picture a face, and more pictures than one kernel call holds
    small = picture[10:43, 20:61].contiguous()
    two = align_face([small, picture], [matrix] * 3, 48, picture_of=[1, 0, 1], **common)
    assert torch.equal(two[[0, 2]], plain.expand(2, -1, -1, -1))
    assert torch.equal(two[1:2], align_face(small, matrix, 48, **common))
    many = [picture[i : i + 200] for i in range(19)]
    each = align_face(many, [matrix] * 19, 48, **common)
    for i in (0, 15, 16, 18):
        assert torch.equal(each[i : i + 1], align_face(many[i], matrix, 48, **common))
    reverse = align_face(many, [matrix] * 19, 48, picture_of=torch.arange(18, -1, -1), **common)
    assert torch.equal(reverse.flip(0), each)


@pytest.mark.parametrize("resample", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (7, 2)])
def test_tiny_pictures(resample, size):
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for scale in (9.0, 1.0, 0.3, 0.01):
        matrix = similarity(0.3, scale, (size[1] / 2, size[0] / 2), 20)
        chips = [
            align_face(image, matrix, 20, resample=resample, fill=(7, 8, 9), backend=b) for b in ("cpu", "reference")
        ]
        assert (chips[0].int() - chips[1].int()).abs().max() <= 1


def test_nothing_behind_the_picture_is_read():
    """The picture ends where a page begins that must not be touched."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(page), 0) != 0:
        pytest.skip("this machine does not protect pages")
    try:
        for step in (3, 4):
            bytes_ = 40 * 30 * step - (step - 3)
            flat = np.frombuffer(memory, np.uint8, bytes_, 2 * page - bytes_)
            image = np.lib.stride_tricks.as_strided(flat, (30, 40, 3), (40 * step, step, 1))
            for scale in (1.5, 0.9, 0.2):
                for resample in KINDS:
                    matrix = similarity(0.1, scale, (35, 27), 64)
                    chip = align_face(image, matrix, 64, resample=resample, backend="cpu")
                    assert torch.equal(chip, align_face(image.copy(), matrix, 64, resample=resample, backend="cpu"))
    finally:
        libc.mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("resample", KINDS)
def test_far_away_and_degenerate_faces_are_fill(picture, resample):
    away = [
        similarity(0.1, s, (x, y), 30) for s in (0.01, 1.0) for x, y in ((1e5, 0), (0, -1e5), (-1e9, 1e9), (1e290, 0))
    ]
    away.append(np.array([[1e10, -1e10, 1e305], [1e10, 1e10, 1e305]]))  # infinity less infinity
    for backend in ("cpu", "reference"):
        chips = align_face(picture, np.stack(away), 30, resample=resample, fill=(5, 6, 7), backend=backend)
        assert torch.equal(chips, torch.tensor([5, 6, 7], dtype=torch.uint8)[:, None, None].expand_as(chips))
        # what the op refuses on a CPU, but cannot see in a GPU's memory
        bad = torch.zeros(4, 2, 3, dtype=torch.float64)
        bad[1, 0, 0] = bad[1, 1, 1] = float("nan")
        bad[2, 0, 0] = bad[2, 1, 1] = 1e200
        bad[3, 0, 0] = bad[3, 1, 1] = 1
        bad[3, 0, 2] = float("inf")
        out = torch.zeros(4, 3, 9, 9)
        plain = ((1.0, 2.0, 3.0), (0.0,) * 3, (1.0,) * 3)
        backends.run(backend, backends.Faces((picture,), bad, None, out, resample, True, False, *plain))
        assert torch.equal(out, torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand_as(out))


def test_threads_do_not_matter(picture):
    before = torch.get_num_threads()
    matrix = np.stack([similarity(a, s, (200, 150), 112) for a, s in ((0.1, 0.3), (2.0, 0.8), (1.0, 0.1))])
    try:
        chips = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            chips.append([align_face(picture, matrix, 112, resample=r, backend="cpu") for r in KINDS])
        for other in chips[1:]:
            assert all(torch.equal(a, b) for a, b in zip(chips[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_no_faces(picture):
    assert align_face(picture, np.zeros((0, 2, 3)), 20).shape == (0, 3, 20, 20)
