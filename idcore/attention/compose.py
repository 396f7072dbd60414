"""Running the processor found at a layer up to, but without, the output projection."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

# Processors that compute nothing but text attention: one `id_attention` call does their work.
_TEXT = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
    "AttnProcessorNPU",
)
# Processors that add branches of their own to the text attention.
_ADDS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
# Processors with projections of their own in place of the layer's.
_REFUSED = ("CustomDiffusionAttnProcessor", "CustomDiffusionXFormersAttnProcessor", "CustomDiffusionAttnProcessor2_0")

_MODULE = "diffusers.models.attention_processor"


def kind_of(processor: Any, where: str) -> str:
    """How an identity joins this processor: "text" (replaced), "adds" (its branches are added) or "other".

    Only diffusers' own classes count as known, by exact type: a subclass may do anything.

    Raises:
        InputError: a processor that brings projections of its own.
    """
    cls = type(processor)
    name = cls.__name__ if cls.__module__ == _MODULE else ""
    if name in _REFUSED:
        raise InputError(
            f"attach: {where} holds {name}, which replaces the layer's own query and output projections; an identity "
            "cannot join it. Load such weights as LoRA, or restore the layer with unet.set_attn_processor first"
        )
    if name in _TEXT:
        return "text"
    return "adds" if name in _ADDS else "other"


def accepted(processor: Any) -> frozenset[str]:
    """Names of the arguments that a processor takes."""
    return frozenset(inspect.signature(processor.__call__).parameters)


def split_text(processor: Any, kind: str, states: Any) -> tuple[Tensor | None, Any]:
    """Text states and the image states that diffusers' IP-Adapter carries beside them (None: there are none)."""
    if isinstance(states, tuple):
        return states[0], states[1]
    if kind == "adds" and states is not None:
        end = states.shape[1] - processor.num_tokens[0]
        return states[:, :end], [states[:, end:]]
    return states, None


class _Inner:
    """Stands for the attention layer inside a found processor: no norms, no output projection, no residual.

    The layer's real queries (and, for processors that add branches, its keys) are handed out instead of being
    projected again. `values` None calls the real projection.
    """

    def __init__(self, attn: nn.Module, states: Tensor, query: Tensor, key: Tensor | None) -> None:
        self.attn = attn
        self.states, self.query, self.key = states, query, key
        self.spatial_norm = None
        self.group_norm = None
        self.residual_connection = False
        self.rescale_output_factor = 1.0
        self.reached_output = False
        self.to_out = (self._out, _same)
        self.norm_cross = attn.norm_cross if key is None else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)

    def to_q(self, states: Tensor) -> Tensor:
        return self.query if states is self.states else self.attn.to_q(states)

    def to_k(self, states: Tensor) -> Tensor:
        return self.attn.to_k(states) if self.key is None else self.key

    def to_v(self, states: Tensor) -> Tensor:
        # Values of zero leave exactly the branches that the processor adds to its text attention.
        return self.attn.to_v(states) if self.key is None else torch.zeros_like(self.key)

    def _out(self, x: Tensor) -> Tensor:
        self.reached_output = True
        return x


def _same(x: Tensor) -> Tensor:
    return x


def added_branches(
    processor: Any, attn: nn.Module, states: Tensor, query: Tensor, key: Tensor, encoder_states: Any, extra: dict
) -> Tensor:
    """What an IP-Adapter processor adds to the text attention, before the output projection. [B, Lq, C]"""
    inner = _Inner(attn, states, query, key)
    return processor(inner, states, encoder_hidden_states=encoder_states, **extra)


def before_output(
    processor: Any, attn: nn.Module, states: Tensor, query: Tensor, encoder_states: Any, bias: Any, extra: dict
) -> Tensor:
    """What any processor computes before the output projection. [B, Lq, C]

    Raises:
        InputError: the processor does not end in the layer's own `to_out`, so that its inside cannot be reached.
    """
    inner = _Inner(attn, states, query, None)
    result = processor(inner, states, encoder_hidden_states=encoder_states, attention_mask=bias, **extra)
    if not inner.reached_output or result.shape != query.shape:
        raise InputError(
            f"id_attention: {type(processor).__name__} does not pass its result of shape {list(query.shape)} through "
            "attn.to_out[0], so an identity cannot join it; detach, or put a processor that does on the layer"
        )
    return result
