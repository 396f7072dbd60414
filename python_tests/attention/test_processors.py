import pytest
import torch
from diffusers.models import attention_processor as ap
from naive_attention import NaiveProcessor, naive_unet, one_thread  # noqa: F401
from torch import nn

from idcore.attach import attach
from idcore.attention.masks import grid_of, to_tokens
from idcore.attention.processors import IdAttnProcessor
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions, Site
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

MERGES = [AttentionOptions("add", 0), AttentionOptions("ortho", 4), AttentionOptions("ortho_v2", 8, 5)]


def run(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample


def close(ours, truth, tolerance=2e-5):
    error = (ours - truth).abs().max().item() / truth.abs().max().item()
    assert error < tolerance, f"relative error {error:.2e}"


# -- against a naive computation of every layer ------------------------------------------------


@pytest.mark.parametrize("options", MERGES, ids=lambda o: o.merge)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_merge(kind, options):
    unet, inputs = tiny_unet(kind), tiny_inputs(kind, batch=2)
    system = TinySystem(unet, options=options)
    person = system.identity()
    plain = run(unet, inputs)
    truth = naive_unet(unet, system, inputs, [(person, 0.7)])
    with attach(unet, system, person, id_scale=0.7):
        ours = run(unet, inputs)
    close(ours, truth)
    assert (truth - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.parametrize("options", MERGES, ids=lambda o: o.merge)
def test_two_people_with_masks_and_scales_per_layer(options):
    unet, inputs = tiny_unet("sdxl"), tiny_inputs("sdxl", batch=2, height=8, width=12)
    system = TinySystem(unet, options=options)
    people = [system.identity(1), system.identity(2, length=3)]
    left = torch.zeros(16, 24)
    left[:, :12] = 1
    mask = [left, 1 - left]
    per_layer = {"down": 0.5, "up": {"block_0": [0.0, 1.0, 0.3]}, "mid": 0.9}
    values = {"down_blocks": 0.5, "up_blocks.0.attentions.0": 0.0, "up_blocks.0.attentions.1": 1.0, "mid_block": 0.9}
    values["up_blocks.0.attentions.2"] = 0.3

    def tokens_mask(j, site):
        return to_tokens(mask[j][None], (4, 6)).expand(2, -1)

    scales = {s.name: next(v for k, v in values.items() if s.name.startswith(k)) for s in system.sites(unet)}
    truth = naive_unet(unet, system, inputs, [(people[0], 0.8), (people[1], scales)], masks=tokens_mask)
    with attach(unet, system, people, id_scale=[0.8, per_layer], id_mask=mask) as handle:
        close(run(unet, inputs), truth)
        handle.scale(torch.tensor([0.8, 0.5]))
        tensor = run(unet, inputs)
        handle.scale([0.8, 0.5])
        close(run(unet, inputs), tensor)


@pytest.mark.parametrize(("rows", "batch"), [(1, 2), (1, 6), (3, 6), (2, 8)])
def test_batches_of_guidance_halves(rows, batch):
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=batch)
    system = TinySystem(unet, options=MERGES[2])
    person = system.identity(rows=rows)
    truth = naive_unet(unet, system, inputs, [(person, 1.0)], rows=("uncond", "cond"))
    with attach(unet, system, person, cfg=True):
        close(run(unet, inputs), truth)


def test_one_mask_per_image_in_both_halves():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=4)
    system = TinySystem(unet, options=MERGES[1])
    person = system.identity()
    mask = torch.rand(2, 4, 4)

    def tokens_mask(j, site):
        side = 8 if unet.get_submodule(site.path).to_q.in_features == 32 else 4
        return to_tokens(mask, (side, side)).repeat(2, 1)

    truth = naive_unet(unet, system, inputs, [(person, 1.0)], rows=("uncond", "cond"), masks=tokens_mask)
    with attach(unet, system, person, cfg=True, id_mask=mask):
        close(run(unet, inputs), truth)


@pytest.mark.parametrize("rows", [1, 2])
def test_without_uncond_tokens_the_uncond_half_stays_untouched(rows):
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=4)
    system = TinySystem(unet)
    full = system.identity(rows=rows)
    bare = Identity(full.tokens, None, full.system)
    plain = run(unet, inputs)
    with attach(unet, system, [full, bare], cfg=True, id_scale=[0.0, 1.0]):
        half = run(unet, inputs)
    with attach(unet, system, bare, cfg=False) as handle:
        cond = {k: v[2:] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in inputs.items()}
        close(half[2:], run(unet, cond))
        assert "cond only" in handle.explain()
    close(half[:2], plain[:2], 1e-6)


def test_other_orders_of_the_batch():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=6)
    system = TinySystem(unet)
    person = system.identity(rows=2)
    order = ("cond", "uncond", "uncond")
    truth = naive_unet(unet, system, inputs, [(person, 1.0)], rows=order)
    with attach(unet, system, person, cfg=order):
        close(run(unet, inputs), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet, options=MERGES[2])
    person = system.identity()
    with attach(unet, system, person, id_scale=4.0):
        wide = run(unet, inputs)
    unet.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain = run(unet, inputs)
    with attach(unet, system, person, id_scale=4.0):
        narrow = run(unet, inputs)
    assert narrow.dtype == dtype
    effect = (narrow - plain).abs().max().item()
    assert effect > 0.1 * plain.abs().max() and (narrow.float() - wide).abs().max() < 0.1 * effect


def test_autocast_and_back():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet)
    with attach(unet, system, system.identity()):
        wide = run(unet, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            close(run(unet, inputs).float(), wide, 0.05)
        assert torch.equal(run(unet, inputs), wide)


# -- one layer, all that diffusers' Attention may ask for ---------------------------------------


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


def test_fused_projections():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet, options=MERGES[1])
    truth = naive_unet(unet, system, inputs, [(system.identity(), 1.0)])
    before = unet.attn_processors
    with attach(unet, system, system.identity()):
        unet.fuse_qkv_projections()
        close(run(unet, inputs), truth)
        unet.unfuse_qkv_projections()
        close(run(unet, inputs), truth)
    assert all(unet.attn_processors[k] is before[k] for k in before)
    unet.fuse_qkv_projections()
    with attach(unet, system, system.identity()) as handle:
        close(run(unet, inputs), truth)
        assert "over FusedAttnProcessor2_0 (replaced)" in handle.explain()
    unet.unfuse_qkv_projections()
    assert all(unet.attn_processors[k] is before[k] for k in before)


def test_outside_its_mask_an_identity_has_no_influence():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=1, height=4, width=16)
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 2, 5))
    person = system.identity(length=4)
    person.tokens.requires_grad_(True)
    mask = torch.zeros(4, 16)
    mask[:, 8:] = 1
    seen = {}
    layer = unet.get_submodule(system.sites(unet)[0].path)
    hook = layer.register_forward_hook(lambda m, i, o: seen.update(out=o))
    with attach(unet, system, person, id_mask=mask):
        unet(**inputs)
    hook.remove()
    out = seen["out"].reshape(4, 16, -1)
    assert grid_of(64, 4, 16) == (4, 16)
    (outside,) = torch.autograd.grad(out[:, :8].square().sum(), person.tokens, retain_graph=True)
    (inside,) = torch.autograd.grad(out[:, 8:].square().sum(), person.tokens)
    assert outside.abs().max() == 0 and inside.abs().max() > 0


def test_the_naive_processor_is_diffusers_without_people():
    model = OneLayer()
    plain = model(FLAT, encoder_hidden_states=TEXT)
    model.attn.set_processor(NaiveProcessor([], "add", 0, 5))
    close(model(FLAT, encoder_hidden_states=TEXT), plain, 1e-6)
