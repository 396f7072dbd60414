"""`stage_tokens` in plain PyTorch, forward and backward; any device and dtype, the truth of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import rows

NAME = "reference"


def why_not(device: str, dtype: torch.dtype) -> list[str]:
    """Nothing is refused."""
    return []


def _targets(positions: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Index of sample and row per placeholder, [B, T] each; a left out one points behind the last row."""
    at = rows(positions.long(), batch)
    at = torch.where(at < 0, length, at)
    return torch.arange(batch, device=at.device)[:, None].expand_as(at), at


def _picked(tokens: Tensor, stage: Tensor | None, batch: int) -> Tensor:
    """Each sample's tokens. [S, B, T, E], or [1, B, T, E] of its stage"""
    count, bt = tokens.shape[:2]
    if stage is None:
        return rows(tokens.transpose(0, 1), batch).transpose(0, 1)
    s = stage.long().clamp(0, count - 1).expand(batch)
    return tokens[s, torch.arange(batch, device=s.device) * bt // batch][None]


def forward(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None) -> Tensor:
    """[S, B, L, E], or [B, L, E] where a stage is picked; dtype of `embeddings`."""
    b, length, _ = embeddings.shape
    picked = _picked(tokens, stage, b)
    out = torch.nn.functional.pad(embeddings, (0, 0, 0, 1)).expand(picked.shape[0], -1, -1, -1).clone()
    sample, at = _targets(positions, b, length)
    out[:, sample, at] = picked.to(out.dtype)
    out = out[:, :, :length]
    return (out if stage is None else out[0]).contiguous()


def backward(
    g: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, *, embeddings: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the embeddings [B, L, E] (None if not asked for) and of the tokens, in the dtype of `tokens`.

    Args:
        g: gradient of the result of `forward`.
    """
    g = g if stage is None else g[None]
    _, b, length, _ = g.shape
    sample, at = _targets(positions, b, length)
    padded = torch.nn.functional.pad(g, (0, 0, 0, 1))
    per_sample = padded[:, sample, at].float() if g.dtype != torch.float64 else padded[:, sample, at]
    count, bt = tokens.shape[:2]
    owner = torch.arange(b, device=g.device) * bt // b
    bank = per_sample.new_zeros(tokens.shape)
    if stage is None:
        bank.index_add_(1, owner, per_sample)
    else:
        s = stage.long().clamp(0, count - 1).expand(b)
        bank.index_put_((s, owner), per_sample[0], accumulate=True)
    if not embeddings:
        return None, bank.to(tokens.dtype)
    padded[:, sample, at] = 0
    return padded[:, :, :length].sum(0).contiguous(), bank.to(tokens.dtype)
