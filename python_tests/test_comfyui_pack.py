"""examples/comfyui against stubs of ComfyUI's published interface: import, schemas, diffusers' numbers."""

import asyncio
import copy
import importlib
import inspect
import sys
from pathlib import Path

import comfy_stubs
import numpy as np
import pytest
import torch
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.attention.original_unet import LayerPatch, original_sites
from idcore.attention.sites import find_sites
from idcore.bench.unets import sdxl_shapes
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.systems.layers import SD15_LAYERS, SDXL_LAYERS
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

EXAMPLES = Path(__file__).parent.parent / "examples"
V2 = AttentionOptions("ortho_v2", 4, 3)

PACK = ("comfyui", "comfyui.common", "comfyui.adapters", "comfyui.nodes")


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    for name in ("models/idcore", "output"):
        (tmp_path / name).mkdir(parents=True)
    comfy_stubs.install(monkeypatch, tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in PACK:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("comfyui.nodes")
    for name in PACK:
        sys.modules.pop(name, None)


@pytest.fixture
def host():
    return comfy_stubs.Host(tiny_unet("sdxl"))


def apply(nodes, model, system, person, weight=0.8, start_at=0.0, end_at=1.0, mask=None):
    return nodes.ApplyIdentity.execute(model, system, person, weight, start_at, end_at, mask).result[0]


def in_diffusers(unet, inputs, system, people, **how):
    with torch.no_grad(), idcore.attach(unet, system, people, **how):
        return unet(**inputs).sample


def close(a, b):
    return (a - b).abs().max() < 2e-5 * b.abs().max()


# -- the map of layers ------------------------------------------------------------------------------------------------


def test_sdxl_layers_and_their_indices():
    unet = sdxl_shapes()
    sites = original_sites(comfy_stubs.original_layout(unet))
    by_index = {s.index: s for s in find_sites(unet)}
    assert sorted((s.index, s.hidden) for s in sites.values()) == sorted(SDXL_LAYERS) and len(sites) == 70
    for place, site in sites.items():
        theirs = by_index[site.index]
        assert tuple(place) == comfy_stubs.place_of(unet, theirs.path)
        assert (site.hidden, site.heads, site.head_dim) == (theirs.hidden, theirs.heads, theirs.head_dim)
    numbers = {("input", 4, 0): 1, ("input", 5, 1): 7, ("input", 8, 9): 47, ("output", 0, 0): 49}
    numbers |= {("output", 5, 1): 119, ("middle", 0, 0): 121, ("middle", 0, 9): 139}
    assert {place: sites[place].index for place in numbers} == numbers


def test_sd15_layers():
    blocks = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        unet = tiny_unet("sd", down_block_types=down, up_block_types=up, norm_num_groups=32, **blocks)
    sites = original_sites(comfy_stubs.original_layout(unet))
    assert sorted((s.index, s.hidden) for s in sites.values()) == sorted(SD15_LAYERS)
    assert ("input", 1, 0) in sites and ("output", 11, 0) in sites and sites["middle", 0, 0].index == 31


def test_other_models_are_refused(nodes):
    with pytest.raises(InputError, match="wanted a UNet with input_blocks.*do not fit other kinds"):
        original_sites(torch.nn.Linear(1, 1))
    empty = comfy_stubs.SimpleNamespace(input_blocks=[], middle_block=[], output_blocks=[])
    with pytest.raises(InputError, match="no cross-attention"):
        original_sites(empty)
    host = comfy_stubs.Host(tiny_unet("sd"))
    small = EncoderConfig(id_dim=8, vit_dim=8, width=8, output_dim=8)
    pulid = PuLID(PuLIDConfig.for_unet(tiny_unet("sdxl"), small))
    me = Identity(torch.randn(1, 5, 8), None, "pulid-v1")
    with pytest.raises(InputError, match="weights are for a UNet with .* cross-attention layers"):
        apply(nodes, host.patcher, pulid, me)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [AttentionOptions(), AttentionOptions("ortho", 3), V2], ids=lambda o: o.merge)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_equal_to_diffusers_on_the_same_weights(nodes, kind, options):
    host, inputs = comfy_stubs.Host(tiny_unet(kind)), tiny_inputs(kind, batch=4)
    system = TinySystem(host.unet, options=options)
    person = system.identity()
    model = apply(nodes, host.patcher, system, person)
    truth = in_diffusers(host.unet, inputs, system, person, id_scale=0.8, cfg=True)
    plain = host.run(host.patcher, inputs, (1, 0))
    assert close(host.run(model, inputs, (1, 0)), truth)
    assert (truth - plain).abs().max() > 1e-2 * plain.abs().max()


def test_a_layer_equals_the_op(nodes, host):
    system = TinySystem(host.unet, options=V2)
    person = system.identity(uncond=False)
    patches = apply(nodes, host.patcher, system, person).model_options["transformer_options"]["patches_replace"][
        "attn2"
    ]
    sites = original_sites(host.patcher.model.diffusion_model)
    place, site = next((p, s) for p, s in sites.items() if p.side == "output" and p.index == 1)
    q, k, v = (torch.randn(2, n, site.hidden) for n in (16, 7, 7))
    made = patches[place](q, k, v, {"n_heads": site.heads, "cond_or_uncond": [0]})
    heads = [t.unflatten(-1, (site.heads, -1)).transpose(1, 2) for t in (q, k, v, *system.project(site, person.tokens))]
    truth = idcore.id_attention(*heads, id_scale=0.8, merge="ortho_v2", num_zero=4, num_global=3)
    assert close(made, truth.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("parts, cfg", [((0,), False), ((1, 0), True), ((0, 1), ("cond", "uncond")),
                                        ((0, 0, 1), ("cond", "cond", "uncond"))])  # fmt: skip
@pytest.mark.parametrize("uncond", [True, False])
def test_parts_of_the_batch(nodes, host, parts, cfg, uncond):
    system, inputs = TinySystem(host.unet, options=V2), tiny_inputs("sdxl", batch=2 * len(parts))
    person = system.identity(uncond=uncond)
    model = apply(nodes, host.patcher, system, person)
    assert close(host.run(model, inputs, parts), in_diffusers(host.unet, inputs, system, person, id_scale=0.8, cfg=cfg))


def test_several_people_with_masks_in_a_row(nodes, host):
    system, inputs = TinySystem(host.unet, options=V2), tiny_inputs("sdxl", batch=2, height=8, width=12)
    me, you = system.identity(0), system.identity(1, length=3)
    left = torch.zeros(1, 16, 24)
    left[..., :12] = 1
    model = apply(nodes, host.patcher, system, me, 0.9, mask=left)
    model = apply(nodes, model, system, you, 0.5, mask=1 - left)
    how = dict(id_scale=[0.9, 0.5], id_mask=[left[0], 1 - left[0]], cfg=True)
    assert close(host.run(model, inputs, (1, 0)), in_diffusers(host.unet, inputs, system, [me, you], **how))
    style = TinySystem(host.unet, seed=3, options=AttentionOptions("add"), name="other")
    third = style.identity(2)
    both = apply(nodes, model, style, third, 0.4)
    with idcore.attach(host.unet, style, third, id_scale=0.4, cfg=True):
        truth = in_diffusers(host.unet, inputs, system, [me, you], **how)
    assert close(host.run(both, inputs, (1, 0)), truth)


def test_start_and_end_by_noise_level(nodes, host):
    system, inputs = TinySystem(host.unet), tiny_inputs("sdxl")
    model = apply(nodes, host.patcher, system, system.identity(), start_at=0.25, end_at=0.75)
    high, low = (comfy_stubs.Sampling().percent_to_sigma(p) for p in (0.25, 0.75))
    plain, act = host.run(host.patcher, inputs, (0,)), host.run(model, inputs, (0,), sigma=high)
    for sigma, acts in [(high + 0.1, False), (high, True), ((high + low) / 2, True), (low, True), (low - 0.1, False)]:
        made = host.run(model, inputs, (0,), sigma=sigma)
        assert torch.equal(made, act) if acts else close(made, plain)
    assert not torch.allclose(act, plain, atol=1e-3)
    for start, end in [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0)]:
        with pytest.raises(InputError, match="must be 0 <= start_at < end_at <= 1"):
            apply(nodes, host.patcher, system, system.identity(), start_at=start, end_at=end)


def test_beside_another_packs_replacement(nodes, host):
    """What stood there is kept, for one transformer or a whole block; identities add to it; unloading gives it back."""
    system, inputs = TinySystem(host.unet), tiny_inputs("sdxl")

    def theirs(q, k, v, options):
        return 0.5 * comfy_stubs.optimized_attention(q, k, v, options["n_heads"])

    model = host.patcher.clone()
    places = list(original_sites(model.model.diffusion_model))
    model.set_model_attn2_replace(theirs, *places[0])
    model.set_model_attn2_replace(theirs, *places[-1][:2])
    before, alone = dict(nodes._replaced(model)), host.run(model, inputs, (0,))
    ours = apply(nodes, model, system, system.identity(), 0.8)
    silent = apply(nodes, model, system, system.identity(), 0.0)
    assert torch.equal(host.run(silent, inputs, (0,)), alone)
    assert not torch.allclose(host.run(ours, inputs, (0,)), alone, atol=1e-3)
    q, k, v = (torch.randn(1, n, 64) for n in (16, 7, 7))
    site = original_sites(model.model.diffusion_model)[places[0]]
    options = {"n_heads": site.heads, "cond_or_uncond": [0]}
    only = nodes._replaced(apply(nodes, host.patcher, system, system.identity(), 0.8))[places[0]]
    wanted = theirs(q, k, v, options) + only(q, k, v, options) - comfy_stubs.optimized_attention(q, k, v, site.heads)
    assert close(nodes._replaced(ours)[places[0]](q, k, v, options), wanted)
    assert nodes._replaced(nodes.RemoveIdentities.execute(ours).result[0]) == before


def test_unloading_leaves_no_trace(nodes, host):
    system, inputs = TinySystem(host.unet), tiny_inputs("sdxl")
    before, plain = copy.deepcopy(host.patcher.model_options), host.run(host.patcher, inputs, (0,))
    model = apply(nodes, apply(nodes, host.patcher, system, system.identity(0)), system, system.identity(1))
    assert host.patcher.model_options == before  # the model that came in is as it was
    host.run(model, inputs, (0,))
    patch = next(iter(nodes._replaced(model).values()))
    assert all(len(a.conditioning.bank) for a in patch.applied) and len(patch.applied) == 2
    off = nodes.RemoveIdentities.execute(model).result[0]
    assert off.model_options == before and torch.equal(host.run(off, inputs, (0,)), plain)
    assert not any(len(a.conditioning.bank) for a in patch.applied)
    assert nodes.RemoveIdentities.execute(host.patcher).result[0].model_options == before


def test_copies_share_and_moves_forget(nodes, host):
    system = TinySystem(host.unet)
    model = apply(nodes, host.patcher, system, system.identity())
    patch = next(iter(nodes._replaced(model).values()))
    assert copy.deepcopy(patch) is patch and isinstance(patch, LayerPatch)
    host.run(model, tiny_inputs("sdxl"), (0,))
    assert len(patch.applied[0].conditioning.bank)
    assert patch.to(torch.float16) is patch and len(patch.applied[0].conditioning.bank)
    patch.to(torch.device("cpu"))
    assert not len(patch.applied[0].conditioning.bank)


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_entrypoint_and_schemas(nodes):
    extension = asyncio.run(sys.modules["comfyui"].comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    assert len(found) == 9
    schemas = [node.define_schema() for node in found]
    assert len({s.node_id for s in schemas}) == 9
    for node, schema in zip(found, schemas):
        takes = inspect.signature(node.execute).parameters
        assert set(takes) == {i.id for i in schema.inputs}
        for i in schema.inputs:
            assert (takes[i.id].default is inspect.Parameter.empty) == (not i.settings.get("optional", False))


def test_identities_through_files_and_photos(nodes, tmp_path):
    me = Identity(torch.randn(1, 5, 8), None, "pulid-v1")
    nodes.SaveIdentity.execute(me, "me")
    nodes.SaveIdentity.execute(me, "me")
    assert sorted(p.name for p in (tmp_path / "output").iterdir()) == ["me_00001.safetensors", "me_00002.safetensors"]
    for name in ("../me", "", "a/b", "x" * 90, ".hidden"):
        with pytest.raises(InputError, match="no path"):
            nodes.SaveIdentity.execute(me, name)
    me.save(tmp_path / "models" / "idcore" / "me.safetensors")
    assert torch.equal(nodes.LoadIdentity.execute("me.safetensors").result[0].tokens, me.tokens)
    with pytest.raises(InputError, match="no identity was chosen"):
        nodes.LoadIdentity.execute("none")
    with pytest.raises(InputError, match="no file gone.safetensors .* any more"):
        nodes.LoadIdentity.execute("gone.safetensors")
    from idcore.demo import PHOTO

    tiny = idcore.TinyPipeline.from_package()
    photo = idcore.load_image(PHOTO)
    image = torch.from_numpy(np.array(photo))[None].float() / 255
    encoded = nodes.EncodeIdentity.execute(tiny, image).result[0]
    assert torch.equal(encoded.tokens, tiny.encode(photo).tokens)
    with pytest.raises(InputError, match="No face was found"):
        nodes.EncodeIdentity.execute(tiny, torch.zeros(1, 64, 64, 3))


def test_loading_a_system(nodes, tmp_path):
    small = EncoderConfig(id_dim=8, vit_dim=8, width=8, output_dim=8)
    config = PuLIDConfig.for_unet(tiny_unet("sdxl"), small)
    PuLID(config).save(tmp_path / "models" / "idcore" / "pulid.safetensors")
    loaded = nodes.LoadSystem.execute(nodes.FILE, False, weights="pulid.safetensors").result[0]
    assert loaded.name == "pulid-v1"
    with pytest.raises(WeightsError, match="EVA02-CLIP"):
        nodes.LoadSystem.execute(nodes.FILE, True, weights="pulid.safetensors")
    with pytest.raises(WeightsError, match="needs its adapter weights"):
        nodes.LoadSystem.execute(nodes.FILE, False)
