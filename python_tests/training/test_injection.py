"""The identity that training puts on a frozen UNet: gradients, checkpointing, the tap, and no trace afterwards."""

import pytest
import torch
from tiny_training import distance, gradients, small_features, small_pulid

import idcore
from idcore.attention.types import AttentionOptions
from idcore.backends import cpu
from idcore.errors import InputError
from idcore.testing.tiny_models import tiny_inputs, tiny_unet
from idcore.training.injection import Injection, undressed

OPTIONS = {
    "add": AttentionOptions(),
    "ortho": AttentionOptions("ortho", num_zero=3),
    "ortho_v2": AttentionOptions("ortho_v2", num_zero=3),
}


def cast(inputs, dtype):
    if isinstance(inputs, dict):
        return {k: cast(v, dtype) for k, v in inputs.items()}
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def trained(dtype=torch.float32, adapter=None, *, keep=None, backend=None, options="add", ckpt=False, double=False):
    """(output, gradient of all of PuLID's parameters) of one pass, or of two passes in one backward."""
    unet = tiny_unet("sdxl").to(dtype)
    pulid = small_pulid(unet, dtype=adapter or dtype)
    inputs = cast(tiny_inputs("sdxl", 2), dtype)
    with Injection(unet, pulid, options=OPTIONS[options], backend=backend) as injection:
        injection.checkpointing(ckpt)
        person = injection.person(pulid(small_features()), keep)
        with injection.using(person):
            out = unet(**inputs).sample
        loss = (out.double() ** 2).mean()
        if double:
            with injection.using(injection.person(pulid(small_features(seed=5)))):
                loss = loss + unet(**inputs).sample.double().abs().mean()
        loss.backward()
    return out.detach(), gradients(pulid)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_float64_autograd(options):
    want_out, want = trained(torch.float64, backend="reference", options=options)
    for backend in ("reference", "sdpa", *([] if cpu._load()[0] is None else ["cpu"])):
        out, got = trained(backend=backend, options=options)
        assert distance(out.double(), want_out) < 1e-5
        assert distance(got, want) < 2e-4, backend


def test_bf16_base_and_float32_adapters():
    _, want = trained(torch.float64, backend="reference")
    _, got = trained(torch.bfloat16, torch.float32)
    assert torch.nn.functional.cosine_similarity(got, want, 0) > 0.995


@pytest.mark.parametrize("double", [False, True])
def test_recomputed_blocks_see_the_person_of_their_own_forward(double):
    out, want = trained(torch.float64, double=double)
    again, got = trained(torch.float64, ckpt=True, double=double)
    assert torch.equal(out, again)
    assert distance(got, want) < 1e-12


def test_keep_mutes_a_sample():
    unet = tiny_unet("sdxl")
    pulid, inputs = small_pulid(unet), tiny_inputs("sdxl", 2)
    plain = unet(**inputs).sample
    tokens = pulid(small_features()).detach().requires_grad_()
    with Injection(unet, pulid) as injection:
        with injection.using(injection.person(tokens, torch.tensor([True, False]))):
            out = unet(**inputs).sample
    assert not torch.allclose(out[0], plain[0], atol=1e-3) and torch.allclose(out[1], plain[1], atol=1e-5)
    out.square().sum().backward()
    assert tokens.grad[0].abs().max() > 0 and tokens.grad[1].abs().max() == 0
    uncond = pulid.uncond_tokens(5)
    rows = undressed(tokens, uncond, torch.tensor([False, True]))
    assert torch.equal(rows[0], uncond[0]) and torch.equal(rows[1], tokens[1])


def test_passes_are_those_of_attach_and_of_the_bare_unet_and_no_trace_stays():
    unet = tiny_unet("sdxl")
    pulid, inputs = small_pulid(unet).requires_grad_(False), tiny_inputs("sdxl", 2)
    found, hooks = dict(unet.attn_processors), len(unet._forward_pre_hooks)
    plain = unet(**inputs).sample
    me = idcore.Identity(pulid(small_features()), None, pulid.name)
    with idcore.attach(unet, pulid, me, cfg=False, id_scale=0.7, merge="add", num_zero=0):
        attached = unet(**inputs).sample
    injection = Injection(unet, pulid, id_scale=0.7)
    injection.checkpointing()
    with injection.using(injection.person(me.tokens)):
        assert torch.equal(unet(**inputs).sample, attached)
        with injection.using(None):
            assert torch.equal(unet(**inputs).sample, plain)
        assert torch.equal(unet(**inputs).sample, attached)
    assert torch.equal(unet(**inputs).sample, plain)
    injection.remove()
    injection.remove()
    assert all(unet.attn_processors[name] is p for name, p in found.items())
    assert len(unet._forward_pre_hooks) == hooks and not unet.is_gradient_checkpointing
    with pytest.raises(InputError, match="was taken off its UNet"), injection.using(None):
        pass


def test_tap_sees_queries_and_text_keys_of_every_layer():
    unet = tiny_unet("sdxl")
    pulid, inputs = small_pulid(unet), tiny_inputs("sdxl", 2)
    queries, layers = {}, [s for s in pulid.sites(unet)]
    for site in layers:
        attn = unet.get_submodule(site.path)
        attn.to_q.register_forward_hook(lambda m, i, o, n=site.name: queries.__setitem__(n, o))
    plain = unet(**inputs).sample
    with Injection(unet, pulid) as injection:
        person = injection.person(pulid(small_features()))
        for who in (None, person):
            seen = {}
            with injection.using(who, lambda name, q, k, into=seen: into.__setitem__(name, (q, k))):
                out = unet(**inputs).sample
            assert list(seen) and set(seen) == {s.name for s in layers}
            for site in layers:
                q, k = seen[site.name]
                assert q.shape[1::2] == (site.heads, site.head_dim) and k.shape[2] == 77
                assert torch.equal(q.transpose(1, 2).flatten(2), queries[site.name])
            if who is None:
                assert torch.allclose(out, plain, atol=1e-5)
            else:
                assert any(q.requires_grad for q, _ in seen.values())


def test_what_does_not_fit_is_refused():
    unet = tiny_unet("sdxl")
    pulid = small_pulid(unet)
    with Injection(unet, pulid) as injection:
        with pytest.raises(InputError, match=r"keep must be \[2\], one per row of tokens, got \[3\]"):
            injection.person(pulid(small_features()), torch.ones(3))
        with injection.using(injection.person(pulid(small_features(3)))):
            with pytest.raises(InputError, match="tokens of 3 samples do not fit a batch of 2"):
                unet(**tiny_inputs("sdxl", 2))
        unet.enable_gradient_checkpointing()
        with pytest.raises(InputError, match="use Injection.checkpointing"), injection.using(None):
            pass
        unet.disable_gradient_checkpointing()
    unet.conv_in.weight.requires_grad_()
    with pytest.raises(InputError, match="frozen, but conv_in.weight wants a gradient"):
        Injection(unet, pulid)
    with pytest.raises(InputError, match="the UNet is compiled"):
        Injection(torch.compile(tiny_unet("sdxl")), pulid)
