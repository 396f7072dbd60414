"""`align_face` says what was wanted, what came, and what to do."""

import numpy as np
import pytest
import torch

from idcore.errors import InputError, NoBackendError
from idcore.ops import align_face

PICTURE = torch.zeros(8, 9, 3, dtype=torch.uint8)
MATRIX = np.array([[1.0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"pictures": torch.zeros(8, 9, 3)}, r"picture 0 must be uint8 RGB \[H, W, 3\].*got \[8, 9, 3\] torch.float32"),
        ({"pictures": torch.zeros(8, 9, 4, dtype=torch.uint8)}, r"got \[8, 9, 4\]"),
        ({"pictures": torch.zeros(0, 9, 3, dtype=torch.uint8)}, "with at least one pixel"),
        ({"pictures": ["me.jpg"]}, "got str"),
        ({"pictures": []}, "at least one picture, got none"),
        ({"pictures": [PICTURE, PICTURE.numpy()]}, "on one device, picture 1"),
        ({"matrices": np.zeros((3, 3))}, r"matrices must be floats \[F, 2, 3\] or \[2, 3\], got \[1, 3, 3\]"),
        ({"matrices": np.zeros((2, 3))}, "matrix 0 has no usable scale"),
        ({"matrices": np.stack([MATRIX, MATRIX * np.nan])}, "matrix 1 has no usable scale"),
        ({"matrices": [[[1.0, 1, 0], [1, 1, 0]]]}, "or no inverse"),
        ({"pictures": [PICTURE] * 3, "matrices": [MATRIX] * 2}, "2 faces in 3 pictures need picture_of"),
        ({"picture_of": [0, 0]}, r"must be 1 whole numbers, got \[2\]"),
        ({"picture_of": [0.5]}, "whole numbers"),
        ({"picture_of": [1]}, r"must be in 0\.\.0, got \[1\]"),
        ({"picture_of": [-1]}, r"must be in 0\.\.0"),
        ({"size": 0}, "size must be whole pixels, at least 1"),
        ({"size": (4, 5, 6)}, r"got \(4, 5, 6\)"),
        ({"resample": "lanczos"}, "resample must be one of bilinear, bicubic, got 'lanczos'"),
        ({"dtype": torch.float64}, "dtype must be uint8, float32, bfloat16 or float16"),
        ({"layout": "chw"}, "layout must be one of nchw, nhwc"),
        ({"mean": 1.0}, "uint8 chips hold grey levels"),
        ({"dtype": torch.float32, "std": (1, 0, 1)}, "std not 0"),
        ({"dtype": torch.float32, "mean": (1, 2)}, "mean must be a finite number or three"),
        ({"fill": (0, 0, 256)}, r"fill must be 0\.\.255"),
        ({"fill": (0, 0, np.nan)}, "finite"),
        ({"out": torch.zeros(1, 3, 4, 5, dtype=torch.uint8)}, r"out must be \[1, 3, 4, 4\] torch.uint8"),
        ({"backend": "sdpa"}, "backend must be one of cuda, cpu, reference or None"),
    ],
)
def test_bad_input(change, text):
    given = {"pictures": PICTURE, "matrices": MATRIX, "size": 4} | change
    with pytest.raises(InputError, match=text):
        align_face(given.pop("pictures"), given.pop("matrices"), given.pop("size"), **given)


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(NoBackendError, match=r"backend 'cuda' cannot run this call: device=cpu \(runs on cuda\)"):
        align_face(PICTURE, MATRIX, 4, backend="cuda")
