"""SDEdit on every base's components: equals diffusers' own img2img and leaves the pipeline as it was."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from idcore import IDPipeline
from idcore.attach import attach
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.sampling.stylise import redrawer, stylise
from idcore.systems.sefi_ide import SeFiIDE, SeFiTokens, class_word_embeddings
from idcore.systems.words import WordSystem
from idcore.testing.tiny_models import TinySystem, tiny_pipeline

KINDS = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"}


def made(kind):
    """What draws, and diffusers' own pipeline inside of it."""
    base = tiny_pipeline(kind)
    return (IDPipeline(base, TinySystem(base.unet)) if kind == "sdxl" else base), base


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_own_img2img_and_the_pipeline_stays(kind, photo):
    pipe, base = made(kind)

    def drawn():
        return pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]

    before = drawn()
    ours = stylise(pipe, photo, "a drawing", strength=0.5, guidance_scale=2.0, negative_prompt="bad", seed=3)
    parts = dict(base.components) | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    more = {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False}
    theirs = getattr(diffusers, KINDS[kind])(**parts, **more)(
        "a drawing", image=photo, strength=0.5, guidance_scale=2.0, negative_prompt="bad", num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert ours.size == photo.size and same(ours, theirs)
    assert same(drawn(), before)
    assert same(stylise(redrawer(pipe), photo, "a drawing", strength=0.5, guidance_scale=2.0, negative_prompt="bad",
                        seed=3), theirs)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_acts_and_goes(kind, photo):
    pipe, base = made(kind)
    system = TinySystem(base.unet)
    me, how = system.identity(), {} if kind == "sdxl" else {"system": system}
    plain = stylise(pipe, photo, "a drawing", guidance_scale=2.0)
    with_me = stylise(pipe, photo, "a drawing", identity=me, id_scale=2.0, guidance_scale=2.0, **how)
    assert not same(plain, with_me)
    off = stylise(pipe, photo, "a drawing", identity=me, id_scale=0.0, guidance_scale=2.0, **how)
    assert same(off, plain)
    assert same(stylise(pipe, photo, "a drawing", guidance_scale=2.0), plain)
    redraw = redrawer(pipe)
    with attach(redraw, system, me, id_scale=2.0):
        assert same(stylise(redraw, photo, "a drawing", guidance_scale=2.0), with_me)


@pytest.mark.parametrize("kind", KINDS)
def test_people_in_the_prompt(kind, photo):
    pipe, base = made(kind)
    width = base.unet.config.cross_attention_dim
    word = Identity(torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)) * 3, None, "dreamidentity", {})
    tokens = SeFiTokens(class_word_embeddings(base, "a"), 5)
    for p in tokens.parameters():
        torch.nn.init.normal_(p)
    for name, person, system in (("S*", word, WordSystem()), ("V*", tokens.identity("a"), SeFiIDE())):
        plain = stylise(pipe, photo, f"a drawing of {name}")
        ours = stylise(pipe, photo, f"a drawing of {name}", identity=person)
        assert not same(ours, plain)
        redraw = redrawer(pipe)
        with attach(redraw, system, person):
            assert same(stylise(redraw, photo, f"a drawing of {name}"), ours)


def test_sides_become_multiples_of_eight():
    found = stylise(made("sd")[0], Image.new("RGB", (50, 30)), "x", long_side=25)
    assert found.size == (24, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": 0}, "strength is above 0 and at most 1, got 0"),
        ({"strength": 0.2}, "0.2 of 4 steps is less than one; give a larger strength, or at least 5 steps"),
        ({"long_side": 4}, "has a side of less than 8 pixels"),
    ],
)
def test_what_is_refused(photo, options, said):
    with pytest.raises(InputError, match=said):
        stylise(made("sd")[0], photo, "x", **options)


def test_pipelines_that_are_refused(photo):
    pipe, base = made("sdxl")
    with pytest.raises(InputError, match="wanted an IDPipeline, or diffusers' StableDiffusionPipeline or .* got str"):
        stylise("pipe", photo, "x")
    with pytest.raises(InputError, match="no system was given and identity 0 has 0 stored banks"):
        stylise(IDPipeline(base), photo, "x", identity=pipe.system.identity())
