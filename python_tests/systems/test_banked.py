"""Keys and values of all layers at once, and identities that carry them so that no adapter's weights are needed."""

import json

import pytest
import torch
from attach_cases import run
from pulid_tiny import features, tiny
from safetensors import safe_open

import idcore
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity, StoredBank
from idcore.ops.kv_bank import one_block
from idcore.systems.pulid import PuLID
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet
from idcore.weights import write_safetensors


@pytest.fixture(params=["sdxl", "sd"])
def case(request):
    unet = tiny_unet(request.param)
    return unet, tiny_inputs(request.param, batch=2), tiny("v1", unet)


def test_weights_stay_together_on_their_way(case, tmp_path):
    unet, _, system = case
    assert one_block(system._flat()) is None
    system.save(tmp_path / "p.safetensors")
    loaded = PuLID.from_weights(tmp_path / "p.safetensors")
    for moved in (loaded, loaded.half(), loaded.to(torch.float64), loaded.float(), loaded.requires_grad_(False)):
        assert one_block(moved._flat()) is not None
    parameters = dict(loaded.named_parameters())
    for name, p in system.state_dict().items():
        torch.testing.assert_close(parameters[name].detach(), p, rtol=1e-3, atol=1e-3)  # went through float16
    loaded.save(tmp_path / "again.safetensors")
    again = PuLID.from_weights(tmp_path / "again.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("cfg", [True, False])
def test_one_gemm_gives_the_picture_of_many(case, cfg, monkeypatch):
    unet, inputs, system = case
    me = system.encode(features())
    with idcore.attach(unet, system, me, id_scale=0.8, cfg=cfg):
        truth = run(unet, inputs)
    system.lay_out_weights()
    asked = []
    monkeypatch.setattr(type(system), "project", lambda *a: asked.append(a))
    with idcore.attach(unet, system, me, id_scale=0.8, cfg=cfg):
        ours = run(unet, inputs)
    assert not asked
    assert (ours - truth).abs().max() <= 2e-5 * truth.abs().max()
    assert (truth - run(unet, inputs)).abs().max() > 1e-3


def test_new_weights_and_gradients_are_seen(case):
    unet, inputs, system = case
    system.lay_out_weights()
    me = system.encode(features())
    with idcore.attach(unet, system, me, id_scale=0.8, cfg=True):
        before = run(unet, inputs)
        with torch.no_grad():
            system._flat()[1].mul_(-1)
        after = run(unet, inputs)
        assert (after - before).abs().max() > 1e-4
        system.requires_grad_(True)
        unet(**inputs).sample.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system._flat())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_saved_identity_needs_no_adapter(case, dtype, tmp_path):
    unet, inputs, system = case
    me = system.encode(features())
    with idcore.attach(unet, system, me, id_scale=0.8, cfg=True):
        truth = run(unet, inputs)
    me.with_bank(system, unet, dtype).save(tmp_path / "me.safetensors")
    again = Identity.load(tmp_path / "me.safetensors")
    assert len(again.banks) == 1 and again.banks[0].data.dtype == dtype and "1 banks" in repr(again)
    hidden = sum(h * d for _, h, d in again.banks[0].layers)
    length = me.tokens.shape[1]
    size = 2 * 2 * hidden * length * dtype.itemsize
    assert again.banks[0].data.numel() * dtype.itemsize == size
    assert size < (tmp_path / "me.safetensors").stat().st_size < size + 8 * me.tokens.numel() + 30_000
    with idcore.attach(unet, None, again, id_scale=0.8, cfg=True) as handle:
        ours = run(unet, inputs)
        assert "pulid" in repr(handle)
        other = system.encode(features(seed=5))
        handle.identity(other.with_bank(system, unet, dtype))
        assert (run(unet, inputs) - ours).abs().max() > 1e-4
        with pytest.raises(InputError, match="holds no keys and values for this UNet; make one with"):
            handle.identity(other)
    assert (ours - truth).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-3) * truth.abs().max()


def test_several_base_models_in_one_file(tmp_path):
    me, banks = None, []
    for kind in ("sdxl", "sd"):
        unet = tiny_unet(kind)
        system = tiny("v1", unet)
        me = system.encode(features()) if me is None else me
        me = me.with_bank(system, unet).with_bank(system, unet, torch.float32)
        banks.append((unet, tiny_inputs(kind, batch=2), me.banks[-1]))
    assert len(me.banks) == 2
    me.save(tmp_path / "me.safetensors")
    again = Identity.load(tmp_path / "me.safetensors")
    for (unet, inputs, bank), loaded in zip(banks, again.banks, strict=True):
        assert loaded.layers == bank.layers and torch.equal(loaded.data, bank.data)
        plain = run(unet, inputs)
        with idcore.attach(unet, None, again, cfg=True):
            assert (run(unet, inputs) - plain).abs().max() > 1e-4
    assert torch.equal(again.to("cpu").banks[0].data, again.banks[0].data)
    assert Identity.mix([again, again]).banks == () and Identity.batch([again, again]).banks == ()


def test_options_travel_with_the_bank():
    unet = tiny_unet("sdxl")
    style, fidelity = tiny("v1", unet, "style"), tiny("v1", unet)
    people = [s.encode(features()).with_bank(s, unet) for s in (style, fidelity)]
    with idcore.attach(unet, None, people[0], cfg=True) as handle:
        assert handle._conditioning.options == style.options
    with pytest.raises(InputError, match="banks want .*'ortho'.* and .*'ortho_v2'"):
        idcore.attach(unet, None, people)


def test_errors(case, tmp_path):
    unet, _, system = case
    me = system.encode(features())
    with pytest.raises(InputError, match="identity 0 has 0 stored banks, none for this UNet"):
        idcore.attach(unet, None, me)
    with pytest.raises(InputError, match="Identity objects with stored banks are needed"):
        idcore.attach(unet, None, "me.safetensors")
    with pytest.raises(InputError, match="dtype must be float16, bfloat16 or float32"):
        me.with_bank(system, unet, torch.float64)
    with pytest.raises(InputError, match="made by the system"):
        me.with_bank(TinySystem(unet), unet)
    with pytest.raises(InputError, match="beyond the range of torch.float16"):
        Identity(me.tokens * 1e6, me.uncond_tokens, me.system).with_bank(system, unet)
    banked = me.with_bank(system, unet)
    trained = Identity(banked.tokens, banked.uncond_tokens, banked.system, {}, banked.banks)
    trained.tokens.requires_grad_()
    with pytest.raises(InputError, match="no system was given, only stored banks"):
        with idcore.attach(unet, None, trained, cfg=True):
            pass
    trained.tokens.requires_grad_(False)
    with pytest.raises(InputError, match="data must be 1-D, a multiple of"):
        StoredBank(banked.banks[0].data[1:], 2, banked.banks[0].layers, {})
    path = tmp_path / "me.safetensors"
    banked.save(path)
    with safe_open(str(path), framework="pt") as f:
        tensors, header = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    header["banks"] = json.dumps([{"rows": 3, "layers": [[1, 2, 3]], "options": {}}] * 2)
    write_safetensors(path, tensors, header)
    with pytest.raises(WeightsError, match="stored keys and values are damaged"):
        Identity.load(path)
