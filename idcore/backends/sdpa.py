"""`id_attention` on PyTorch's own attention: text through its fused kernel, identity by two small matmuls.

Differentiable, compiles without a graph break, runs wherever PyTorch does. Identity tokens are few (4 to a few
hundred), so their score matrix is small; zero tokens stay in closed form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference as ref
from .call import Args, Call

NAME = "sdpa"
DIFFERENTIABLE = True


def why_not(call: Call) -> list[str]:
    """float64 is left to the reference, whose arithmetic it follows."""
    reasons = []
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"dtype={call.dtype} (needs float32, bfloat16 or float16)")
    return reasons


def _branch(a: Args, j: int) -> tuple[Tensor, Tensor | None]:
    b = a.q.shape[0]
    raw = (a.q @ ref.rows(a.k_id[j], b).transpose(-1, -2)).float()
    p, _ = ref.zero_softmax(raw * a.q.shape[-1] ** -0.5, a.num_zero)
    share = ref.global_share(a, raw)[0] if a.merge == "ortho_v2" else None
    return p.to(a.q.dtype) @ ref.rows(a.v_id[j], b), share


def forward(a: Args, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q. Text attention accumulates as PyTorch's kernel does, the merge in float32."""
    bias = None if a.text_bias is None else a.text_bias.to(a.q.dtype)
    h = F.scaled_dot_product_attention(a.q, ref.text_rows(a, a.k_text), ref.text_rows(a, a.v_text), attn_mask=bias)
    if not a.k_id:
        return ref.store(h, a.q, out)
    parts = [(i.float(), share) for i, share in (_branch(a, j) for j in range(len(a.k_id)))]
    return ref.store(ref.combine(a, h.float(), parts), a.q, out)
