"""The network that expands one word to the words of all stages (SeFi-IDE's "Self-Attention" module)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.dropout(self.to_out(out.transpose(-3, -2).flatten(-2)))


class StageExpander(nn.Module):
    """One embedding to `count` words [count, E].

    SeFi-IDE draws a self-attention module and prints no sizes. These are ProSpect's, whose ten words it divides into
    five pairs: two self-attentions, then a gated feed-forward whose output is all words; 8 heads of 64, dropout 0.1.
    Our choice: the words are the start plus what the network gives, and its last layer begins at 0, so that training
    begins at the class word.

    Args:
        start: The embedding [E], e.g. of "person"; kept as a buffer.
        count: Words.
        heads, head_dim, dropout: Of the self-attentions.
        residual: Add the start to every word, and begin there.
    """

    def __init__(
        self,
        start: Tensor,
        count: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        dropout: float = 0.1,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.count, self.width, self.residual = count, start.numel(), residual
        width = self.width
        self.register_buffer("start", start.detach().float().reshape(width).clone())
        self.attention1 = _SelfAttention(width, heads, head_dim, dropout)
        self.attention2 = _SelfAttention(width, heads, head_dim, dropout)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 8 * width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * width, count * width)
        if residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """Words [count, E], with gradients."""
        x = self.attention2(self.attention1(self.start[None]))
        value, gate = self.gate(self.norm(x)).chunk(2, -1)
        words = self.out(self.dropout(value * F.gelu(gate))).view(self.count, self.width)
        return words + self.start if self.residual else words

    def extra_repr(self) -> str:
        return f"{self.count} words of {self.width}, residual {self.residual}"
