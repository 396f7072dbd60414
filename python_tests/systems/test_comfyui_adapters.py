"""examples/comfyui: the LoRA part of IP-Adapter-FaceID, and InstantID's ControlNet, against diffusers' numbers."""

import importlib
import sys
from pathlib import Path

import comfy_stubs
import face_adapter_naive as naive
import numpy as np
import pytest
import torch
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.encoders.face_features import FacePreprocess
from idcore.errors import InputError, NoFaceError
from idcore.identity import Identity
from idcore.systems.identity_net import COLOURS
from idcore.testing.tiny_models import tiny_inputs, tiny_unet

PACK = ("comfyui", "comfyui.common", "comfyui.adapters", "comfyui.nodes")


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    (tmp_path / "models" / "idcore").mkdir(parents=True)
    comfy_stubs.install(monkeypatch, tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    for name in PACK:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("comfyui.nodes")
    for name in PACK:
        sys.modules.pop(name, None)


def faceid(unet):
    width = unet.config.cross_attention_dim
    system = naive.make("faceid", unet, width=width)
    system.lora_tensors.update({f"ip_adapter.{k}": t for k, t in naive.lora_part(unet, width).items()})
    return system


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_faceid_with_its_lora_equals_diffusers(nodes, kind):
    host, inputs = comfy_stubs.Host(tiny_unet(kind)), tiny_inputs(kind, batch=2)
    system = faceid(host.unet)
    me = system.encode(torch.randn(naive.ID))
    plain = host.run(host.patcher, inputs, (1, 0))
    model = nodes.ApplyLora.execute(host.patcher, system, 0.7).result[0]
    model = nodes.ApplyIdentity.execute(model, system, me, 0.8, 0.0, 1.0).result[0]
    made = host.run(model, inputs, (1, 0))
    with torch.no_grad(), system.lora(host.unet, 0.7), idcore.attach(host.unet, system, me, id_scale=0.8, cfg=True):
        truth = host.unet(**inputs).sample
    assert (made - truth).abs().max() < 2e-5 * truth.abs().max()
    alone = nodes.ApplyIdentity.execute(host.patcher, system, me, 0.8, 0.0, 1.0).result[0]
    assert (host.run(alone, inputs, (1, 0)) - truth).abs().max() > 1e-2 * truth.abs().max()
    assert torch.equal(host.run(host.patcher, inputs, (1, 0)), plain)


def test_a_lora_that_is_not_there_or_of_another_model(nodes):
    host = comfy_stubs.Host(tiny_unet("sdxl"))
    with pytest.raises(InputError, match="faceid: these weights have no LoRA part.*Take this node out"):
        nodes.ApplyLora.execute(host.patcher, naive.make("faceid", host.unet), 1.0)
    wider = tiny_unet("sdxl", block_out_channels=(32, 128))
    with pytest.raises(InputError, match="does not fit this UNet .*attn1 has 64 channels.*use the base model"):
        nodes.ApplyLora.execute(host.patcher, faceid(wider), 1.0)
    shallow = comfy_stubs.Host(tiny_unet("sdxl", transformer_layers_per_block=1))
    with pytest.raises(InputError, match=r"does not fit this UNet \(the UNet has 12 layers"):
        nodes.ApplyLora.execute(shallow.patcher, faceid(host.unet), 1.0)


def test_controlnets_read_the_identity(nodes):
    me = Identity(torch.randn(1, 16, 8), torch.randn(1, 16, 8), "instantid")
    text = [[torch.randn(1, 77, 8), {"pooled_output": 1}], [torch.randn(1, 77, 8), {}]]
    positive, negative = nodes.IdentityToControlNet.execute(text, text[:1], me).result
    assert [c[1]["cross_attn_controlnet"] is me.tokens for c in positive] == [True, True]
    assert negative[0][1]["cross_attn_controlnet"] is me.uncond_tokens and positive[0][1]["pooled_output"] == 1
    assert positive[0][0] is text[0][0] and text[1][1] == {}  # what came in stays as it was
    without = Identity(me.tokens, None, "instantid")
    negative = nodes.IdentityToControlNet.execute(text, text, without).result[1]
    assert not negative[0][1]["cross_attn_controlnet"].any()
    with pytest.raises(InputError, match="made by the system 'faceid'"):
        nodes.IdentityToControlNet.execute(text, text, Identity(me.tokens, None, "faceid"))
    with pytest.raises(InputError, match="reads one person, this identity has 2 rows"):
        nodes.IdentityToControlNet.execute(text, text, Identity.batch([me, me]))


def test_the_picture_of_keypoints_fits_the_size(nodes):
    from idcore.demo import PHOTO
    from idcore.encoders.analyzer import EmbeddedAnalyzer

    system = naive.make("instantid", tiny_unet("sdxl"))
    photo = idcore.load_image(PHOTO)
    image = torch.from_numpy(np.array(photo))[None].float() / 255
    with pytest.raises(InputError, match='instantid: no face models are loaded; switch "for_photos" on'):
        nodes.Keypoints.execute(system, image, 64, 64)
    system.preprocess = FacePreprocess(EmbeddedAnalyzer(), normalise=False, id_dim=128)
    width, height = photo.width, photo.height // 2
    (picture,) = nodes.Keypoints.execute(system, image, width, height).result[0].numpy()
    points = system.preprocess.points(photo) * 0.5 + (photo.width / 4, 0)
    assert picture.shape == (height, width, 3)
    for (x, y), colour in zip(points.astype(int), COLOURS):
        assert np.array_equal((picture[y, x] * 255).round(), colour)
    with pytest.raises(NoFaceError, match="no face in photo 1"):
        nodes.Keypoints.execute(system, image * 0, 64, 64)
