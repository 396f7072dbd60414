"""Latents to pictures: dtypes, order of memory, overflow."""

import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idcore.bench.unets import sdxl_vae
from idcore.errors import InputError
from idcore.sampling.vae import DTYPES, LatentDecoder
from idcore.sampling.vae_range import residual_scale, set_residual_scale
from idcore.sampling.vae_tiles import Plan, decode_bytes, decode_tiles, plan_decode, tile_starts
from idcore.testing.tiny_models import tiny_vae

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def stock(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def test_equal_to_the_autoencoder_itself():
    wanted = stock(tiny_vae(), LATENTS)
    assert (LatentDecoder(tiny_vae())(LATENTS) - wanted).abs().max() < 1e-5
    assert torch.equal(LatentDecoder(tiny_vae(), channels_last=False)(LATENTS), wanted)


def test_the_order_of_memory_follows_dtype_and_device():
    for dtype, last in (("float32", False), ("bfloat16", True), ("float16", True)):
        decoder = LatentDecoder(tiny_vae(), dtype)
        assert (decoder.format is torch.channels_last) == last
        weight = decoder.vae.decoder.conv_in.weight
        assert weight.is_contiguous(memory_format=decoder.format) and not (last and weight.is_contiguous())
    assert LatentDecoder(tiny_vae(), device="cuda").format is torch.channels_last
    assert LatentDecoder(tiny_vae(), channels_last=True).format is torch.channels_last


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


def loud(factor, upcast=True):
    """An autoencoder whose residual path carries large values, like SDXL's."""
    vae = tiny_vae()
    vae.register_to_config(force_upcast=upcast)
    block = vae.decoder.up_blocks[0].resnets[0]
    for p in block.conv2.parameters():
        p.mul_(factor)
    return vae


def test_a_scaled_residual_path_gives_the_same_pictures():
    vae = tiny_vae()
    wanted = stock(vae, LATENTS)
    set_residual_scale(vae.decoder, 2.0**-5)
    assert residual_scale(vae.decoder) == 2.0**-5
    assert (stock(vae, LATENTS) - wanted).abs().max() < 2e-6
    set_residual_scale(vae.decoder, 1.0)
    assert torch.equal(stock(vae, LATENTS), wanted)
    with pytest.raises(InputError, match="scaled by a power of two, which rounds nothing; got 0.3"):
        set_residual_scale(vae.decoder, 0.3)
    vae.decoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="not made of group norms, residual blocks and attention alone"):
        set_residual_scale(vae.decoder, 0.5)


def test_what_overflows_in_float16_does_not_with_a_scaled_path():
    wanted = stock(loud(1e6), LATENTS)
    assert not torch.isfinite(stock(loud(1e6).half(), LATENTS.half())).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = LatentDecoder(loud(1e6), "float16")
        again = LatentDecoder(decoder.vae, "float16")  # does not scale a second time
        got = again(LATENTS)
    assert decoder.scale == again.scale == 2.0**-5 and got.dtype == torch.float16
    assert (got.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


@pytest.mark.parametrize(
    "factor, upcast, scale, dtype", [(2e5, False, 2.0**-5, torch.float16), (4e6, True, 2.0**-10, torch.float16)]
)
def test_an_overflow_is_decoded_again_with_more_range(factor, upcast, scale, dtype):
    wanted, decoder = stock(loud(factor), LATENTS), LatentDecoder(loud(factor, upcast), "float16")
    with pytest.warns(UserWarning, match=f"overflowed in float16; its residual path carries {scale:g} of its values"):
        got = decoder(LATENTS)
    assert (decoder.scale, decoder.dtype) == (scale, dtype)
    assert (got.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_the_last_resort_is_float32():
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=1e-6)  # the latents themselves overflow
    wanted, decoder = stock(vae, LATENTS), LatentDecoder(vae, "float16")
    with pytest.warns(UserWarning, match="overflowed in float16; it runs in float32 from now on"):
        got = decoder(LATENTS)
    assert (decoder.dtype, decoder.scale) == (torch.float32, 1.0)
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decoder(LATENTS), got)


def test_latents_that_are_not_finite_are_named():
    latents = LATENTS.clone()
    latents[0, 0, 0, 0] = torch.nan
    decoder = LatentDecoder(tiny_vae(), "float16")
    with pytest.warns(UserWarning, match="latents hold NaN or infinity.*the UNet overflowed"):
        decoder(latents)
    assert decoder.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parity_with_the_autoencoder_itself(dtype):
    truth = stock(tiny_vae().double(), LATENTS.double())
    eager = stock(tiny_vae().to(DTYPES[dtype]), LATENTS.to(DTYPES[dtype]))
    vae = tiny_vae()
    vae.register_to_config(force_upcast=True)
    ours = LatentDecoder(vae, dtype)(LATENTS.to(DTYPES[dtype]))
    floor = 1e-6 if dtype == "float32" else 1e-5
    assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            storage = t.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("height, width", [(64, 64), (128, 96)])
def test_memory_is_estimated(height, width, monkeypatch):
    vae = sdxl_vae(torch.bfloat16, "meta")
    with torch.no_grad(), Live() as live:
        # PyTorch has no fused attention on this device.
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: q.clone())
        vae.decode(torch.empty(1, 4, height, width, dtype=torch.bfloat16, device="meta"))
    estimate = decode_bytes(vae.config, 1, height, width, 2)
    assert live.most == pytest.approx(estimate, rel=0.1)
    assert decode_bytes(vae.config, 3, height, width, 4) == 6 * estimate


def test_plans_follow_the_memory():
    config, shape = tiny_vae().config, (5, 4, 96, 64)
    one = decode_bytes(config, 1, 96, 64, 4)
    assert plan_decode(config, shape, 4, float("inf")) == Plan(5, None)
    assert plan_decode(config, shape, 4, 2.5 * one) == Plan(2, None)
    pictures, tile = plan_decode(config, shape, 4, 0.5 * one)
    assert pictures == 1 and decode_bytes(config, 1, tile, tile, 4) <= 0.5 * one
    assert decode_bytes(config, 1, tile + 1, tile + 1, 4) > 0.5 * one
    _, tile = plan_decode(config, shape, 4, 0.9 * one)
    assert 64 < tile < 96 and decode_bytes(config, 1, tile, 64, 4) <= 0.9 * one  # the short side stays whole
    assert plan_decode(config, shape, 4, 1) == Plan(1, 32)


def test_batches_and_pictures_that_do_not_fit():
    latents = torch.randn(3, 4, 48, 40, generator=torch.Generator().manual_seed(1))
    wanted = LatentDecoder(tiny_vae())(latents)
    one = decode_bytes(tiny_vae().config, 1, 48, 40, 4) / 1e9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = LatentDecoder(tiny_vae(), memory=1.5 * one)
        assert decoder.plan(latents.shape) == Plan(1, None)
        assert (decoder(latents) - wanted).abs().max() < 1e-5
    decoder = LatentDecoder(tiny_vae(), memory=0.7 * one)
    with pytest.warns(UserWarning, match="48 x 40 latent pixels takes about .* GB .* in tiles of 3"):
        tiled = decoder(latents)
    assert tiled.shape == wanted.shape
    assert 0 < (tiled - wanted).abs().mean() < 0.2 * wanted.std()


@pytest.mark.parametrize("size, tile", [((33, 40), 32), ((70, 20), 32), ((20, 20), 32), ((100, 64), 32)])
def test_tiles_fade_into_each_other(size, tile):
    def decode(x):
        assert x.shape[-2:] == tuple(min(n, tile) for n in size)
        return x[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)

    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decode_tiles(decode, latents, tile, 2), decode_of_all(latents), atol=1e-6)
    for n in size:
        begins = tile_starts(n, tile)
        assert begins[0] == 0 and begins[-1] == max(0, n - tile)
        assert all(b - a <= 0.75 * tile for a, b in zip(begins, begins[1:]))


def decode_of_all(x):
    return x[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_compiled():
    torch._dynamo.reset()
    decoder = LatentDecoder(tiny_vae(), compile="aot_eager")
    assert (decoder(LATENTS) - stock(tiny_vae(), LATENTS)).abs().max() < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        decoder(LATENTS + 1)


def test_memory_must_be_a_number():
    for wrong in (0, -1.0, "2 GB", True):
        with pytest.raises(InputError, match="vae_memory must be a positive number of GB, or None"):
            LatentDecoder(tiny_vae(), memory=wrong)


def test_damaged_weights_are_named():
    vae = tiny_vae()
    vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.warns(UserWarning, match="made NaN or infinity of finite latents in torch.float32; are its weights"):
        LatentDecoder(vae)(LATENTS)


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
    with pytest.raises(InputError, match="layer by layer .sequential offload.: vae_compile cannot be"):
        LatentDecoder(vae, compile=True)
