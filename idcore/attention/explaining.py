"""Telling what is attached, and whether a named backend can run it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..backends.call import Call
from ..errors import InputError
from ..ops import dispatch
from .conditioning import Conditioning
from .types import Site


def check_backend(unet: nn.Module, c: Conditioning, place: tuple[torch.dtype, torch.device] | None) -> None:
    """Raise `NoBackendError` now if a backend that was named cannot run the layers of this UNet.

    Sizes that show only at a call (batch, image and text tokens) are assumed to be usual ones; the call itself
    checks the real ones.
    """
    dispatch.check_name(c.backend)
    if c.backend is None or place is None:
        return
    for site in _distinct(c.sites.values()):
        dispatch.choose(_expected(unet, site, c, *place), c.backend)


def describe(unet: nn.Module, stack: Any, c: Conditioning, attached: bool) -> str:
    """See `Handle.explain`."""
    total = len(c.sites)
    lines = [
        f"{c.system.name} on {type(unet).__name__}: {total} cross-attention layers, "
        + ("attached" if attached else "detached"),
        _people(c),
        f"  merge {c.options.merge}, num_zero {c.options.num_zero}, num_global {c.options.num_global}; {_guidance(c)}",
    ]
    if len(stack.layers) > 1 and attached:
        names = ", ".join(x.system.name for x in stack.layers)
        lines.append(f"  {len(stack.layers)} attaches on this UNet: {names}")
    reports: dict[str, list[int]] = {}
    for site in c.sites.values():
        lines.append(_layer(unet, stack, c, site, reports))
    for report, indices in reports.items():
        lines.append(f"  backends of layers {', '.join(map(str, indices))}:")
        lines += [f"    {line}" for line in report.splitlines()]
    return "\n".join(lines)


def _people(c: Conditioning) -> str:
    tokens = ", ".join(f"{p.tokens.shape[1]} tokens" + _rows(p) for p in c.people)
    masks = "".join("-" if m is None else "m" for m in c.masks.given)
    told = f"; masks {masks}" if c.has_masks else ""
    return f"  {len(c.people)} identities ({tokens}){told}"


def _rows(person: Any) -> str:
    count = person.tokens.shape[0]
    silent = getattr(person, "uncond_tokens", None) is None
    return (f" x {count} images" if count > 1 else "") + (", cond only" if silent else "")


def _guidance(c: Conditioning) -> str:
    try:
        return f"batch parts now: {', '.join(c.rows())}"
    except InputError:  # no call yet, or the pipeline is gone; the next forward says which
        return "batch parts: told by the pipeline at each call"


def _layer(unet: nn.Module, stack: Any, c: Conditioning, site: Site, reports: dict[str, list[int]]) -> str:
    scale = "tensor" if c.floats is None else ", ".join(f"{s:g}" for s in c.floats[site.name])
    slot = stack.slots.get(site.name)
    under = "nothing"
    if slot is not None:
        binding = slot[2].id_binding
        under = f"{type(binding.found).__name__} ({_KINDS[binding.kind]})"
    if c.is_off(site.name):
        backend = "skipped"
    else:
        call = _call(unet, stack, c, site)
        backend = _pick(call, c.backend)
        reports.setdefault(_report(call, c.backend), []).append(site.index)
    return (
        f"  {site.index:>3} {site.path}: C {site.hidden} = {site.heads} x {site.head_dim}, scale {scale}, "
        f"{backend}, over {under}"
    )


_KINDS = {"text": "replaced", "adds": "its branches added", "other": "its result added to"}


def _pick(call: Call, backend: str | None) -> str:
    for name in (backend,) if backend else dispatch.ORDER:
        if not dispatch.why_not(name, call):
            return name
    return "no backend"


def _report(call: Call, backend: str | None) -> str:
    if backend is None:
        return dispatch.explain(call)
    reasons = dispatch.why_not(backend, call)
    return f"{backend} (named in attach): {'; '.join(reasons) if reasons else 'runs this call'}"


def _call(unet: nn.Module, stack: Any, c: Conditioning, site: Site) -> Call:
    """Facts of the layer's last call; of an expected one before the first."""
    slot = stack.slots.get(site.name)
    seen = slot[2].id_binding.seen if slot is not None else None
    if seen is None:
        weight = next(unet.get_submodule(site.path).to_q.parameters())
        return _expected(unet, site, c, weight.dtype, weight.device)
    (batch, heads, lq, head_dim), lt, dtype, device, bias, grad = seen
    return Call(device, dtype, batch, heads, lq, lt, head_dim, _lengths(c), c.options.merge, c.has_masks, bias, grad,
                grad and bias, True)  # fmt: skip


def _expected(unet: nn.Module, site: Site, c: Conditioning, dtype: torch.dtype, device: torch.device) -> Call:
    size = getattr(getattr(unet, "config", None), "sample_size", None)
    side = size if isinstance(size, int) else 64
    return Call(device.type, dtype, 2, site.heads, side * side, 77, site.head_dim, _lengths(c), c.options.merge,
                c.has_masks, False, False, False, True)  # fmt: skip


def _lengths(c: Conditioning) -> tuple[int, ...]:
    return tuple(p.tokens.shape[1] for p in c.people)


def _distinct(sites: Iterable[Site]) -> list[Site]:
    return list({(s.heads, s.head_dim): s for s in sites}.values())
