import pytest
import torch
from attach_cases import run
from naive_attention import NaiveProcessor, close, naive_unet, one_thread  # noqa: F401

from idcore.attach import attach
from idcore.attention.masks import grid_of, to_tokens
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

MERGES = [AttentionOptions("add", 0), AttentionOptions("ortho", 4), AttentionOptions("ortho_v2", 8, 5)]


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
