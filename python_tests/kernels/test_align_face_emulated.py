"""The CUDA kernel of `align_face`, compiled for the host and run thread by thread, against float64."""

from __future__ import annotations

import ctypes as c
import math
import random

import pytest
import torch
from cuda_params import struct
from test_cuda_emulated import compile_library

from idcore.backends.align_face import RESAMPLE, TYPES, Faces, _reference

Picture = struct(
    "Picture", data=c.c_void_p, height=c.c_int64, width=c.c_int64, stride_y=c.c_int64, stride_x=c.c_int64,
    stride_channel=c.c_int64,
)  # fmt: skip
Params = struct(
    "AlignFaceParams", faces=c.c_int64, height=c.c_int64, width=c.c_int64, num_pictures=c.c_int32, filter=c.c_int32,
    picture=Picture * 16, picture_of=c.c_void_p, matrix=c.c_void_p, out=c.c_void_p, type=c.c_int32,
    rounded=c.c_int32, stride_face=c.c_int64, stride_channel=c.c_int64, stride_y=c.c_int64, stride_x=c.c_int64,
    bgr=c.c_int32, fill=c.c_float * 3, mean=c.c_float * 3, std=c.c_float * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = compile_library(tmp_path_factory.mktemp("emulated"), source="emulate_align_face.cpp")
    library.align_face_emulated.restype = c.c_char_p
    return library


def params(f: Faces) -> Params:
    """The struct; keeps no reference, so `f` must outlive it."""
    count, _, height, width = f.out.shape
    of = None if f.picture_of is None else f.picture_of.data_ptr()
    p = Params(count, height, width, len(f.pictures), RESAMPLE[f.resample])
    for i, t in enumerate(f.pictures):
        p.picture[i] = Picture(t.data_ptr(), t.shape[0], t.shape[1], *t.stride())
    p.picture_of, p.matrix, p.out, p.type = of, f.matrices.data_ptr(), f.out.data_ptr(), TYPES[f.out.dtype]
    p.rounded, p.bgr = f.rounded, f.bgr
    p.stride_face, p.stride_channel, p.stride_y, p.stride_x = f.out.stride()
    for name in ("fill", "mean", "std"):
        setattr(p, name, (c.c_float * 3)(*getattr(f, name)))
    return p


def turned(scale: float, degrees: float, x: float, y: float) -> list[list[float]]:
    """Picture to chip pixels: scaled and turned, (x, y) of the picture to (10, 10) of the chip."""
    a, b = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return [[a, -b, 10 - a * x + b * y], [b, a, 10 - b * x - a * y]]


def pictures(*sizes: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Smooth colours with noise on top, uint8 [H, W, 3]."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for height, width in sizes:
        ramp = torch.linspace(0, 200, height)[:, None, None] + torch.linspace(0, 55, width)[None, :, None]
        made.append((ramp + 60 * torch.rand(height, width, 3, generator=g)).clamp(0, 255).to(torch.uint8))
    return tuple(made)


def faces(matrices, images, size=(20, 21), dtype=torch.float32, **changes) -> Faces:
    """A call whose result is full of 77 inside a frame of 77."""
    matrix = torch.tensor(matrices, dtype=torch.float64)
    frame = torch.full((len(matrix), 3, size[0] + 2, size[1] + 2), 77, dtype=dtype)
    one = Faces(images, matrix, None, frame[:, :, 1:-1, 1:-1], "bicubic", False, False, (9.0, 99.0, 199.0),
                (0.0,) * 3, (1.0,) * 3)  # fmt: skip
    return one._replace(**changes)


def check(library, f: Faces) -> int:
    """Compares with float64; the number of tiles that went through averages in shared memory."""
    boxes = c.c_int(0)
    results = []
    for seed in (1, 2):
        f.out.fill_(77)
        error = library.align_face_emulated(c.byref(params(f)), seed, c.byref(boxes))
        assert error is None, error.decode()
        results.append(f.out.clone())
    assert torch.equal(*results), "depends on the order of threads"
    frame = f.out.as_strided((len(f.out), 3, f.out.shape[2] + 2, f.out.shape[3] + 2), f.out.stride(), 0)
    assert (frame[:, :, 0] == 77).all() and (frame[:, :, :, -1] == 77).all(), "wrote outside of its result"
    exact = f._replace(out=torch.empty(f.out.shape, dtype=torch.float64), rounded=f.out.dtype == torch.uint8)
    _reference(exact)
    error = (results[0].double() - exact.out).abs().max().item()
    size = exact.out.abs().max().item()
    step = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.uint8: 0.0}[f.out.dtype]
    whole = 1.0 if f.out.dtype == torch.uint8 else 0.5 / min(f.std) if f.rounded else 0.0  # a value beside .5
    assert error <= step * max(size, 1.0) + 1.01 * whole, error
    if whole:
        assert (results[0].double() - exact.out).abs().mean().item() <= 0.51 * whole
    return boxes.value


WIDE = pictures((260, 300), (90, 40))
MANY = [turned(0.3, 20, 150, 120), turned(0.05, 45, 140, 130), turned(0.1, -70, 20, 10), turned(0.8, 5, 299, 259)]


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [0.02, 0.09, 0.17, 0.24, 0.26, 0.5, 0.7, 1.0, 2.5])
def test_scales_from_a_dot_to_an_enlargement(library, scale, resample):
    f = faces([turned(scale, 33, 150, 100), turned(scale, 180, 290, 5)], WIDE[:1], resample=resample)
    boxes = check(library, f)
    assert (boxes > 0) == (resample == "bicubic" and scale < 0.25)  # averages of at least 2 x 2


def test_the_largest_box_of_a_similarity_fits(library):
    big = pictures((400, 400))
    f = faces([turned(0.1668, 45, 200, 200)], big, size=(64, 64))  # blocks of 2 x 2, samples 1.5 of them apart
    assert check(library, f) == 64


def test_a_sheared_matrix_whose_box_does_not_fit(library):
    f = faces([[[0.05, 0.0, 3.0], [0.01, 1.0, -40.0]], [[0.01, 0.2, 0.0], [0.0, -0.1, 20.0]]], WIDE[:1])
    check(library, f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rounded", [False, True])
def test_dtypes_and_normalisation(library, dtype, rounded):
    plain = {} if dtype == torch.uint8 else dict(mean=(127.5, 100.0, 0.5), std=(128.0, 50.0, 255.0))
    check(library, faces(MANY, WIDE[:1], dtype=dtype, rounded=rounded, **plain))


def test_colour_order_layout_and_strides(library):
    padded = torch.full((3, 260, 310), 255, dtype=torch.uint8)
    padded[:, :, 4:304] = WIDE[0].permute(2, 0, 1)
    check(library, faces(MANY, (padded[:, :, 4:304].permute(1, 2, 0),), bgr=True))
    f = faces(MANY, WIDE[:1])
    last = torch.empty(4, 20, 21, 3).permute(0, 3, 1, 2)
    library.align_face_emulated(c.byref(params(f)), 1, c.byref(c.c_int()))
    library.align_face_emulated(c.byref(params(f._replace(out=last))), 1, c.byref(c.c_int()))
    assert torch.equal(last, f.out)


def test_faces_in_several_pictures_and_indices_outside(library):
    of = torch.tensor([0, 1, 7, -3], dtype=torch.int32)
    check(library, faces(MANY, WIDE, picture_of=of))


def test_a_matrix_without_inverse_gives_the_fill_colour(library):
    nan = float("nan")
    f = faces([[[0.0] * 3] * 2, [[1.0, 0.0, nan], [0.0, 1.0, 0.0]]], WIDE[:1], size=(33, 5))
    check(library, f)
    assert (f.out == torch.tensor([9.0, 99.0, 199.0])[:, None, None]).all()


def test_struct_layout_is_the_same_here_and_in_csrc(library):
    assert library.params_bytes() == c.sizeof(Params)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(5))
def test_random_faces(library, block):
    for seed in range(20 * block, 20 * block + 20):
        r = random.Random(seed)
        sizes = [(r.randint(1, 200), r.randint(1, 200)) for _ in range(r.randint(1, 3))]
        matrices = [turned(math.exp(r.uniform(-5, 1.5)), r.uniform(0, 360), r.uniform(-20, 220), r.uniform(-20, 220))
                    for _ in range(r.randint(1, 3))]  # fmt: skip
        of = torch.tensor([r.randrange(len(sizes)) for _ in matrices], dtype=torch.int32)
        size = (r.randint(1, 40), r.randint(1, 40))
        check(library, faces(matrices, pictures(*sizes, seed=seed), size, r.choice(tuple(TYPES)), picture_of=of,
                             resample=r.choice(tuple(RESAMPLE)), bgr=r.random() < 0.5))  # fmt: skip
