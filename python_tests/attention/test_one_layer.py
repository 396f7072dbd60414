"""One attention layer, and all that diffusers' Attention may ask of its processor."""

import pytest
import torch
from diffusers.models import attention_processor as ap
from naive_attention import NaiveProcessor, close, one_thread  # noqa: F401
from torch import nn

from idcore.attach import attach
from idcore.attention.processors import IdAttnProcessor
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions, Site

MERGES = [AttentionOptions("add", 0), AttentionOptions("ortho", 4), AttentionOptions("ortho_v2", 8, 5)]


class OneLayer(nn.Module):
    """A model of one attention layer."""

    def __init__(self, **config):
        super().__init__()
        torch.manual_seed(3)
        config = {"query_dim": 32, "cross_attention_dim": 24, "heads": 4, "dim_head": 8} | config
        self.attn = ap.Attention(**config).eval().requires_grad_(False)

    def forward(self, sample, **kwargs):
        return self.attn(sample, **kwargs)


class OneSystem:
    """Fixed keys and values for `OneLayer`."""

    name = "one"

    def __init__(self, options=MERGES[2]):
        self.options = options

    def sites(self, unet):
        return [Site("attn.processor", 0, 32, 4, 8)]

    def project(self, site, tokens):
        k, v = torch.linspace(-1, 1, 5 * 32), torch.linspace(1, 0, 5 * 32)
        return tokens @ k.reshape(5, 32), tokens @ v.reshape(5, 32)


def person(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Identity(torch.randn(1, 3, 5, generator=g), None, "one")


TEXT = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(2))
FLAT = IMAGE.flatten(2).transpose(1, 2)

LAYERS = {
    "plain": ({}, FLAT, TEXT),
    "norm_cross": ({"cross_attention_norm": "layer_norm"}, FLAT, TEXT),
    "norm_cross_group": ({"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}, FLAT, TEXT),
    "group_norm_4d": ({"norm_num_groups": 8}, IMAGE, TEXT),
    "residual": ({"residual_connection": True, "rescale_output_factor": 1.7}, FLAT, TEXT),
    "residual_4d": ({"residual_connection": True, "rescale_output_factor": 0.5, "norm_num_groups": 4}, IMAGE, TEXT),
    "qk_norm": ({"qk_norm": "rms_norm"}, FLAT, TEXT),
    "bias": ({"bias": True, "upcast_attention": True, "upcast_softmax": True}, FLAT, TEXT),
    "no_text": ({"cross_attention_dim": None}, FLAT, None),
    "spatial_norm": ({"spatial_norm_dim": 6, "query_dim": 32}, IMAGE, TEXT),
}


@pytest.mark.parametrize("name", LAYERS)
def test_text_attention_alone_is_diffusers(name):
    config, states, text = LAYERS[name]
    model = OneLayer(**config)
    more = {"temb": torch.randn(2, 6, 4, 6)} if name == "spatial_norm" else {}
    plain = model(states, encoder_hidden_states=text, **more)
    system = OneSystem(AttentionOptions("add"))
    with attach(model, system, person(), id_scale=torch.tensor(0.0)):  # a tensor: no short cut at 0
        close(model(states, encoder_hidden_states=text, **more), plain, 1e-6)
    with attach(model, system, person(), id_scale=0.0):
        assert torch.equal(model(states, encoder_hidden_states=text, **more), plain)
    with attach(model, system, person()):
        moved = model(states, encoder_hidden_states=text, **more)
    assert moved.shape == plain.shape and not torch.allclose(moved, plain, atol=1e-2)


def test_text_mask():
    model = OneLayer()
    bias = torch.zeros(2, 1, 7)
    bias[0, :, 3:] = -10000.0
    plain = model(FLAT, encoder_hidden_states=TEXT, attention_mask=bias)
    with attach(model, OneSystem(), person(), id_scale=torch.tensor(0.0)):
        close(model(FLAT, encoder_hidden_states=TEXT, attention_mask=bias), plain, 1e-6)
    with attach(model, OneSystem(), person()):
        changed = TEXT.clone()
        changed[0, 3:] = 9.0
        one = model(FLAT, encoder_hidden_states=TEXT, attention_mask=bias)
        assert torch.allclose(one, model(FLAT, encoder_hidden_states=changed, attention_mask=bias), atol=1e-6)


def test_dropout_of_the_output_is_kept():
    model = OneLayer(dropout=0.5).train()
    with attach(model, OneSystem(), person()):
        torch.manual_seed(0)
        assert not torch.equal(model(FLAT, encoder_hidden_states=TEXT), model(FLAT, encoder_hidden_states=TEXT))


def test_masks_in_a_4d_layer_need_no_unet():
    model = OneLayer()
    mask = torch.zeros(4, 6)
    mask[:, :2] = 1
    plain = model(IMAGE, encoder_hidden_states=TEXT)
    with attach(model, OneSystem(AttentionOptions("add")), person(), id_mask=mask):
        moved = model.attn(IMAGE, encoder_hidden_states=TEXT)
        with pytest.raises(InputError, match="the layer was called outside of its UNet"):
            model.attn(FLAT, encoder_hidden_states=TEXT)
    assert torch.equal(moved[..., 2:], plain[..., 2:]) or torch.allclose(moved[..., 2:], plain[..., 2:], atol=1e-6)
    assert (moved - plain)[..., :2].abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("processor", [ap.AttnProcessor(), ap.SlicedAttnProcessor(2)])
def test_older_text_processors_are_replaced(processor):
    model = OneLayer()
    with attach(model, OneSystem(), person()):
        truth = model(FLAT, encoder_hidden_states=TEXT)
    model.attn.set_processor(processor)
    with attach(model, OneSystem(), person()) as handle:
        close(model(FLAT, encoder_hidden_states=TEXT), truth, 1e-6)
        assert f"over {type(processor).__name__} (replaced)" in handle.explain()
    assert model.attn.processor is processor


class Doubling:
    """A third party's processor: text attention times two."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        p = attn.get_attention_scores(q, k, attention_mask)
        return attn.to_out[0](attn.batch_to_head_dim(2 * p @ v))


@pytest.mark.parametrize("options", MERGES, ids=lambda o: o.merge)
def test_an_unknown_processor_keeps_its_result(options):
    model = OneLayer(bias=True)
    plain = model(FLAT, encoder_hidden_states=TEXT)
    with attach(model, OneSystem(options), person()):
        added = model(FLAT, encoder_hidden_states=TEXT) - plain
    foreign = Doubling()
    model.attn.set_processor(foreign)
    alone = model(FLAT, encoder_hidden_states=TEXT)
    with attach(model, OneSystem(options), person()) as handle:
        close(model(FLAT, encoder_hidden_states=TEXT), alone + added, 1e-5)
        assert "over Doubling (its result added to)" in handle.explain()
    assert model.attn.processor is foreign and not torch.allclose(alone, plain, atol=1e-2)


class Elsewhere:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states * 2


def test_processors_that_cannot_be_joined():
    model = OneLayer()
    model.attn.set_processor(Elsewhere())
    with attach(model, OneSystem(), person()):
        with pytest.raises(InputError, match="Elsewhere does not pass its result .* through attn.to_out"):
            model(FLAT, encoder_hidden_states=TEXT)
    custom = ap.CustomDiffusionAttnProcessor2_0(hidden_size=32, cross_attention_dim=24)
    model.attn.set_processor(custom)
    with pytest.raises(InputError, match="attn.processor holds CustomDiffusionAttnProcessor2_0"):
        attach(model, OneSystem(), person())
    assert model.attn.processor is custom and not model._forward_pre_hooks
    with pytest.raises(InputError, match="scale_qk=False"):
        attach(OneLayer(scale_qk=False), OneSystem(), person())


def test_without_arguments_it_is_plain_text_attention():
    model = OneLayer()
    plain = model(FLAT, encoder_hidden_states=TEXT)
    model.attn.set_processor(IdAttnProcessor())
    assert torch.equal(model(FLAT, encoder_hidden_states=TEXT), plain)


def test_arguments_are_named_so_that_diffusers_passes_them_on(caplog):
    model = OneLayer()
    with attach(model, OneSystem(), person()):
        model(FLAT, encoder_hidden_states=TEXT, ip_adapter_masks=None, temb=None)
    assert "will be ignored" not in caplog.text


def test_the_naive_processor_is_diffusers_without_people():
    model = OneLayer()
    plain = model(FLAT, encoder_hidden_states=TEXT)
    model.attn.set_processor(NaiveProcessor([], "add", 0, 5))
    close(model(FLAT, encoder_hidden_states=TEXT), plain, 1e-6)
