"""SDEdit on IDPipeline's components: equals diffusers' own img2img and leaves the pipeline as it was."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from idcore import IDPipeline
from idcore.errors import InputError
from idcore.sampling.stylise import stylise
from idcore.testing.tiny_models import TinySystem, tiny_pipeline


@pytest.fixture
def pipe():
    base = tiny_pipeline("sdxl")
    return IDPipeline(base, TinySystem(base.unet))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def test_it_is_diffusers_own_img2img_and_the_pipeline_stays(pipe, photo):
    def drawn():
        return np.asarray(pipe("a cat", generator=torch.Generator().manual_seed(1)).images[0])

    before = drawn()
    ours = stylise(pipe, photo, "a drawing", strength=0.5, guidance_scale=2.0, negative_prompt="bad", seed=3)
    parts = dict(pipe.pipe.components) | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    theirs = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)(
        "a drawing", image=photo, strength=0.5, guidance_scale=2.0, negative_prompt="bad", num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert ours.size == photo.size and np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.array_equal(drawn(), before)


def test_an_identity_acts_and_goes(pipe, photo):
    me = pipe.system.identity()
    plain = stylise(pipe, photo, "a drawing")
    with_me = stylise(pipe, photo, "a drawing", identity=me, id_scale=2.0)
    assert not np.array_equal(np.asarray(plain), np.asarray(with_me))
    off = stylise(pipe, photo, "a drawing", identity=me, id_scale=0.0)
    assert np.array_equal(np.asarray(off), np.asarray(plain))
    assert np.array_equal(np.asarray(stylise(pipe, photo, "a drawing")), np.asarray(plain))


def test_sides_become_multiples_of_eight(pipe):
    found = stylise(pipe, Image.new("RGB", (50, 30)), "x", long_side=25)
    assert found.size == (24, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": 0}, "strength is above 0 and at most 1, got 0"),
        ({"strength": 0.2}, "0.2 of 4 steps is less than one; give a larger strength, or at least 5 steps"),
        ({"long_side": 4}, "has a side of less than 8 pixels"),
    ],
)
def test_what_is_refused(pipe, photo, options, said):
    with pytest.raises(InputError, match=said):
        stylise(pipe, photo, "x", **options)


def test_pipelines_that_are_refused(pipe, photo):
    with pytest.raises(InputError, match="wanted an IDPipeline, got StableDiffusionXLPipeline; wrap it"):
        stylise(pipe.pipe, photo, "x")
    with pytest.raises(InputError, match="no system to use an identity with"):
        stylise(IDPipeline(pipe.pipe), photo, "x", identity=pipe.system.identity())
