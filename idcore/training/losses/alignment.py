"""L_align: what inserting an identity may not change of how the UNet answers the text (PuLID, arXiv 2404.16022, 3.4).

Two paths have the same prompt and start from the same noise, one without identity (nothing in it is trained: no
gradient) and one with it. Of every cross-attention layer and step, with q the image queries of a path and k the text's
keys:

    sem    = || softmax(k q_id^T / sqrt d) q_id - softmax(k q^T / sqrt d) q ||     (equation 3)
    layout = || q_id - q ||                                                       (equation 4)
    L_align = 0.6 sem + 0.1 layout                                                (equation 5)

The paper leaves open: q is here the output of `to_q`, each head by itself (equation 2 calls it projected); all text
tokens count, padding too, as the layers attend to it; the norm and the means are chosen by `AlignmentOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.semantic_alignment import semantic_alignment
from .diffusion import safe_sqrt

NORMS = ("mse", "rms", "norm")
ADDED = ("mean", "sum")


@dataclass(frozen=True)
class AlignmentOptions:
    """How distances become one number.

    Attributes:
        semantic, layout: weights (equation 5: 0.6 and 0.1).
        norm: of a sample's difference at one layer, over heads, tokens and channels: "mse" (mean square), "rms" (its
            root), or "norm" (Euclidean, as the paper writes; grows with the size of the layer). Our choice: "mse".
        layers: "mean" or "sum" over the layers. Steps are averaged. Our choice: "mean".
        backend: of `semantic_alignment`; None: the first that can.
    """

    semantic: float = 0.6
    layout: float = 0.1
    norm: str = "mse"
    layers: str = "mean"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("norm", self.norm, NORMS), ("layers", self.layers, ADDED)):
            if value not in allowed:
                raise InputError(f"L_align: {name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("semantic", "layout"):
            if not getattr(self, name) >= 0:
                raise InputError(f"L_align: the weight {name} must be at least 0, got {getattr(self, name)!r}")


@dataclass(eq=False)
class Reference:
    """The path without identity at one step: a tap (`Injection.using`) that keeps each layer's queries and answers.

    Without gradients; what is kept is the size of the queries (118 MB a step for SDXL at 768 px in 16 bit).
    """

    options: AlignmentOptions
    queries: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, q: Tensor, k: Tensor) -> None:
        q, k = q.detach(), k.detach()
        if self.options.layout:
            self.queries[name] = q
        if self.options.semantic:
            self.answers[name] = semantic_alignment(q, k, backend=self.options.backend)


class Comparison:
    """The path with identity at the same step: a tap that compares each layer with the reference on the spot, so that
    no queries are kept beyond those that attention keeps anyway.

    When a checkpointed part of the UNet is recomputed, a layer comes again; its first result counts.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference, self.options = reference, reference.options
        self._terms: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def __call__(self, name: str, q: Tensor, k: Tensor) -> None:
        semantic = layout = None
        if self.options.semantic:
            answer = semantic_alignment(q, k, backend=self.options.backend)
            semantic = self._distance(answer, self.reference.answers[name])
        if self.options.layout:
            layout = self._distance(q, self.reference.queries[name])
        if name not in self._terms:
            self._terms[name] = semantic, layout

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[B]"""
        square = _SquaredDistance.apply(a, b)
        if self.options.norm == "norm":
            return safe_sqrt(square)
        mean = square / a[0].numel()
        return mean if self.options.norm == "mse" else safe_sqrt(mean)

    def totals(self) -> dict[str, Tensor]:
        """ "semantic" and "layout" [B] over all layers, not weighted; what has weight 0 is left out."""
        if not self._terms:
            raise InputError("L_align: no layer was seen; run a pass of the UNet with this tap first")
        found = {}
        for i, name in enumerate(("semantic", "layout")):
            terms = [t[i] for t in self._terms.values() if t[i] is not None]
            if terms:
                total = torch.stack(terms).sum(0)
                found[name] = total / len(terms) if self.options.layers == "mean" else total
        return found


def alignment_loss(totals: Mapping[str, Tensor], options: AlignmentOptions) -> Tensor:
    """Equation 5: the mean over the samples of the weighted terms [B]."""
    weights = {"semantic": options.semantic, "layout": options.layout}
    return sum(weights[name] * each.mean() for name, each in totals.items())


class _SquaredDistance(torch.autograd.Function):
    """Sum of squares of a - b per sample [B], float32 or wider. Keeps a and b themselves, which attention keeps
    anyway, in place of their difference; b gets no gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        wide = torch.promote_types(a.dtype, torch.float32)
        return (a.to(wide) - b.to(wide)).square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors
        scale = (2 * g).view(-1, *[1] * (a.dim() - 1))
        return ((a.to(g.dtype) - b.to(g.dtype)) * scale).to(a.dtype), None
