"""Tiny diffusers models and whole pipelines with random weights, made from code: no hub, no files.

They have the structure of the real ones (blocks, attention layers, two text encoders for SDXL), in sizes that run in
milliseconds, so integrations can be tested without weights. Same seed, same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LETTERS = 77  # tokens of a prompt, as in Stable Diffusion


def tiny_unet(kind: str = "sd", seed: int = 0, **config: Any) -> nn.Module:
    """UNet2DConditionModel with SD 1.5's ("sd") or SDXL's ("sdxl") structure.

    SD: 32 and 64 channels, text width 32, 8x8 latent. SDXL: the same with two transformer layers in the deeper block,
    linear projections, text width 64 and SDXL's added size and pooled-text conditions.

    Args:
        kind: "sd" or "sdxl".
        seed: of the random weights.
        **config: values of UNet2DConditionModel's configuration to change.
    """
    from diffusers import UNet2DConditionModel

    base: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": 8,
    }
    if kind == "sd":
        base |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        }
    elif kind == "sdxl":
        base |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
    else:
        raise ValueError(f"tiny_unet: kind must be 'sd' or 'sdxl', got {kind!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**(base | config)).eval().requires_grad_(False)


def tiny_inputs(kind: str = "sd", batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one forward of `tiny_unet(kind)`."""
    g = torch.Generator().manual_seed(seed)
    dim = 32 if kind == "sd" else 64
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(batch, LETTERS, dim, generator=g),
    }
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 32, generator=g),
            "time_ids": torch.tensor([[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]]).repeat(batch, 1),
        }
    return inputs


def tiny_tokenizer() -> Any:
    """CLIPTokenizer over single bytes (CLIP's byte alphabet without merges): 514 tokens."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=LETTERS)


def tiny_text_encoder(seed: int = 0, projection: bool = False) -> nn.Module:
    """CLIP text encoder of width 32, two layers; with a 32-wide projection if asked for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LETTERS,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return model.eval().requires_grad_(False)


def tiny_vae(seed: int = 0) -> nn.Module:
    """AutoencoderKL that shrinks each side by 2, four latent channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            force_upcast=False,
        )
    return vae.eval().requires_grad_(False)


def tiny_pipeline(kind: str = "sd", seed: int = 0, cls: Any = None, **components: Any) -> Any:
    """A whole StableDiffusionPipeline ("sd") or StableDiffusionXLPipeline ("sdxl") for 16x16 pictures.

    Args:
        kind: "sd" or "sdxl".
        seed: of all random weights.
        cls: another pipeline class with the same components, e.g. an img2img one.
        **components: components in place of the tiny ones, or further ones (`controlnet=...`).
    """
    import diffusers

    parts: dict[str, Any] = {
        "vae": tiny_vae(seed),
        "text_encoder": tiny_text_encoder(seed),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_unet(kind, seed),
        "scheduler": diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
    }
    if kind == "sd":
        cls = cls or diffusers.StableDiffusionPipeline
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        cls = cls or diffusers.StableDiffusionXLPipeline
        parts |= {"text_encoder_2": tiny_text_encoder(seed + 1, projection=True), "tokenizer_2": tiny_tokenizer()}
        parts["add_watermarker"] = False
    pipe = cls(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ip_adapter(unet: nn.Module, seed: int = 0, tokens: int = 4, width: int = 16) -> dict[str, dict[str, Tensor]]:
    """Random weights of a plain IP-Adapter for this UNet, in its published key layout.

    `pipe.load_ip_adapter(tiny_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)`; give
    the pipeline `ip_adapter_image_embeds=[tensor [1 or 2, 1, width]]`.

    Args:
        unet: the UNet that shall take it.
        seed: of the random weights.
        tokens: image tokens per picture; diffusers reads this layout as 4.
        width: size of an image embedding.
    """
    from ..attention.sites import find_sites

    g = torch.Generator().manual_seed(seed)
    dim = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    for i, site in enumerate(find_sites(unet)):
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{name}.weight"] = torch.randn(site.hidden, dim, generator=g) * dim**-0.5
    projection = {
        "proj.weight": torch.randn(tokens * dim, width, generator=g) * width**-0.5,
        "proj.bias": torch.zeros(tokens * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    return {"image_proj": projection, "ip_adapter": layers}


class TinySystem(nn.Module):
    """A `System` with random weights: one bias-free linear layer per site gives keys and values.

    Args:
        unet: its cross-attention layers are the sites.
        width: E, width of identity tokens.
        seed: of the random weights.
        options: how the identity joins; default `AttentionOptions()`.
        name: of the system.
    """

    def __init__(
        self, unet: nn.Module, width: int = 12, seed: int = 0, options: Any = None, name: str = "tiny-random"
    ) -> None:
        from ..attention.sites import find_sites
        from ..attention.types import AttentionOptions

        super().__init__()
        self.name = name
        self.options = options or AttentionOptions()
        self.width = width
        self.projections = 0  # how often `project` ran
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = {str(s.index): nn.Linear(width, 2 * s.hidden, bias=False) for s in find_sites(unet)}
        self.layers = nn.ModuleDict(layers).requires_grad_(False)

    def sites(self, unet: nn.Module) -> list[Any]:
        """All cross-attention layers."""
        from ..attention.sites import find_sites

        return find_sites(unet)

    def project(self, site: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[Bi, L, E] -> keys and values [Bi, L, C]"""
        self.projections += 1
        k, v = self.layers[str(site.index)](tokens.to(self.layers[str(site.index)].weight)).chunk(2, -1)
        return k, v

    def identity(self, seed: int = 0, rows: int = 1, length: int = 6, uncond: bool = True) -> Any:
        """An `Identity` of random tokens."""
        from ..identity import Identity

        g = torch.Generator().manual_seed(seed)
        tokens = torch.randn(rows, length, self.width, generator=g)
        plain = torch.randn(1, length, self.width, generator=g) if uncond else None
        return Identity(tokens, plain, self.name)
