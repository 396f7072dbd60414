"""Models with random weights for timings, made from code: no hub, no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..testing.tiny_models import tiny_inputs, tiny_tokenizer, tiny_unet

SDXL_PARAMETERS = 2_567_463_684
BASES = ("sdxl-random", "tiny")


def sdxl_shapes() -> nn.Module:
    """SDXL's UNet on the meta device: its structure, no memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def sdxl_unet(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The UNet of SDXL at full size: 2,567,463,684 parameters, 70 cross-attention layers.

    Args:
        dtype: of the weights; float32 takes 10.3 GB, bfloat16 5.1 GB.
        device: where they are made.
        seed: of the weights, uniform in +-1 / sqrt(inputs); norms are 1, biases 0.
    """
    return _filled(sdxl_shapes(), dtype, device, seed)


def sdxl_inputs(size: int, batch: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one forward at size x size pixels: latent [B, 4, size / 8, size / 8], 77 tokens x 2048."""
    if size % 64:
        raise InputError(f"the size must be a multiple of 64 pixels, got {size}")
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    ids = torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=dtype)
    return {
        "sample": normal(batch, 4, size // 8, size // 8),
        "timestep": torch.tensor(999, device=device),
        "encoder_hidden_states": normal(batch, 77, 2048),
        "added_cond_kwargs": {"text_embeds": normal(batch, 1280), "time_ids": ids.repeat(batch, 1)},
    }


def base_model(base: str, size: int, batch: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet and the arguments of one forward.

    Args:
        base: "sdxl-random" (full size) or "tiny" (SDXL's structure in small; the size is in pixels of its 8 px cells).

    Raises:
        InputError: no base of that name, or a size that it cannot take.
    """
    if base == "sdxl-random":
        return sdxl_unet(dtype, device), sdxl_inputs(size, batch, dtype, device)
    if base != "tiny":
        raise InputError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    inputs = tiny_inputs("sdxl", batch, size // 8, size // 8)

    def move(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: move(v) for k, v in x.items()}
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return tiny_unet("sdxl").to(device, dtype), move(inputs)


def _filled(module: nn.Module, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    """A module that was made on the meta device, with random weights.

    Matrices are uniform in +-1 / sqrt(inputs), norms 1, biases 0; integer buffers count from 0.
    """
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.uniform_(-1, 1, generator=generator).mul_(p[0].numel() ** -0.5)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for b in module.buffers():
        if not b.is_floating_point():
            b.copy_(torch.arange(b.numel(), device=device).view(b.shape))
    return module


def _text_encoder(dtype: torch.dtype, device: str, large: bool) -> nn.Module:
    """CLIP ViT-L's text side, or OpenCLIP ViT-bigG's with its projection: SDXL's two."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, layers, heads = (1280, 32, 20) if large else (768, 12, 12)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config) if large else CLIPTextModel(config)
    return _filled(model, dtype, device, seed=3)


def sdxl_vae(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """SDXL's autoencoder (83,653,863 parameters) with random weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
            scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
    return vae.to(dtype) if device == "meta" else _filled(vae, dtype, device, seed=4)


def sdxl_pipeline(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """StableDiffusionXLPipeline at full size with random weights, and a tokenizer over single bytes.

    float32 takes 14 GB, 16 bit 7 GB; the autoencoder is float32 where the rest is float16.
    """
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline(
        vae=sdxl_vae(torch.float32 if dtype == torch.float16 else dtype, device),
        text_encoder=_text_encoder(dtype, device, large=False),
        text_encoder_2=_text_encoder(dtype, device, large=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=sdxl_unet(dtype, device),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
