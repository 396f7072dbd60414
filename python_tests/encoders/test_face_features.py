"""Photos to embeddings and image tokens for the IP-Adapter family."""

import numpy as np
import pytest
import torch
from PIL import Image

from idcore.encoders.align import align
from idcore.encoders.face import Chooses, Face
from idcore.encoders.face_features import FacePreprocess
from idcore.errors import InputError, NoFaceError

POINTS = np.array([[30, 40], [62, 41], [46, 60], [33, 76], [60, 75]], np.float32)


class Analyzer(Chooses):
    """One face at a fixed place; the embedding tells the photo's brightness."""

    name = "fake"

    def __init__(self, size=6, faces=1):
        self.size, self.faces = size, faces

    def detect(self, image):
        return [Face(np.array([20, 20, 70, 90], np.float32), 0.9, POINTS, image.size)] * self.faces

    def embed(self, image, face):
        return np.full(self.size, 1 + np.asarray(image).mean(), np.float32)


def photo(value):
    picture = np.full((96, 96, 3), value, np.uint8)
    picture[30:60, 30:60] = 255 - value
    return Image.fromarray(picture)


@pytest.fixture(scope="module")
def tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


def test_embeddings_raw_and_of_length_one():
    raw = FacePreprocess(Analyzer(), normalise=False, id_dim=6)([photo(10), photo(200)])
    unit = FacePreprocess(Analyzer(), normalise=True, id_dim=6)(photo(10))
    assert raw.embeds.shape == (1, 2, 6) and raw.n == 2 and raw.clip is None
    assert raw.embeds[0, 1, 0] > raw.embeds[0, 0, 0] > 1
    torch.testing.assert_close(unit.embeds.norm(dim=-1), torch.ones(1, 1))
    assert unit.meta == {"face_analyzer": "fake", "policy": "largest"}


def test_image_tokens_are_those_before_the_last_layer_of_the_aligned_face(tower):
    picture = photo(60)
    got = FacePreprocess(Analyzer(), normalise=True, tower=tower, id_dim=6)([picture])
    chip = torch.from_numpy(align(picture, POINTS, "arcface", 28, plain=True)).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (chip - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    want = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert got.clip.shape == (1, 1, 17, 16)
    torch.testing.assert_close(got.clip[0], want)
    blank = tower(torch.zeros_like(pixels), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(got.uncond_clip[0], blank)


def test_refusals():
    with pytest.raises(InputError, match="at least one photo"):
        FacePreprocess(Analyzer(), normalise=True)([])
    with pytest.raises(NoFaceError, match="no face in photo 1 .96x96."):
        FacePreprocess(Analyzer(faces=0), normalise=True)(photo(1))
    with pytest.raises(InputError, match="wanted a face embedding of 512 numbers, the analyzer gives 6"):
        FacePreprocess(Analyzer(), normalise=True)(photo(1))
