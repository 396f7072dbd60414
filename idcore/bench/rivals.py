"""What whole-UNet timings compare with: PuLID as an ordinary attention processor, and our own text attention.

`EagerIdProcessor` is our own clean form of what published SDXL pipelines do at every step: the identity's keys and
values are projected anew from float32 weights, zero tokens are concatenated, and the core is `idcore.testing.eager`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention.types import AttentionOptions
from ..ops import id_attention
from ..testing.eager import eager_id_attention


class EagerIdProcessor:
    """One cross-attention layer with one identity.

    Args:
        to_k, to_v: the identity's projections [C, E], float32.
        tokens: [Bi, Li, E] float32.
        options: merge, zero tokens, counted tokens.
        id_scale: strength.
    """

    def __init__(
        self, to_k: Tensor, to_v: Tensor, tokens: Tensor, options: AttentionOptions, id_scale: float = 0.8
    ) -> None:
        self.to_k, self.to_v, self.tokens, self.options, self.id_scale = to_k, to_v, tokens, options, id_scale

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = attn.to_q(hidden_states)
        k, v = (heads(project(encoder_hidden_states)) for project in (attn.to_k, attn.to_v))
        k_id, v_id = (heads((self.tokens @ w.T).to(q.dtype)) for w in (self.to_k, self.to_v))
        o = self.options
        out = eager_id_attention(
            heads(q), k, v, [k_id], [v_id], id_scale=[self.id_scale], merge=o.merge, num_zero=o.num_zero,
            num_global=o.num_global,
        )  # fmt: skip
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out / attn.rescale_output_factor


class TextOnlyProcessor:
    """Text attention alone through our own op; keys and values are kept while the prompt is the same tensor."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        if self._of is not encoder_hidden_states:
            self._of = encoder_hidden_states
            self._kept = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(hidden_states), *self._kept))
        out = attn.to_out[1](attn.to_out[0](id_attention(q, k, v).transpose(1, 2).flatten(2)))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor
