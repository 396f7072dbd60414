"""Texts for parts of a picture in rows of their own: against the passes one by one, on every base, beside people."""

import numpy as np
import pytest
import torch

import idcore
from idcore.attach import attach
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.sampling.stylise import redrawer
from idcore.systems.region_passes import attach_passes, grown
from idcore.systems.sefi_ide import SeFiIDE, SeFiTokens, class_word_embeddings
from idcore.systems.words import WordSystem
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_pipeline, tiny_unet

LEFT = torch.zeros(1, 8, 8)
LEFT[..., :4] = 1


def draws(pipe, prompt, steps=2, guidance=2.0, **more):
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        generator=torch.Generator().manual_seed(0), **more,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_predictions_are_joined_by_the_masks(kind, guidance):
    """Against the UNet run for each prompt alone, joined by hand at every step."""
    pipe = tiny_pipeline(kind)
    shape = {"height": 16, "width": 16}
    plain = draws(pipe, "a man", guidance=guidance, **shape)
    made = {}

    def passes(prompt):
        """What the UNet says at the first step."""
        handle = pipe.unet.register_forward_hook(lambda m, args, out: made.update({prompt: out[0]}))
        draws(pipe, prompt, steps=1, guidance=guidance, **shape)
        handle.remove()
        return made[prompt]

    man, garden, sea = passes("a man"), passes("a garden"), passes("a sea")
    top = LEFT.transpose(1, 2)
    with attach_passes(pipe, ["a garden", "a sea"], [LEFT, 0.5 * top]):
        both = passes("a man ")  # another key; the same tokens
        twice = draws(pipe, "a man", guidance=guidance, num_images_per_prompt=2, **shape)
    total = (LEFT + 0.5 * top).clamp(min=1)
    w = LEFT / total, 0.5 * top / total
    wanted = man * (1 - w[0] - w[1]) + garden * w[0] + sea * w[1]
    assert torch.allclose(both, wanted, atol=1e-5)
    assert not np.allclose(twice, plain, atol=1e-3)
    assert np.array_equal(draws(pipe, "a man", guidance=guidance, **shape), plain), "nothing stays"


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_text_everywhere_is_the_prompt(kind):
    pipe = tiny_pipeline(kind)
    for that in (pipe, idcore.IDPipeline(pipe)) if kind == "sdxl" else (pipe,):
        garden = draws(that, "a garden")
        with attach_passes(that, ["a garden"], None):
            assert np.abs(draws(that, "a man") - garden).max() < 1e-5
            assert np.abs(draws(that, ["a man"] * 2)[0] - draws(that, ["a man", "a dog"])[0]).max() < 1e-5
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    redraw = redrawer(pipe)
    how = {"image": torch.from_numpy(photo).permute(2, 0, 1)[None] / 255, "strength": 1.0}
    wanted = draws(redraw, "a garden", **how)
    with attach_passes(redraw, "a garden", None):
        made = draws(redraw, "a man", **how)
    assert np.abs(made - wanted).max() < 1e-5


def test_beside_people_of_every_system():
    pipe = tiny_pipeline("sd")
    system = TinySystem(pipe.unet)
    word = Identity(torch.ones(1, 1, 32), None, "dreamidentity", {"placeholder": "W*"})
    tokens = SeFiTokens(class_word_embeddings(pipe, "a"), 5)
    for p in tokens.parameters():
        torch.nn.init.normal_(p)
    with (
        attach(pipe, system, [system.identity(0), system.identity(1)], id_mask="left, right"),
        attach(pipe, WordSystem(), word),
        attach(pipe, SeFiIDE(), tokens.identity("a")),
    ):
        garden, person = draws(pipe, "a garden"), draws(pipe, "V* and W*")
        with attach_passes(pipe, ["a garden"], None):
            assert np.abs(draws(pipe, "V* and W*") - garden).max() < 1e-5
        with attach_passes(pipe, ["V* and W*".replace("V*", "W*")], torch.zeros(8, 8)):
            assert np.abs(draws(pipe, "V* and W*") - person).max() < 1e-5
        named = draws(pipe, "V*")
        for main in ("a garden", "V* and W*"):  # a person by stages in either text, or in both
            with attach_passes(pipe, ["V*"], None):
                assert np.abs(draws(pipe, main) - named).max() < 1e-5
    with attach_passes(pipe, ["a garden"], None), attach(pipe, WordSystem(), word):
        draws(pipe, "W*")


def test_the_layers_see_one_text_through_all_steps():
    pipe, seen = tiny_pipeline("sd"), []
    with attach_passes(pipe, ["a garden"], None):
        attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        hook = attn.register_forward_pre_hook(
            lambda m, args, kw: seen.append(kw["encoder_hidden_states"]), with_kwargs=True
        )
        draws(pipe, "a man", steps=3)
        hook.remove()
    assert len(seen) == 3 and all(s is seen[0] for s in seen), "so that its keys are projected once"


def test_a_bare_unets_arguments_in_either_form():
    unet, given = tiny_unet("sd"), tiny_inputs("sd", batch=2)

    class Holder:
        def __init__(self, pipe):
            self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
            self.tokenizer, self.encode_prompt = pipe.tokenizer, pipe.encode_prompt

    holder = Holder(tiny_pipeline("sd", unet=unet))
    with attach_passes(holder, ["a garden"], LEFT, cfg=True) as handle:
        by_name = unet(**given).sample
        t, text = given["timestep"].repeat(2), given["encoder_hidden_states"]
        assert torch.equal(unet(given["sample"], t, text, return_dict=False)[0], by_name)
        with pytest.raises(InputError, match="got a batch of 1; give cfg="):
            unet(given["sample"][:1], 7, text[:1])
        with pytest.raises(InputError, match="has 20 tokens, another text 77; give texts of one length"):
            unet(given["sample"], 7, text[:, :20])
        handle.detach()
        handle.detach()
        assert not torch.equal(unet(**given).sample, by_name)


def test_errors_say_what_to_do():
    pipe = tiny_pipeline("sd")
    with pytest.raises(InputError, match="wanted at least one text, none of them empty"):
        attach_passes(pipe, [], None)
    with pytest.raises(InputError, match=r"wanted masks \[H, W\] that serve all pictures"):
        attach_passes(pipe, ["a"], torch.ones(2, 8, 8))
    with attach_passes(pipe, ["a"], None), pytest.raises(InputError, match="has some on it already"):
        attach_passes(pipe, ["b"], None)
    graph = idcore.IDPipeline(tiny_pipeline("sdxl"))
    graph.runner = "graph"
    with pytest.raises(InputError, match='use runner="eager"'):
        attach_passes(graph, ["a"], None)


def test_a_region_grows_at_soft_edges():
    """128 cells, margin 1/16: 1 up to 8 cells outside of the box, falling to 0 over the next 16."""
    mask = torch.zeros(1, 128, 128)
    mask[..., 64:] = 1
    row = grown(mask, 1 / 16)[0, 60]
    assert torch.all(row[64 - 8 :] > 0.99) and torch.all(row[: 64 - 24] == 0)
    edge = row[64 - 24 : 64 - 8]
    assert torch.all(edge.diff() > 0) and 0.4 < edge[8] < 0.6
    assert torch.equal(grown(mask, 0.0), mask) and grown(torch.ones(1, 512, 256), 0.1).min() > 0.999
    with pytest.raises(InputError, match="wanted 0 to 0.25 of the longer side, got 0.5"):
        grown(mask, 0.5)
