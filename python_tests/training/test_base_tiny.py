"""The embedded model as a frozen base: it is the shipped pipeline's own model, and PuLID fits on it."""

import pytest
import torch

import idcore
from idcore.errors import InputError
from idcore.sampling.few_step import sample
from idcore.sampling.tiny_pipeline import TinyPipeline
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.training.bases.tiny import TinyBase
from idcore.training.contract import Base

PROMPTS = ["a photo of a person, blue background", "a pencil drawing"]


@pytest.fixture(scope="module")
def base():
    return TinyBase.from_package()


def draw(base, text, noise, steps=4):
    few = base.few_steps(steps)
    x, memory = few.start(noise), None
    for i in range(steps):
        t = few.times[i].expand(len(x))
        x, memory = few.advance(i, x, base.predict(few.scaled(i, x), t, text), memory)
    return base.decode(x)


def test_draws_what_the_pipeline_draws_without_identity(base):
    assert isinstance(base, Base)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = TinyPipeline.from_package().model
    with torch.no_grad():
        text, pooled = model.text(model.tokenizer(PROMPTS))
        zeros = torch.zeros(2, model.reference_channels, 32, 32)
        wanted = sample(lambda x, t: model(x, t, text, pooled, zeros), noise, 4)
        got = draw(base, base.text(PROMPTS, 64, 64), noise)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_the_path_and_its_target(base):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 64, 64, generator=g)
    x, t = base.noised(x0, noise, torch.tensor([0.0, 0.29, 0.59, 0.8]))
    assert t.tolist() == pytest.approx([0.25, 0.5, 1.0, 0.51])
    tt = t.view(-1, 1, 1, 1)
    assert torch.allclose(x, (1 - tt) * x0 + tt * noise)
    assert base.target(x0, noise, t) is x0 and base.clean(x, t, x0) is x0
    assert base.snr(torch.tensor([0.25])).item() == pytest.approx(9)
    u = torch.rand(4000, generator=g)
    levels = base.noised(torch.zeros(4000, 1, 1, 1), torch.zeros(4000, 1, 1, 1), u)[1]
    assert levels.min() >= 0.02 and levels.max() <= 1
    assert 0.57 < (levels * 4 == (levels * 4).round()).float().mean() < 0.63


def test_prompts_are_encoded_once(base):
    first = base.text(PROMPTS, 64, 64)
    base.model.text.register_forward_pre_hook(lambda *_: pytest.fail("encoded again"))
    again = base.text(PROMPTS[::-1] + PROMPTS[:1], 64, 64)
    base.model.text._forward_pre_hooks.clear()
    assert torch.equal(again.embeds[0], first.embeds[1]) and torch.equal(again.pooled[2], first.pooled[0])
    assert not again.embeds.requires_grad


def test_pulid_attaches(base):
    config = PuLIDConfig.for_unet(base.unet, EncoderConfig("v1", id_dim=8, vit_dim=8, width=16, output_dim=32))
    pulid = PuLID(config).eval()
    me = idcore.Identity(torch.randn(1, 10, 32), None, pulid.name)
    x = torch.randn(1, 3, 64, 64)
    text, t = base.text(PROMPTS[:1], 64, 64), torch.ones(1)
    with torch.no_grad():
        plain = base.predict(x, t, text)
        with idcore.attach(base.unet, pulid, me, cfg=False):
            assert not torch.equal(base.predict(x, t, text), plain)
        assert torch.equal(base.predict(x, t, text), plain)


def test_other_sizes_and_prompts_are_refused(base):
    with pytest.raises(InputError, match="64x64 pixels, got 768x64"):
        base.latent_shape(768, 64)
    with pytest.raises(InputError, match="list of one or more strings, got 'one'"):
        base.text("one", 64, 64)


def test_somebody_gives_the_base_a_face_to_change(base):
    """With the average of drawn people as reference, pictures of no identity lie near faces."""
    from idcore.encoders.dlib_torch import DlibRecogniser
    from idcore.training.tiny.losses import tight_chips
    from idcore.training.tiny.somebody import somebody

    reference = somebody(base.model, people=8)
    assert reference.shape == (1, base.model.reference_channels, 32, 32)
    assert torch.equal(reference, somebody(base.model, people=8))
    other = TinyBase(base.model, reference)
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recogniser = DlibRecogniser()
    with torch.no_grad():
        faces = [
            recogniser(tight_chips(draw(b, b.text(["a photo of a person"] * 4, 64, 64), noise) * 0.5 + 0.5))
            for b in (base, other)
        ]
    spread = [f.embedding.sub(f.embedding.mean(0)).norm(dim=1).mean() for f in faces]
    assert (faces[1].embedding - faces[0].embedding).norm(dim=1).mean() > 2 * spread[1]
