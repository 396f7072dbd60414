"""Which of the identities on a layer one `id_attention` call can serve together, and its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops.id_attention import numbers

if TYPE_CHECKING:
    from .conditioning import Branch, Conditioning


class Group(NamedTuple):
    """Identities with the same options and backend: one op call."""

    conditioning: Conditioning  # the first of the group; options and backend are the same for all
    branches: list[Branch]

    def arguments(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of `id_attention`."""
        masks = [m for b in self.branches for m in (b.mask or [None] * len(b.k))]
        options = self.conditioning.options
        return {
            "k_id": [k for b in self.branches for k in b.k],
            "v_id": [v for b in self.branches for v in b.v],
            "id_scale": self._scale(batch),
            "id_mask": masks if any(m is not None for m in masks) else None,
            "merge": options.merge,
            "num_zero": options.num_zero,
            "num_global": options.num_global,
            "backend": self.conditioning.backend,
        }

    def cover(self, batch: int) -> Any:
        """Sum over the identities of scale times mask: a number, or what multiplies [B, Lq, C]."""
        given = self.arguments(batch)
        total: Any = 0.0
        for j, mask in enumerate(given["id_mask"] or [None] * len(given["k_id"])):
            scale = given["id_scale"][j]
            if isinstance(scale, Tensor):
                scale = scale.reshape(-1, 1, 1)
            total = total + (scale if mask is None else scale * mask.to(self.branches[0].k[0].dtype)[..., None])
        return total.to(self.branches[0].k[0].dtype) if isinstance(total, Tensor) else total

    def _scale(self, batch: int) -> Any:
        scales = [b.scale for b in self.branches]
        if all(isinstance(s, tuple) for s in scales):
            return [x for s in scales for x in s]
        if len(scales) == 1:
            return scales[0]
        device = self.branches[0].k[0].device
        wide = []
        for s in scales:
            t = s if isinstance(s, Tensor) else numbers(s, device)
            wide.append(t if t.dim() == 2 else t[:, None].expand(-1, batch))
        return torch.cat(wide)


def groups_of(active: list[Conditioning], name: str, q: Tensor, size: tuple[int, int] | None) -> list[Group]:
    """Conditionings that one op call can serve together, in order; those that take the place of the text come last."""
    groups: dict[Any, Group] = {}
    for c in active:
        group = groups.setdefault((c.options, c.backend, c.replaces), Group(c, []))
        group.branches.append(c.branch(name, q, size))
    return sorted(groups.values(), key=lambda g: g.conditioning.replaces)
