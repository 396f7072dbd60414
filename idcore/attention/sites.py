"""Where an identity can enter a diffusers UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .types import Site

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Site", "attention_of", "find_sites", "unwrap"]


def unwrap(model: Any) -> Any:
    """The model inside `torch.compile(model)`; any other object unchanged."""
    return getattr(model, "_orig_mod", model)


def attention_of(unet: nn.Module, site: Site) -> nn.Module:
    """The attention module of a site."""
    return unwrap(unet).get_submodule(site.path)


def find_sites(unet: nn.Module) -> list[Site]:
    """Every cross-attention layer of a diffusers UNet, in `unet.attn_processors` order (down, up, mid).

    Works on any UNet built from diffusers' `Attention` (SD 1.x, SD 2.x, SDXL, inpaint and tiny variants).
    Temporal layers of video UNets (`motion_modules`) are left out: they attend over frames, not text.

    Raises:
        InputError: not a UNet; no cross-attention; or a kind of cross-attention that cannot take an identity.
    """
    unet = unwrap(unet)
    processors = getattr(unet, "attn_processors", None)
    if not isinstance(processors, dict) or not hasattr(unet, "down_blocks") or not hasattr(unet, "up_blocks"):
        raise InputError(
            "find_sites: wanted a diffusers UNet with attn_processors (such as UNet2DConditionModel), "
            f"got {type(unet).__name__}; give pipe.unet"
        )
    sites = []
    for index, name in enumerate(processors):
        if ".motion_modules." in name:
            continue
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if getattr(attn, "is_cross_attention", False):
            sites.append(_site(name, index, attn))
    if not sites:
        raise InputError(
            f"find_sites: {type(unet).__name__} has {len(processors)} attention layers but no cross-attention, "
            "which an identity needs; give a text-conditioned UNet (SD 1.5, SDXL)"
        )
    return sites


def _site(name: str, index: int, attn: nn.Module) -> Site:
    if getattr(attn, "added_kv_proj_dim", None) is not None:
        raise InputError(
            f"find_sites: {name} has added key and value projections (DeepFloyd IF, unCLIP), "
            "which an identity cannot join; use an SD 1.x, SD 2.x or SDXL UNet"
        )
    if attn.inner_kv_dim != attn.inner_dim:
        raise InputError(
            f"find_sites: {name} has {attn.inner_kv_dim} key channels for {attn.inner_dim} query channels "
            "(grouped-query attention), which an identity cannot join"
        )
    return Site(name, index, attn.inner_dim, attn.heads, attn.inner_dim // attn.heads)
