"""Attention for the training: the same mathematics as `id_attention(merge="add")`, as plain matrix products.

At 64 image tokens PyTorch's fused CPU attention is slower in its backward pass than these products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.sites import find_sites
from ...sampling.tiny_model import TinyModel
from ...systems.tiny import TinySystem


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, -1)
    return weights.to(v.dtype) @ v


class TrainingProcessor:
    """A diffusers attention processor; `identity` is (k, v, keep) for cross-attention, or None."""

    def __init__(self) -> None:
        self.identity: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kwargs
    ):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q = split(attn.to_q(hidden_states))
        out = _attend(q, split(attn.to_k(context)), split(attn.to_v(context)))
        if self.identity is not None:
            k, v, keep = self.identity
            out = out + _attend(q, split(k), split(v)) * keep.view(-1, 1, 1, 1).to(out.dtype)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden_states.dtype))


def put_processors(model: TinyModel) -> list[TrainingProcessor]:
    """Put training processors on the whole UNet; returns those of the identity's sites, in order."""
    names = [s.name for s in find_sites(model.unet)]
    processors = {name: TrainingProcessor() for name in model.unet.attn_processors}
    model.unet.set_attn_processor(dict(processors))
    return [processors[name] for name in names]


def set_identity(processors: list[TrainingProcessor], system: TinySystem, tokens: Tensor, keep: Tensor) -> None:
    """Project the tokens for every site; keep [B]: 0 leaves a sample without identity."""
    for k, processor in enumerate(processors):
        processor.identity = (*system._project(k, tokens), keep)
