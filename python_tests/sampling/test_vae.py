"""Latents to pictures: dtypes, order of memory, overflow."""

import warnings

import pytest
import torch

from idcore.errors import InputError
from idcore.sampling.vae import LatentDecoder
from idcore.testing.tiny_models import tiny_vae

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def stock(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def test_equal_to_the_autoencoder_itself():
    wanted = stock(tiny_vae(), LATENTS)
    assert (LatentDecoder(tiny_vae())(LATENTS) - wanted).abs().max() < 1e-5
    assert torch.equal(LatentDecoder(tiny_vae(), channels_last=False)(LATENTS), wanted)


def test_latents_with_a_mean_of_their_own():
    vae = tiny_vae()
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    whole = LATENTS * torch.tensor(std).view(1, 4, 1, 1) / vae.config.scaling_factor
    wanted = tiny_vae().decode(whole + torch.tensor(mean).view(1, 4, 1, 1), return_dict=False)[0]
    assert (LatentDecoder(vae)(LATENTS) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    "weights, upcast, asked, got",
    [
        (torch.float16, True, "auto", torch.float32),
        (torch.float16, False, "auto", torch.float16),
        (torch.bfloat16, True, "auto", torch.bfloat16),
        (torch.float32, True, "bfloat16", torch.bfloat16),
        (torch.float32, True, "float16", torch.float16),
    ],
)
def test_dtypes(weights, upcast, asked, got):
    vae = tiny_vae().to(weights)
    vae.register_to_config(force_upcast=upcast)
    decoder = LatentDecoder(vae, asked)
    assert decoder.dtype == got and decoder(LATENTS.to(weights)).dtype == got
    error = (decoder(LATENTS).float() - stock(tiny_vae(), LATENTS)).abs().max()
    assert error < 0.05


def test_an_overflow_is_decoded_again_in_float32():
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=1e-6)  # a million times larger activations: float16 cannot hold them
    wanted = stock(vae, LATENTS)
    assert not torch.isfinite(stock(tiny_vae().half(), LATENTS.half() * 0.18215e6)).all()
    decoder = LatentDecoder(vae, "float16")
    with pytest.warns(UserWarning, match="overflowed in float16; it runs in float32 from now on"):
        got = decoder(LATENTS)
    assert decoder.dtype == torch.float32 and (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decoder(LATENTS), got)


def test_unknown_dtype():
    with pytest.raises(InputError, match="vae_dtype must be auto, float32, bfloat16, float16, got 'fp8'"):
        LatentDecoder(tiny_vae(), "fp8")


def test_weights_that_are_offloaded_layer_by_layer():
    accelerate = pytest.importorskip("accelerate")
    vae = tiny_vae()
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert (LatentDecoder(vae)(LATENTS) - stock(tiny_vae(), LATENTS)).abs().max() < 1e-5
    with pytest.raises(InputError, match="cannot turn to torch.bfloat16; give vae_dtype together with offload"):
        LatentDecoder(vae, "bfloat16")
