"""SDXL and Stable Diffusion 1.5 as frozen bases: they equal diffusers' schedulers, pipelines and autoencoder."""

import pytest
import torch

from idcore.errors import InputError, WeightsError
from idcore.sampling.sdxl import few_step_scheduler
from idcore.systems.words import encode_with_words, words_in
from idcore.testing.tiny_models import tiny_pipeline
from idcore.text.reader import text_parts
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.bases.trailing import trailing_steps
from idcore.training.contract import Base

KINDS = {"sdxl": SDXLBase, "sd": SD15Base}
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def base_of(kind, prediction="epsilon", **options):
    pipe = tiny_pipeline(kind)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    return KINDS[kind](pipe, **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_few_steps_equal_diffusers_schedulers(sampler, count, prediction):
    config = {**BETAS, "prediction_type": prediction}
    scheduler, steps = few_step_scheduler(config, sampler), trailing_steps(config, count, sampler)
    scheduler.set_timesteps(count)
    g = torch.Generator().manual_seed(0)
    noise, *predictions = torch.randn(count + 1, 2, 4, 4, 4, generator=g)
    want, got, memory = noise * scheduler.init_noise_sigma, steps.start(noise), None
    wide, wide_memory = steps.start(noise.double()), None
    assert torch.equal(got, want) and steps.times.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        assert torch.allclose(steps.scaled(i, got), scheduler.scale_model_input(want, t), rtol=1e-6, atol=0)
        want = scheduler.step(predictions[i], t, want).prev_sample
        got, memory = steps.advance(i, got, predictions[i], memory)
        wide, wide_memory = steps.advance(i, wide, predictions[i].double(), wide_memory)
        # Both round in float32; where large terms cancel they may differ by roundings of those.
        size = float(want.abs().max().clamp_min(noise.abs().max() * scheduler.init_noise_sigma))
        assert (got - want).abs().max() <= 3e-6 * size and (wide - want).abs().max() <= 3e-6 * size
    assert torch.isfinite(got).all()


def test_lightning_stands_where_it_was_distilled():
    steps = trailing_steps(BETAS, 4, "dpmpp_2m")
    assert steps.times.tolist() == [999, 749, 499, 249]
    sigmas = [s / a for s, a in zip(steps.sigmas, steps.alphas)]
    assert sigmas == pytest.approx([14.6146, 4.0817, 1.6129, 0.6932, 0], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_pictures_are_those_of_the_pipeline(kind):
    base = base_of(kind)
    assert isinstance(base, Base)
    prompt, noise = "a face", torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = base.pipe(
        prompt, latents=noise, guidance_scale=1, num_inference_steps=4, output_type="pt", height=16, width=16
    ).images
    few, text, memory = base.few_steps(4), base.text([prompt], 16, 16), None
    x = few.start(noise)
    with torch.no_grad():
        for i, t in enumerate(few.times):
            x, memory = few.advance(i, x, base.predict(few.scaled(i, x), t.expand(1), text), memory)
        got = base.decode(x)
    assert torch.allclose((got / 2 + 0.5).clamp(0, 1), want, atol=1e-5)


def test_sizes_reach_the_unet():
    base = base_of("sdxl")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 3])
    sizes = torch.tensor([[64.0, 48, 8, 0, 16, 16]] * 2)
    plain, other = base.text(["a", "b"], 16, 16), base.text(["a", "b"], 16, 16, sizes)
    assert plain.extra["time_ids"][1].tolist() == [16, 16, 0, 0, 16, 16]
    assert not torch.allclose(base.predict(x, t, plain), base.predict(x, t, other))
    with pytest.raises(InputError, match=r"sizes must be \[2, 6\], got \[1, 6\]"):
        base.text(["a", "b"], 16, 16, sizes[:1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_target_and_clean_fit_together(prediction):
    base = base_of("sdxl", prediction)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=g)
    x, t = base.noised(x0, noise, torch.tensor([0.0, 0.5, 0.9999]))
    assert t.tolist() == [0, 500, 999]
    want = base.pipe.scheduler.alphas_cumprod[t]
    assert torch.allclose(x, want.sqrt().view(-1, 1, 1, 1) * x0 + (1 - want).sqrt().view(-1, 1, 1, 1) * noise)
    assert torch.allclose(base.clean(x, t, base.target(x0, noise, t)), x0, atol=1e-3)
    assert torch.allclose(base.snr(t), want / (1 - want), rtol=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_decoding_in_parts_is_the_autoencoder(checkpoint):
    base = base_of("sdxl")
    base.vae.double()
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    want = base.vae.decode(z / base.vae.config.scaling_factor).sample
    (want_grad,) = torch.autograd.grad(want.square().sum(), z)
    got = base.decode(z, checkpoint=checkpoint)
    (grad,) = torch.autograd.grad(got.square().sum(), z)
    assert torch.equal(got, want) and torch.allclose(grad, want_grad, rtol=1e-12)


def test_encoding_and_decoding_use_the_same_scale():
    base = base_of("sdxl")
    pixels = torch.randn(1, 3, 16, 16)
    latents = base.encode_pictures(pixels)
    own = base.vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(latents, own * base.vae.config.scaling_factor) and latents.dtype == torch.float32
    assert torch.allclose(base.decode(latents), base.vae.decode(own).sample, atol=1e-5)
    assert base.latent_shape(32, 16) == (4, 16, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_live_text_carries_gradients_into_words(kind):
    base = base_of(kind)
    prompt, widths = "a photo of S* in a hat", [p.width for p in text_parts(base.pipe)]
    g = torch.Generator().manual_seed(0)
    words = [torch.randn(1, 2, w, generator=g).requires_grad_() for w in widths]
    with words_in(base.pipe, {"S*": words}):
        got = base.text_live([prompt, "a face of S*"], 16, 16)
        again = base.text_live([prompt, "a face of S*"], 16, 16)
    want, pooled = encode_with_words(base.pipe, [prompt, "a face of S*"], {"S*": words})
    assert torch.allclose(got.embeds, want) and torch.equal(got.embeds, again.embeds)
    assert pooled is None or (torch.allclose(got.pooled, pooled) and got.extra["time_ids"].shape == (2, 6))
    grads = torch.autograd.grad(got.embeds.square().sum(), words)
    assert all(float(g.abs().min()) > 0 for g in grads)
    with torch.no_grad():  # without words it is the cached text, encoded anew
        assert torch.allclose(base.text_live(["a"], 16, 16).embeds, base.text(["a"], 16, 16).embeds)
    with pytest.raises(InputError, match="wanted a list of one or more strings, got 'a face'"):
        base.text_live("a face", 16, 16)


def test_cached_prompts_need_no_encoder():
    base = base_of("sdxl")
    first = base.text(["a", "b"], 16, 16)
    base.release_text_encoders()
    base.pipe.encode_prompt = lambda *a, **k: pytest.fail("encoded again")
    assert torch.equal(base.text(["b"], 16, 16).embeds[0], first.embeds[1])


def test_everything_is_frozen_and_float16_autoencoders_do_not_overflow():
    pipe = tiny_pipeline("sdxl").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    base = SDXLBase(pipe)
    assert base.dtype == torch.float16 and base.vae.dtype == torch.float32
    assert base.decode(torch.randn(1, 4, 8, 8)).dtype == torch.float32
    modules = (base.unet, base.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_what_does_not_fit_is_refused(tmp_path):
    base = base_of("sdxl")
    with pytest.raises(InputError, match="multiples of 4, got 18x16"):
        base.latent_shape(18, 16)
    with pytest.raises(InputError, match="prediction_type must be one of .*, got 'flow_prediction'"):
        base_of("sdxl", "flow_prediction")
    pipe = tiny_pipeline("sdxl")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match="reads 9 channels, the autoencoder gives 4"):
        SDXLBase(pipe)
    for cls in (SDXLBase, SD15Base):
        with pytest.raises(WeightsError, match="no model_index.json"):
            cls.from_pretrained(tmp_path)


def test_folders_load_and_a_unet_file_takes_the_place_of_theirs(tmp_path):
    from safetensors.torch import save_file

    tiny_pipeline("sdxl").save_pretrained(tmp_path / "sdxl")
    tiny_pipeline("sd").save_pretrained(tmp_path / "sd")
    other = tiny_pipeline("sdxl", seed=3).unet
    save_file(other.state_dict(), tmp_path / "light.safetensors")
    base = SDXLBase.from_pretrained(tmp_path / "sdxl", unet_weights=tmp_path / "light.safetensors")
    assert base.dtype == torch.bfloat16 and base.name.endswith("with light.safetensors")
    assert torch.equal(base.unet.conv_in.weight, other.conv_in.weight.bfloat16())
    assert SD15Base.from_pretrained(tmp_path / "sd", dtype=torch.float32).dtype == torch.float32
