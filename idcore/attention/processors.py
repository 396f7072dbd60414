"""The attention processor that adds identities to one cross-attention layer of a diffusers UNet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import id_attention
from .compose import accepted, added_branches, before_output, kind_of, split_text
from .groups import Group, groups_of
from .text_kv import TextKeys
from .types import Site

if TYPE_CHECKING:
    from .conditioning import Conditioning
    from .stack import IdStack
    from .staged import StagedText


@dataclass(eq=False)
class Binding:
    """What ties a processor to its layer: the stack that it reads, and the processor found there before."""

    stack: IdStack
    site: Site
    found: Any
    kind: str = ""
    accepts: frozenset[str] = field(default_factory=frozenset)
    seen: tuple | None = None  # `TextCall.facts()` of the last eager call
    text: TextKeys = field(default_factory=TextKeys)

    def __post_init__(self) -> None:
        self.kind = kind_of(self.found, self.site.name)
        self.accepts = accepted(self.found)

    def run_found(self, attn: nn.Module, states: Tensor, given: dict[str, Any]) -> Tensor:
        """The layer as if nothing were attached."""
        return self.found(attn, states, **self.pick(given))

    def pick(self, given: dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments that were given and that the found processor takes."""
        takes_all = "kwargs" in self.accepts
        return {k: v for k, v in given.items() if v is not None and k not in but and (k in self.accepts or takes_all)}


class IdAttnProcessor:
    """Text attention and identity attention of one cross-attention layer through one `id_attention` call.

    `attn.to_q`, `to_k`, `to_v` and `to_out` are called as modules, so LoRA (peft) acts as it does without us.
    Over a processor that adds branches of its own (diffusers' IP-Adapter), the result is text + its branches +
    identity, whichever came first; over any other processor that ends in `attn.to_out`, its result + identity.
    Identities always merge with the text attention alone ("ortho" projects on it), so order never matters.

    Made without arguments (as diffusers' loaders do when they copy processors) it is plain text attention until
    the UNet's next forward puts the real one back.
    """

    id_binding: Binding | None = None

    def __init__(self) -> None:
        self.id_binding = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        binding = self.id_binding
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "temb": temb,
            "ip_adapter_masks": ip_adapter_masks,
        }
        if binding is None:
            return _plain()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        active = binding.stack.active(binding.site.name)
        stack = binding.stack
        if not active and stack.tap is None and (stack.staged is None or not _is_staged(binding, given)):
            return binding.run_found(attn, hidden_states, given)
        return _conditioned(binding, active, attn, hidden_states, given)


def _is_staged(binding: Binding, given: dict[str, Any]) -> bool:
    """Whether the text is wide: several encodings of one prompt, of which each stage reads its own."""
    staged = binding.stack.staged_at(binding.site.name)
    text = split_text(binding.found, binding.kind, given["encoder_hidden_states"])[0]
    return staged is not None and staged.is_wide(text)


def make_processor(stack: IdStack, site: Site, found: Any) -> IdAttnProcessor:
    """A processor for one layer, to be put in place of `found`.

    Where `found` is an nn.Module (IP-Adapter), so is the new one, of a class that derives from `found`'s and shares its
    weights and attributes: state dicts keep their keys, `unet.to(...)` moves the weights, and diffusers' own
    `set_ip_adapter_scale` and `unload_ip_adapter` still find what they look for.
    """
    binding = Binding(stack, site, found)
    if not isinstance(found, nn.Module):
        made = IdAttnProcessor()
    else:
        mirrored = {k: _mirror(k) for k in vars(found) if not k.startswith("_")}
        cls = type(f"IdOver{type(found).__name__}", (IdAttnProcessor, type(found)), mirrored)
        made = cls.__new__(cls)
        made.__dict__.update({k: v for k, v in vars(found).items() if k.startswith("_")})
    made.__dict__["id_binding"] = binding
    return made


def _mirror(name: str) -> property:
    def read(self: IdAttnProcessor) -> Any:
        return getattr(self.id_binding.found, name)

    def write(self: IdAttnProcessor, value: Any) -> None:
        setattr(self.id_binding.found, name, value)

    return property(read, write)


def _plain() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def _conditioned(
    binding: Binding, active: list[Conditioning], attn: nn.Module, hidden_states: Tensor, given: dict[str, Any]
) -> Tensor:
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, given["temb"])
    image = hidden_states.shape if hidden_states.ndim == 4 else None
    if image is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    result = _before_output(binding, active, attn, hidden_states, image, given)

    result = attn.to_out[0](result)
    result = attn.to_out[1](result)
    if image is not None:
        result = result.transpose(-1, -2).reshape(image)
    if attn.residual_connection:
        result = result + residual
    # Nearly every layer's factor is 1, and a division is a launch.
    return result if attn.rescale_output_factor == 1 else result / attn.rescale_output_factor


def _before_output(
    binding: Binding,
    active: list[Conditioning],
    attn: nn.Module,
    states: Tensor,
    image: torch.Size | None,
    given: dict[str, Any],
) -> Tensor:
    """Text, found processor's own branches and identities, before the output projection. [B, Lq, C]"""
    found, kind = binding.found, binding.kind
    text, pictures = split_text(found, kind, given["encoder_hidden_states"])
    query = attn.to_q(states)
    staged = binding.stack.staged_at(binding.site.name)
    staged = staged if staged is not None and staged.is_wide(text) else None
    key, value = _text_kv(binding, attn, states, text, staged)
    call = TextCall(attn, query, key, value, given["attention_mask"], staged)
    key = key if staged is None else key[0]  # all that branches beside the text need is its shape
    if binding.stack.tap is not None:
        binding.stack.tap(binding.site.name, call.q, call.k)
    size = None
    if any(c.has_masks for c in active):
        size = binding.stack.size() if image is None else tuple(image[-2:])
    groups = groups_of(active, binding.site.name, call.q, size)
    if not torch.compiler.is_compiling():
        binding.seen = call.facts()
    if kind == "other":
        if staged is not None:
            raise InputError(
                f"{binding.site.name}: {type(found).__name__} cannot read staged text (SeFi-IDE); take it off the layer"
            )
        extra = binding.pick(given, but=("encoder_hidden_states", "attention_mask", "temb"))
        context, mask = given["encoder_hidden_states"], given["attention_mask"]
        total = before_output(found, attn, states, query, context, mask, extra)
    else:
        total = call.joined(groups.pop(0) if groups and not groups[0].conditioning.replaces else None)
    if groups:
        plain = call.joined(None)
        for group in groups:
            total = total + (call.joined(group) - plain)
            if group.conditioning.replaces:
                total = total - group.cover(call.q.shape[0]) * plain
    if kind == "adds":
        extra = binding.pick(given, but=("encoder_hidden_states", "attention_mask", "temb"))
        total = total + added_branches(found, attn, states, query, key, (text, pictures), extra)
    return total


class TextCall:
    """Queries and text of one call, in the form of `id_attention`; of staged text a bank and the stage."""

    def __init__(
        self, attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        staged: StagedText | None = None,
    ) -> None:  # fmt: skip
        alone = staged is not None and len(key) == 1
        self.stage = None if staged is None or alone else staged.stage
        self.backend = None if staged is None else staged.backend
        key, value = (key[0], value[0]) if alone else (key, value)
        self.q, self.k, self.v = (t.unflatten(-1, (attn.heads, -1)).transpose(-3, -2) for t in (query, key, value))
        if attn.norm_q is not None:
            self.q = attn.norm_q(self.q)
        if attn.norm_k is not None:
            self.k = attn.norm_k(self.k)
        self.bias = None
        if mask is not None:
            batch, tokens = key.shape[-3:-1]
            mask = attn.prepare_attention_mask(mask, tokens, batch)
            self.bias = mask.view(batch, attn.heads, -1, mask.shape[-1])

    def joined(self, group: Group | None) -> Tensor:
        """Text attention with a group's identities, heads side by side. [B, Lq, C]"""
        more = {"backend": self.backend} if group is None else group.arguments(self.q.shape[0])
        out = id_attention(self.q, self.k, self.v, text_bias=self.bias, stage=self.stage, **more)
        return out.transpose(1, 2).flatten(2)

    def facts(self) -> tuple:
        """What `explain` needs to know of the last call."""
        grad = torch.is_grad_enabled() and self.q.requires_grad
        return self.q.shape, self.k.shape[-2], self.q.dtype, self.q.device.type, self.bias is not None, grad


def _text_kv(
    binding: Binding, attn: nn.Module, states: Tensor, text: Tensor | None, staged: StagedText | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of the text, once per prompt. [B, Lt, C] twice, of staged text [S, B, Lt, C]"""
    # The layer keeps its fused weights after diffusers' unfuse, so only the processor tells which to use.
    fused = type(binding.found).__name__ == "FusedAttnProcessor2_0"

    def project(source: Tensor) -> tuple[Tensor, Tensor]:
        if staged is not None:
            return staged.project(attn, source, fused)
        return attn.to_kv(source).chunk(2, dim=-1) if fused else (attn.to_k(source), attn.to_v(source))

    if text is None:
        return project(states)
    if attn.norm_cross is not None:
        return project(attn.norm_encoder_hidden_states(text))
    return binding.text.get(text, (attn.to_kv,) if fused else (attn.to_k, attn.to_v), project)
