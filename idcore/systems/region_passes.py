"""Prompts for parts of a picture, each in a row of its own: predicted for the whole picture, put together by masks.

Multi-StyleForge (arXiv 2404.05256) keeps people and backgrounds in one prompt or two; where the second is read is our
choice. Texts for regions in the attention (`systems.region_text`) share every other layer, and there a text that says
"nobody" takes the person beside it, too: convolutions and self-attention carry it over. Here every text has the whole
UNet to itself, and in each step

    prediction = sum_j w_j prediction(text j)        w_0 = 1 - sum_j w_j: the prompt's

as MultiDiffusion (arXiv 2302.08113) joins diffusion paths. Each text costs a row of the UNet's batch per picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.attention.guidance import guidance_rows
from idcore.attention.masks import read_masks
from idcore.attention.running import Running
from idcore.attention.sites import unwrap
from idcore.errors import InputError
from idcore.systems.region_text import encoded, shared_out, texts_checked

GROWN = 128  # cells of the longer side on which masks are grown
# Arguments of diffusers' UNets with a row per sample, beside the first two.
_ROWS = (
    "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask", "mid_block_additional_residual",
    "down_block_additional_residuals", "down_intrablock_additional_residuals",
)  # fmt: skip


def attach_passes(pipe: Any, prompts: Sequence[str], masks: Any, *, cfg: Any = "auto") -> PassesHandle:
    """Let parts of the pictures be predicted by prompts of their own.

    Words, LoRA and identities that are on the pipeline act in these predictions too, so put words and LoRA on before.
    People of SeFi-IDE may be named here as in the main prompt.
    The unconditional half of guidance reads the negative prompt everywhere; SDXL's pooled text is each prompt's own.

    Args:
        pipe: A diffusers pipeline (SD 1.x, SD 2.x, SDXL, also their image-to-image forms), or an `IDPipeline`.
        prompts: n texts, for all pictures of a call.
        masks: Where they are read, one each; the forms of `Handle.masks`, one for all pictures. Where masks overlap,
            their sum is brought down to 1.
        cfg: As in `idcore.attach`.

    Raises:
        InputError: as `attach_texts`; masks of several pictures; an `IDPipeline` that plays a recorded graph; or the
            UNet has others of this kind on it.
    """
    prompts = texts_checked(prompts)
    if getattr(pipe, "runner", None) == "graph":
        raise InputError('texts for regions: runner="graph" plays what it recorded; use runner="eager" with them')
    unet = unwrap(pipe.unet)
    if any(isinstance(getattr(h, "__self__", None), PassesHandle) for h in unet._forward_pre_hooks.values()):
        raise InputError("texts for regions: the UNet has some on it already; detach them, or give all texts at once")
    where = shared_out(read_masks(masks, len(prompts)))
    if any(m is not None and m.shape[0] > 1 for m in where):
        raise InputError("texts for regions: wanted masks [H, W] that serve all pictures, got one per picture")
    where = [torch.ones(1, 1, 1) if m is None else m for m in where]
    running = Running(pipe)
    texts = [encoded(pipe, p, staged=True) for p in prompts]
    return PassesHandle(unet, texts, where, guidance_rows(cfg, running), running)


class PassesHandle:
    """Texts on a UNet; a context manager that takes them off at its end."""

    def __init__(
        self, unet: nn.Module, texts: Sequence[tuple[Tensor, Tensor | None]], masks: Sequence[Tensor], rows: Any,
        running: Running,
    ) -> None:  # fmt: skip
        self._texts, self._masks, self._rows, self._running = list(texts), list(masks), rows, running
        self._read: tuple[Tensor, Tensor] | None = None  # a pass's text as given, and with the others
        self._shares: Tensor | None = None  # of the texts in the latest pass's prediction, [1 + n, 1, h, w]
        self._hooks = [
            unet.register_forward_pre_hook(self._widen, with_kwargs=True, prepend=True),
            unet.register_forward_hook(self._join),
        ]

    def __enter__(self) -> PassesHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the texts off. May be called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._read, self._shares = [], None, None

    @property
    def _times(self) -> int:
        return 1 + len(self._texts)

    def _widen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The UNet's pre-hook: each sample once per text, beside each other."""
        self._running.look(module)
        names = ("sample", "timestep", "encoder_hidden_states")
        given = dict(zip(names, args)) | kwargs
        batch = given["sample"].shape[0]
        if batch % len(self._rows()):
            raise InputError(f"texts for regions: guidance says {self._rows()}, got a batch of {batch}; give cfg=...")
        for name in ("sample", "timestep", *_ROWS):
            given[name] = self._repeated(given.get(name), batch)
        given["encoder_hidden_states"] = self._all_texts(given["encoder_hidden_states"], batch)
        if given.get("added_cond_kwargs"):
            given["added_cond_kwargs"] = self._added(given["added_cond_kwargs"], batch)
        rest = {k: v for k, v in given.items() if k not in names and (v is not None or k in kwargs)}
        return tuple(given[n] for n in names) + args[3:], rest

    def _repeated(self, value: Any, batch: int) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._repeated(v, batch) for v in value)
        rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value.repeat_interleave(self._times, 0) if rows else value

    def _all_texts(self, text: Tensor, batch: int) -> Tensor:
        """Kept as long as the very same tensor comes, so that layers see that it is unchanged."""
        read = self._read
        if read is None or read[0] is not text:
            wide = _widened(text, max(t.shape[-1] for t in (text, *(t for t, _ in self._texts))))
            wide = wide.repeat_interleave(self._times * batch // text.shape[0], 0)
            read = self._read = text, self._with_others(wide, [t for t, _ in self._texts])
        return read[1]

    def _added(self, added: dict[str, Any], batch: int) -> dict[str, Any]:
        wide = {k: self._repeated(v, batch) for k, v in added.items()}
        if "text_embeds" in wide:
            wide["text_embeds"] = self._with_others(wide["text_embeds"], [p for _, p in self._texts])
        return wide

    def _with_others(self, wide: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """The texts in their rows of the conditional parts."""
        kinds = self._rows()
        parts = wide.reshape(len(kinds), -1, self._times, *wide.shape[1:]).clone()
        for j, text in enumerate(texts, 1):
            if text.shape[1:-1] != wide.shape[1:-1]:
                raise InputError(
                    f"texts for regions: the prompt has {wide.shape[1]} tokens, another text {text.shape[1]}; give "
                    "texts of one length"
                )
            own = _widened(text.to(wide), wide.shape[-1])
            for i, kind in enumerate(kinds):
                if kind == "cond":
                    parts[i, :, j] = own
        return parts.flatten(0, 2)

    def _join(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The UNet's hook: one prediction per sample."""
        made = output[0]
        joined = (made.unflatten(0, (-1, self._times)) * self._weights(made)).sum(1)
        if isinstance(output, tuple):
            return (joined, *output[1:])
        output.sample = joined
        return output

    def _weights(self, made: Tensor) -> Tensor:
        """[1 + n, 1, h, w] for predictions of this size; kept, or each step would copy the masks to the GPU again."""
        kept = self._shares
        if kept is None or kept.shape[-2:] != made.shape[-2:] or (kept.device, kept.dtype) != (made.device, made.dtype):
            own = torch.cat([F.adaptive_avg_pool2d(m[None].to(made.device), made.shape[-2:]) for m in self._masks], 1)
            kept = self._shares = torch.cat([1 - own.sum(1, keepdim=True), own], 1)[0, :, None].to(made.dtype)
        return kept


def _widened(text: Tensor, width: int) -> Tensor:
    """Staged text (SeFi-IDE) is several encodings side by side; a plain text is the same in each."""
    return text if text.shape[-1] == width else torch.cat([text] * (width // text.shape[-1]), -1)


def grown(mask: Tensor, margin: float) -> Tensor:
    """A mask grown at all sides, with a soft edge: 1 up to `margin` outside of it, then falling to 0 over twice that.

    Args:
        mask: [1, H, W], 0..1.
        margin: share of the longer side, 0 (unchanged) to 0.25.

    Raises:
        InputError: a margin beyond.
    """
    if not 0 <= margin <= 0.25:
        raise InputError(f"margin of a region: wanted 0 to 0.25 of the longer side, got {margin!r}")
    if margin == 0 or mask.shape[-2:] == (1, 1):
        return mask
    scale = GROWN / max(mask.shape[-2:])
    small = F.interpolate(mask[None], [max(1, round(s * scale)) for s in mask.shape[-2:]], mode="area")
    by, half = round(2 * margin * GROWN), round(margin * GROWN)
    wide = F.max_pool2d(small, 2 * by + 1, 1, by)
    return F.avg_pool2d(F.pad(wide, (half,) * 4, mode="replicate"), 2 * half + 1, 1)[0]
