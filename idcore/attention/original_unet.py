"""Identities on UNets in the original layout (`input_blocks`, `middle_block`, `output_blocks`), as ComfyUI runs them.

Such a host does not let us put processors on layers; it calls a function in place of a layer's attention, with queries,
keys and values [B, L, C] and a dictionary about the pass. `LayerPatch` is that function. Only published names of that
interface are used, nothing of the host is imported.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import id_attention
from .conditioning import Conditioning
from .groups import Group, groups_of
from .guidance import ROWS
from .kv_bank import people_of
from .types import Site

Attention = Callable[..., Tensor]  # f(q, k, v, options, mask=None) -> [B, Lq, C]
_rows: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("rows")


class Place(NamedTuple):
    """A cross-attention layer: side ("input", "middle", "output"), block, transformer of the block."""

    side: str
    block: int
    index: int


def original_sites(unet: Any) -> dict[Place, Site]:
    """Every cross-attention layer of a UNet in the original layout, with the index that it has in diffusers' order.

    diffusers counts down, up, middle, each transformer with its self-attention first; so do published adapter weights.

    Raises:
        InputError: not such a UNet, or one without cross-attention.
    """
    if not all(hasattr(unet, n) for n in ("input_blocks", "middle_block", "output_blocks")):
        raise InputError(
            f"wanted a UNet with input_blocks, middle_block and output_blocks (SD 1.x, SD 2.x, SDXL), got "
            f"{type(unet).__name__}: identities of these systems do not fit other kinds of models"
        )
    found = [(place, transformer.attn2) for place, _, transformer in _transformers(unet)]
    if not found:
        raise InputError(f"{type(unet).__name__} has no cross-attention, which an identity needs")
    return {
        place: Site(".".join(map(str, place)), 2 * n + 1, attn.heads * attn.dim_head, attn.heads, attn.dim_head)
        for n, (place, attn) in enumerate(found)
    }


def attention_paths(unet: Any) -> list[str]:
    """Module paths of all attention layers of a UNet in the original layout, self-attentions too, in the order in which
    diffusers counts them ("input_blocks.4.1.transformer_blocks.0.attn1")."""
    return [f"{path}.{name}" for _, path, _ in _transformers(unet) for name in ("attn1", "attn2")]


def _transformers(unet: Any) -> Iterator[tuple[Place, str, Any]]:
    """Place, module path and module of every transformer, in diffusers' order."""
    sides = (("input", unet.input_blocks), ("output", unet.output_blocks), ("middle", [unet.middle_block]))
    for side, blocks in sides:
        for i, block in enumerate(blocks):
            where = "middle_block" if side == "middle" else f"{side}_blocks.{i}"
            for n, layer in enumerate(block):
                for j, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                    yield Place(side, i, j), f"{where}.{n}.transformer_blocks.{j}", transformer


@dataclass(eq=False)
class Applied:
    """Identities with their strength, place and time.

    Attributes:
        conditioning: identities, scales and masks.
        sigmas: from which (high) to which noise level (low) they act, both included.
    """

    conditioning: Conditioning
    sigmas: tuple[float, float] = (float("inf"), 0.0)
    _seen: tuple[Any, bool] = field(default=(None, True), repr=False)

    @classmethod
    def of(
        cls,
        system: Any,
        identity: Any,
        sites: Sequence[Site],
        *,
        id_scale: Any = 1.0,
        id_mask: Any = None,
        sigmas: tuple[float, float] = (float("inf"), 0.0),
        backend: str | None = None,
        **options: Any,
    ) -> Applied:
        """Arguments as `idcore.attach`'s; `sites` of `original_sites`. Raises InputError where they do not fit."""
        people = people_of(identity, system)
        c = Conditioning(system, people, sites, system.options.updated(**options), _rows.get, backend)
        c.set_scale(id_scale)
        c.set_masks(id_mask)
        return cls(c, sigmas)

    def acts(self, sigma: Tensor | None) -> bool:
        """Whether a pass at this noise level is one of theirs; the tensor is read once per pass."""
        if sigma is None or self.sigmas == (float("inf"), 0.0):
            return True
        if self._seen[0] is not sigma:
            high, low = self.sigmas
            self._seen = (sigma, bool(low <= float(sigma.reshape(-1)[0]) <= high))
        return self._seen[1]


class LayerPatch:
    """Stands in for the attention of one cross-attention layer: text and identities in one `id_attention` call.

    Args:
        name: of the site.
        applied: identities, in the order in which they were applied; they add up.
        plain: the host's own attention, where no identity acts.
        found: a replacement that stood there before; the identities are added to its result.
    """

    def __init__(self, name: str, applied: Sequence[Applied], plain: Attention, found: Attention | None = None) -> None:
        self.name, self.applied, self.plain, self.found = name, tuple(applied), plain, found

    def __deepcopy__(self, memo: dict) -> LayerPatch:
        return self  # never changed once made; hosts copy their options deeply

    def with_applied(self, more: Applied) -> LayerPatch:
        """The same with one more."""
        return LayerPatch(self.name, (*self.applied, more), self.plain, self.found)

    def to(self, device: Any) -> LayerPatch:
        """Called by the host when it moves a model: keys and values are made anew where they are needed next."""
        if isinstance(device, (torch.device, str)):
            self.forget()
        return self

    def forget(self) -> None:
        """Drop keys and values of the identities."""
        for a in self.applied:
            a.conditioning.bank.forget()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
        """[B, Lq, C], [B, Lt, C] twice, about the pass -> [B, Lq, C], before the output projection."""
        sigma = options.get("sigmas")
        active = [a.conditioning for a in self.applied if a.acts(sigma) and not a.conditioning.is_off(self.name)]
        extra = {} if mask is None else {"mask": mask}
        if not active:
            return (
                self.plain(q, k, v, options, **extra) if self.found is None else self.found(q, k, v, options, **extra)
            )
        token = _rows.set(_rows_of(options))
        try:
            return self._joined(active, q, k, v, options, extra)
        finally:
            _rows.reset(token)

    def _joined(
        self,
        active: list[Conditioning],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        extra: dict[str, Any],
    ) -> Tensor:
        heads = options["n_heads"]
        hq, hk, hv = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        shape = options.get("original_shape")
        groups = groups_of(active, self.name, hq, None if shape is None else tuple(shape[-2:]))

        def run(group: Group | None) -> Tensor:
            more = {} if group is None else group.arguments(q.shape[0])
            made = id_attention(hq, hk, hv, text_bias=_bias(extra.get("mask"), hq), **more)
            return made.transpose(1, 2).flatten(2)

        total = run(groups.pop(0)) if self.found is None else self.found(q, k, v, options, **extra)
        if groups:
            text = run(None)
            for group in groups:
                total = total + (run(group) - text)
        return total


def apply_to(
    replaced: dict[Any, Attention], sites: dict[Place, Site], applied: Applied, plain: Attention
) -> dict[Place, LayerPatch]:
    """What to put at which layer so that one more identity acts.

    Args:
        replaced: what the host has in place of cross-attentions: by (side, block, index), or (side, block) for all
            transformers of a block.
        sites: of `original_sites`.
        applied: the new one.
        plain: the host's own attention.
    """
    patches = {}
    for place, site in sites.items():
        there = replaced.get(tuple(place), replaced.get(tuple(place[:2])))
        if isinstance(there, LayerPatch):
            patches[place] = there.with_applied(applied)
        else:
            patches[place] = LayerPatch(site.name, (applied,), plain, there)
    return patches


def without_ours(replaced: dict[Any, Attention]) -> dict[Any, Attention]:
    """What the host has in place of cross-attentions, as it was before identities were applied."""
    left = {}
    for key, patch in replaced.items():
        if not isinstance(patch, LayerPatch):
            left[key] = patch
        elif patch.found is not None and patch.found is not replaced.get(key[:2]):
            left[key] = patch.found
    return left


def _rows_of(options: dict[str, Any]) -> tuple[str, ...]:
    """ComfyUI's parts of a batch, 0 for cond and 1 for uncond, in our words."""
    return tuple(ROWS[0 if part else 1] for part in options.get("cond_or_uncond") or (0,))


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A host's attention mask, bool or additive, [.., Lq or 1, Lt], as a bias [1 or B, 1 or H, 1 or Lq, Lt]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())] if mask.dim() < 3 else mask[:, None]
