"""Text that changes with the stage of the denoising: keys and values of all stages once, one stage picked at each pass.

SeFi-IDE ("Beyond Inserting", arXiv 2402.00631): a prompt has, in each stage, one encoding for the keys and one for the
values. They travel to the UNet side by side in the width of its text, [B, L, (1 + 2 S) E]: the prompt with a plain word
(the reference), S encodings for keys, S for values. Pipelines repeat and concatenate such text as they do any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.token_attention_loss import token_attention_loss
from .kv_bank import normal_mode
from .sites import attention_of
from .types import Site

MAX_STAGES = 10


class Parts(NamedTuple):
    """A wide text, taken apart."""

    reference: Tensor  # [B, L, E]
    keys: Tensor  # [S, B, L, E]
    values: Tensor


def joined_text(reference: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The wide text [B, L, (1 + 2 S) E] of encodings [B, L, E]."""
    return torch.cat([reference, *keys, *values], -1)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.stage: Tensor | None = None

    def __reduce__(self) -> tuple:
        return _PerThread, ()


class StagedText:
    """What makes a UNet's layers read wide text.

    Args:
        sites: the cross-attention layers.
        width: E of plain text.
        stages: S, 1 to 10. Stage i serves timesteps from limits[i - 1] to below limits[i]; stage 0 is the least noise.
        timesteps: of the training, 1000 for every Stable Diffusion.
        limits: S - 1 rising timesteps between the stages; default: equal stages.
        backend: of `id_attention`, where no identity shares the call.

    Raises:
        InputError: counts or limits that do not fit.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        width: int,
        stages: int = 5,
        *,
        timesteps: int = 1000,
        limits: Sequence[float] | None = None,
        backend: str | None = None,
    ) -> None:
        check_stages(stages)
        limits = [timesteps * i / stages for i in range(1, stages)] if limits is None else [float(x) for x in limits]
        if len(limits) != stages - 1 or any(not 0 < a < timesteps for a in limits) or sorted(set(limits)) != limits:
            raise InputError(
                f"stages: {stages} stages need {stages - 1} rising limits between 0 and {timesteps}, got {limits}"
            )
        self.sites = {s.name: s for s in sites}
        self.width, self.stages, self.limits, self.backend = width, stages, limits, backend
        self._on: dict[Any, Tensor] = {}
        self._here = _PerThread()
        self._latest: Tensor | None = None

    def begin(self, timestep: Any, device: torch.device) -> None:
        """Before each pass of the UNet: the stage of its timestep, looked up on the device. int32 [1] or [B]"""
        t = torch.as_tensor(timestep, device=device).reshape(-1)
        self._here.stage = self._latest = torch.bucketize(t, self._limits(t), out_int32=True, right=True)

    @property
    def stage(self) -> Tensor | None:
        """Of the pass that runs in this thread; recomputation in autograd's own threads takes the latest."""
        return self._latest if self._here.stage is None else self._here.stage

    def fill(self, device: torch.device) -> None:
        """Put the limits on a device, so that a graph that is traced later finds them there."""
        for dtype in (torch.int64, torch.float32):
            self._limits(torch.zeros(1, dtype=dtype, device=device))

    def _limits(self, t: Tensor) -> Tensor:
        key = (t.device, t.dtype)
        if key not in self._on:
            limits = torch.tensor(self.limits)
            with normal_mode():
                # A whole number reaches a limit where it reaches the next whole number.
                self._on[key] = (limits if t.is_floating_point() else limits.ceil()).to(t.device, t.dtype)
        return self._on[key]

    def is_wide(self, text: Tensor | None) -> bool:
        """Whether a text is more than one encoding."""
        return text is not None and text.shape[-1] != self.width

    def split(self, text: Tensor | None) -> Parts | None:
        """A wide text's parts; None for plain text.

        Raises:
            InputError: a width that fits neither.
        """
        if not self.is_wide(text):
            return None
        count, rest = divmod(text.shape[-1], self.width)
        stages = (count - 1) // 2
        if rest or count % 2 == 0 or stages not in (1, self.stages):
            raise InputError(
                f"staged text: this UNet reads text of width {self.width}, or {1 + 2 * self.stages} times that for "
                f"{self.stages} stages (3 times for one stage), got {text.shape[-1]}"
            )
        parts = text.unflatten(-1, (count, self.width))
        keys, values = (parts[:, :, a : a + stages].permute(2, 0, 1, 3) for a in (1, 1 + stages))
        return Parts(parts[:, :, 0], keys, values)

    def project(self, attn: nn.Module, text: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """Keys and values [S, B, L, C] of a wide text, by the layer's own projections."""
        parts = self.split(text)
        if fused:
            return tuple(attn.to_kv(x.contiguous()).chunk(2, -1)[i] for i, x in enumerate(parts[1:]))
        return attn.to_k(parts.keys.contiguous()), attn.to_v(parts.values.contiguous())


def check_stages(stages: Any) -> None:
    """Raise InputError unless `stages` is 1 to 10."""
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= MAX_STAGES:
        raise InputError(f"stages must be a whole number from 1 to {MAX_STAGES}, got {stages!r}")


class AttentionLoss:
    """SeFi-IDE's attention loss: in chosen layers, the target prompt's map is pulled to the reference prompt's.

    Shown the queries and text keys of every layer during a pass (`__call__` is what `IdStack.tap` and
    `training.injection` call), it then gives in `total()`

        weight * mean over layers of mean (softmax(q k^T / sqrt d) - softmax(q k_ref^T / sqrt d))^2

    with no gradient through the reference map. That the distance is squared, and which layers it covers, the paper does
    not print: all of them is our choice. With the form "sum" a sample's whole maps are compared, as the paper's norm
    says: the sum over image and text tokens, in place of their mean.

    Args:
        unet: whose text is staged.
        text: wide text of the pass, [B, L, (1 + 2 S) E]: the reference prompt's encoding stands in it.
        layers: parts of layer names ("down_blocks", "attentions.0", ...); default: all cross-attention layers.
        tokens: which text tokens count, as in `token_attention_loss`; default: all.
        weight: lambda; 0.003 is the paper's best of 0.0001 to 0.05.
        form: "mean" or "sum".

    Raises:
        InputError: plain text, no layer of such a name, or an unknown form.
    """

    def __init__(
        self,
        unet: nn.Module,
        staged: StagedText,
        text: Tensor,
        *,
        layers: Sequence[str] | None = None,
        tokens: Tensor | None = None,
        weight: float = 0.003,
        form: str = "mean",
    ) -> None:
        if form not in ("mean", "sum"):
            raise InputError(f"attention loss: form must be mean or sum, got {form!r}")
        names = [n for n in staged.sites if layers is None or any(part in n for part in layers)]
        parts = staged.split(text)
        if not names or parts is None:
            what = f"no cross-attention layer has one of {list(layers or ())} in its name" if not names else (
                f"the text has the plain width {staged.width}, wanted staged text"
            )  # fmt: skip
            raise InputError(f"attention loss: {what}; the first layer is {next(iter(staged.sites))}")
        self.layers = {n: attention_of(unet, staged.sites[n]) for n in names}
        self.staged, self.tokens, self.weight, self.form = staged, tokens, weight, form
        self.reference = parts.reference.detach()
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, q: Tensor, k: Tensor) -> None:
        """One layer of one pass. Gradient checkpointing shows it again in backward, which counts once."""
        attn = self.layers.get(name)
        if attn is None:
            return
        with torch.no_grad():
            plain = attn.to_k(self.reference.to(q.dtype)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            plain = plain if attn.norm_k is None else attn.norm_k(plain)
        keys = k if k.dim() == 4 else _picked(k, self.staged.stage)
        loss = token_attention_loss(q, keys, plain, tokens=self.tokens)
        if self.form == "sum":
            counted = keys.shape[-2] if self.tokens is None else self.tokens.float().sum(-1).mean().to(loss.device)
            loss = loss * (q.shape[2] * counted)
        self.seen.setdefault(name, loss)

    def total(self) -> Tensor:
        """weight * mean over the layers that were shown, float32 [].

        Raises:
            InputError: none was.
        """
        if not self.seen:
            raise InputError(
                "attention loss: no layer was shown; run the UNet's pass with this loss as its tap "
                "(systems.sefi_ide.watching)"
            )
        return self.weight * torch.stack(list(self.seen.values())).mean()


def _picked(bank: Tensor, stage: Tensor) -> Tensor:
    """[B, H, L, D] of a bank [S, B, H, L, D]; stage [1] or [B]."""
    rows = torch.arange(bank.shape[1], device=bank.device)
    return bank[stage.long().expand(len(rows)), rows]


def narrow_to_reference(width: int) -> Callable[..., Any]:
    """A forward pre-hook for networks beside the UNet that know no stages (ControlNet): they read the reference."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if not isinstance(text, Tensor) or text.shape[-1] == width:
            return None
        text = text[..., :width]
        if "encoder_hidden_states" in kwargs:
            return args, {**kwargs, "encoder_hidden_states": text}
        return (*args[:2], text, *args[3:]), kwargs

    return hook
