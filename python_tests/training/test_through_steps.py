"""All losses through the four steps: gradients against float64, fused against reference, checkpointed against kept."""

import functools

import numpy as np
import pytest
import torch
from tiny_training import distance, gradients, small_features, small_pulid

from idcore.attention.types import AttentionOptions
from idcore.backends import cpu
from idcore.encoders.align import template
from idcore.errors import InputError
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.bases.tiny import TinyBase
from idcore.training.injection import Injection
from idcore.training.losses.alignment import AlignmentOptions, alignment_loss
from idcore.training.losses.diffusion import diffusion_loss
from idcore.training.losses.faces import FixedFace, Recogniser
from idcore.training.losses.identity import IdentityLoss
from idcore.training.through_steps import Through, through_steps

KEPT = Through(checkpoint_steps=False, checkpoint_decode=False)
WAYS = {
    "steps": Through(checkpoint_decode=False),
    "unet": Through(checkpoint_steps=False, checkpoint_unet=True, checkpoint_decode=False),
    "decode": Through(checkpoint_steps=False),
    "all": Through(checkpoint_unet=True),
}
HAVE_CPU = cpu._load()[0] is not None


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Look(torch.nn.Module):
    """A smooth recogniser for 16 px pictures."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", normal(12, 3 * 14 * 14, seed=3) * 0.05)

    def forward(self, chips):
        small = torch.nn.functional.avg_pool2d(chips, 8).flatten(1)
        return torch.tanh(small @ self.weight.to(small).T)


def judge():
    return IdentityLoss(Recogniser(Look(), "arcface", "bilinear", "cosine"), FixedFace(template("arcface") / 7))


@functools.cache
def base_of(dtype, sampler="dpmpp_2m"):
    base = SDXLBase(tiny_pipeline("sdxl"), sampler=sampler)
    base.to("cpu", dtype).vae.to(dtype)
    return base


LOSSES = ("diffusion", "identity", "semantic", "layout", "all")
ALIGN = {
    "semantic": AlignmentOptions(layout=0, norm="norm"),
    "layout": AlignmentOptions(semantic=0),
    "all": AlignmentOptions(),
}


def loss_of(base, pulid, injection, which, options, batch=2):
    """One of the losses, as a task would make it."""
    shape = base.latent_shape(16, 16)
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    noise, latents = (normal(batch, *shape, seed=s).to(wide) for s in (1, 2))
    text = base.text(["portrait"], 16, 16).expand(batch)
    person = injection.person(pulid(small_features(batch)))
    total = 0.0
    if which in ("diffusion", "all"):
        x, t = base.noised(latents, noise, torch.linspace(0.2, 0.7, batch))
        with injection.using(person):
            total = diffusion_loss(base.predict(x, t, text), base.target(latents, noise, t))
    if which != "diffusion":
        walk = through_steps(base, injection, person, text, noise, options, align=ALIGN.get(which))
        if which in ("identity", "all"):
            pictures = base.decode(walk.latents, checkpoint=options.checkpoint_decode)
            total = total + judge()(pictures, normal(batch, 12, seed=5).to(wide)).loss
        if which in ALIGN:
            total = total + 30 * alignment_loss(walk.alignment, ALIGN[which])
    return total


def trained(which="all", dtype=torch.float64, options=KEPT, backend=None, nudge=None, sampler="dpmpp_2m", **how):
    """(loss, gradient of every trained parameter)."""
    base = base_of(dtype, sampler)
    pulid = small_pulid(base.unet, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    if nudge is not None:
        with torch.no_grad():
            for p, d in zip(pulid.parameters(), nudge, strict=True):
                p += d
    with Injection(base.unet, pulid, backend=backend, **how) as injection:
        loss = loss_of(base, pulid, injection, which, options)
        loss.backward()
    return loss.item(), gradients(pulid)


@functools.cache
def truth(which, sampler="dpmpp_2m"):
    return trained(which, backend="reference", sampler=sampler)


@pytest.mark.parametrize("which", LOSSES)
def test_gradients_equal_finite_differences_in_float64(which):
    pulid = small_pulid(base_of(torch.float64).unet, dtype=torch.float64)
    step, towards = 1e-6, [normal(*p.shape, seed=i) for i, p in enumerate(pulid.parameters())]
    ends = [trained(which, backend="reference", nudge=[s * step * d for d in towards])[0] for s in (1, -1)]
    slope = (truth(which)[1] * torch.cat([d.flatten() for d in towards])).sum().item()
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-4, abs=1e-8)


@pytest.mark.parametrize("which", LOSSES)
def test_fused_gradients_equal_the_reference_through_all_four_steps(which):
    want_loss, want = truth(which)
    fused = ("cpu",) if HAVE_CPU else ("sdpa",)
    for backend in (*fused, *(("sdpa", "reference") if which == "all" else ())):
        loss, got = trained(which, torch.float32, backend=backend)
        assert loss == pytest.approx(want_loss, rel=1e-4)
        assert distance(got, want) < 2e-3, backend


def test_fused_gradients_of_the_published_merge():
    how = dict(options=WAYS["all"])
    merge = AttentionOptions("ortho_v2", num_zero=8)
    base = base_of(torch.float64)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu" if HAVE_CPU else "sdpa")):
        base = base_of(dtype)
        pulid = small_pulid(base.unet, dtype=dtype)
        with Injection(base.unet, pulid, backend=backend, options=merge) as injection:
            loss_of(base, pulid, injection, "all", how["options"]).backward()
        results.append(gradients(pulid))
    assert distance(results[1], results[0]) < 5e-3


@pytest.mark.parametrize(("way", "sampler"), [*((way, "dpmpp_2m") for way in WAYS), ("all", "euler")])
def test_checkpointed_equals_kept(way, sampler):
    want_loss, want = trained(sampler=sampler)
    loss, got = trained(options=WAYS[way], sampler=sampler)
    assert loss == want_loss
    assert distance(got, want) < 1e-12


def test_checkpointed_equals_kept_in_float32():
    want = trained(dtype=torch.float32)
    for way in ("steps", "all"):
        loss, got = trained(dtype=torch.float32, options=WAYS[way])
        assert loss == want[0] and distance(got, want[1]) < 1e-6


def test_bf16_base():
    _, want = truth("all")
    _, got = trained(dtype=torch.bfloat16, options=WAYS["all"])
    assert torch.isfinite(got).all()
    assert torch.nn.functional.cosine_similarity(got, want, 0) > 0.9


def test_only_the_last_steps_carry_gradients():
    base = base_of(torch.float64)
    sizes = []
    for n in range(1, 5):
        options = Through(gradient_steps=n, checkpoint_steps=False, checkpoint_decode=False)
        sizes.append(trained("identity", options=options)[1])
    full = truth("identity")[1]
    errors = [distance(s, full) for s in sizes]
    assert errors[3] < 1e-9 and errors[0] > errors[3] and len({round(e, 6) for e in errors}) == 4
    pulid = small_pulid(base.unet, dtype=torch.float64)
    with Injection(base.unet, pulid) as injection:
        person, text = injection.person(pulid(small_features(1))), base.text(["portrait"], 16, 16)
        noise = normal(1, 4, 8, 8)
        nothing = through_steps(base, injection, person, text, noise, Through(gradient_steps=0))
        assert not nothing.latents.requires_grad
        with pytest.raises(InputError, match="gradient_steps is 0; set at least 1"):
            through_steps(base, injection, person, text, noise, Through(gradient_steps=0), align=AlignmentOptions())
    with pytest.raises(InputError, match=r"0..steps of them with gradients, got 4 and 5"):
        Through(gradient_steps=5)


def test_both_paths_are_those_of_separate_runs():
    base = base_of(torch.float64)
    pulid, noise = small_pulid(base.unet, dtype=torch.float64), normal(1, 4, 8, 8)
    text = base.text(["portrait"], 16, 16)
    with Injection(base.unet, pulid) as injection:
        person = injection.person(pulid(small_features(1)))
        walk = through_steps(base, injection, person, text, noise, align=AlignmentOptions())
        alone = through_steps(base, injection, person, text, noise)
        assert torch.equal(walk.latents, alone.latents) and not alone.alignment and alone.plain is None
    few, x, memory = base.few_steps(4), noise, None
    with torch.no_grad():
        for i in range(4):
            x, memory = few.advance(i, x, base.predict(x, few.times[i].expand(1), text), memory)
    assert torch.allclose(walk.plain, x, rtol=1e-9) and not walk.plain.requires_grad
    assert walk.alignment["layout"].shape == (1,) and walk.alignment["layout"] > 0


def test_the_embedded_model_and_recogniser():
    """Every part that ships: L_id falls along its own gradient."""
    base = TinyBase.from_package()
    pulid = small_pulid(base.unet)
    loss = IdentityLoss(Recogniser.dlib(), FixedFace(template("dlib", 64, 0.6)))
    noise, wanted = normal(1, 3, 64, 64).float(), normal(1, 128, seed=2).float() * 0.1
    text = base.text(["a photo of a person"], 64, 64)

    def now():
        person = injection.person(pulid(small_features(1)))
        walk = through_steps(base, injection, person, text, noise, align=AlignmentOptions())
        return loss(base.decode(walk.latents), wanted).loss, walk

    with Injection(base.unet, pulid) as injection:
        first, walk = now()
        first.backward()
        assert set(walk.alignment) == {"semantic", "layout"}
        grads = gradients(pulid)
        with torch.no_grad():
            rate = 0.02 * first / grads.square().sum().float()
            for p in pulid.parameters():
                p -= rate * p.grad
        assert now()[0] < first
    assert np.isfinite(first.item())
