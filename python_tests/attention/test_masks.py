import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from idcore.attention.masks import grid_of, read_masks, to_tokens
from idcore.errors import InputError

LEFT = np.zeros((16, 32), bool)
LEFT[:, :16] = True


@pytest.mark.parametrize(
    "mask",
    [LEFT, LEFT.astype(np.float32), LEFT.astype(np.uint8) * 255, Image.fromarray(LEFT), torch.from_numpy(LEFT)[None]],
)
def test_forms_of_one_mask(mask):
    (read,) = read_masks(mask, 1)
    assert read.shape == (1, 16, 32) and read.dtype == torch.float32
    assert torch.equal(read[0], torch.from_numpy(LEFT).float())


def test_forms_of_several_masks():
    right = ~LEFT
    images = [Image.fromarray(LEFT), Image.fromarray(right)]
    processed = IPAdapterMaskProcessor().preprocess(images, height=16, width=32)
    diffusers_list = [processed.reshape(1, 2, 16, 32)]
    for form in ([LEFT, right], np.stack([LEFT, right]), processed, diffusers_list):
        one, two = read_masks(form, 2)
        assert torch.equal(one[0].bool(), torch.from_numpy(LEFT))
        assert torch.equal(two[0].bool(), torch.from_numpy(right))
    assert read_masks([None, right], 2)[0] is None
    assert read_masks(None, 3) == (None, None, None)
    assert read_masks(torch.ones(4, 8, 8), 1)[0].shape == (4, 8, 8)  # one mask per image


@pytest.mark.parametrize(("height", "width"), [(32, 128), (128, 32), (96, 72), (1, 1), (33, 65), (7, 5)])
def test_token_grids_keep_the_shape_of_the_latent(height, width):
    h, w = height, width
    for _ in range(4):
        assert grid_of(h * w, height, width) == (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2


def test_a_square_root_would_guess_wrong():
    assert grid_of(64, 4, 16) == (4, 16)
    assert grid_of(64, 32, 8) == (16, 4)


def test_no_such_grid():
    with pytest.raises(InputError, match="10 image tokens, which no halving of the latent 8x8"):
        grid_of(10, 8, 8)


def test_resizing_is_the_mean_of_each_cell():
    mask = torch.rand(2, 12, 20)
    tokens = to_tokens(mask, (3, 5))
    assert torch.allclose(tokens, mask.unflatten(1, (3, 4)).unflatten(3, (5, 4)).mean((2, 4)).flatten(1))
    (left,) = read_masks(LEFT, 1)
    small = to_tokens(left, (4, 4)).reshape(4, 4)
    assert torch.equal(small, torch.tensor([[1.0, 1, 0, 0]] * 4))


@pytest.mark.parametrize(
    ("mask", "count", "text"),
    [
        ([LEFT], 3, "3 identities need"),
        ([LEFT, LEFT], 1, "1 identities need 1 masks"),
        (LEFT, 2, r"2 identities need \[2, H, W\]"),
        (np.full((4, 4), 2.0), 1, r"must lie in 0..1 .*got 2..2"),
        (np.full((4, 4), np.nan), 1, "must lie in 0..1"),
        (np.ones((4, 4), np.int64), 1, "got torch.int64"),
        ("left.png", 1, "'left.png' is no area; words are all, left, right"),
        ("left, right", 3, "3 identities need 3 masks"),
        (object(), 1, "wanted a PIL image, an array or a tensor|got torch"),
        (np.ones(4), 1, r"must be \[H, W\] or \[images, H, W\], got \[4\]"),
        (np.ones((0, 4)), 1, r"got \[1, 0, 4\]"),
    ],
)
def test_wrong_masks(mask, count, text):
    with pytest.raises(InputError, match=text):
        read_masks(mask, count)
