"""An identity with gradients on a frozen UNet: put on once, then chosen pass by pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.conditioning import Branch
from ..attention.sites import attention_of
from ..attention.stack import stack_of
from ..attention.types import AttentionOptions, Site
from ..errors import InputError

Tap = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Person:
    """Keys and values of a batch of identities at every layer, with their gradients.

    Attributes:
        kv: by site name, k and v [B, H, L, D].
        scale: float32 [1, B], or one number for all.
    """

    kv: dict[str, tuple[Tensor, Tensor]]
    scale: Tensor | tuple[float, ...]


class Injection:
    """One system on one frozen UNet, for training. Also a context manager that takes it off.

    Unlike `idcore.attach`, whose identities stay until they are changed, each pass names its own: `using(person)`, or
    `using(None)`, which runs the processors that were found there. Gradients reach the tokens (and so the encoder) and
    the system's projections; the UNet stays frozen. Passes of several persons may be open in one backward, with or
    without checkpointing: what a checkpointed part recomputes sees the person and the tap of its own forward.

    Args:
        unet: a diffusers UNet, frozen, not compiled.
        system: a `systems.base.System` whose `project` gives gradients (PuLID).
        options: how the identity joins. Default: plain addition, no zero tokens; the paper knows nothing else, and the
            modes of the published code are read as inference's (our choice).
        id_scale: strength while training (our choice: 1).
        backend: of `id_attention`; None: the first that can.

    Raises:
        InputError: the system does not fit, or the UNet is compiled or not frozen.
    """

    def __init__(
        self,
        unet: nn.Module,
        system: Any,
        *,
        options: AttentionOptions | None = None,
        id_scale: float = 1.0,
        backend: str | None = None,
    ) -> None:
        if hasattr(unet, "_orig_mod"):
            raise InputError("training: the UNet is compiled; give the UNet itself (compiled._orig_mod)")
        wanted = next((n for n, p in unet.named_parameters() if p.requires_grad), None)
        if wanted is not None:
            raise InputError(f"training: the base is frozen, but {wanted} wants a gradient; unet.requires_grad_(False)")
        sites = list(system.sites(unet))
        if not sites:
            raise InputError(f"training: system {system.name!r} names no layer of this {type(unet).__name__}")
        self.unet, self.system, self.id_scale = unet, system, float(id_scale)
        self._given = _GivenPerson(sites, options or AttentionOptions(), backend)
        self._stack = stack_of(unet)
        self._stack.add(unet, self._given)
        self._on, self._checkpoints = True, False

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take it off; the layers get the processors back that were found there. May be called again."""
        if self._on:
            self._on = False
            self.checkpointing(False)
            self._stack.remove(self.unet, self._given)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers that are conditioned."""
        return tuple(self._given.sites.values())

    def person(self, tokens: Tensor, keep: Tensor | None = None) -> Person:
        """Project identity tokens for every layer, once for all passes of an optimiser step.

        There are two ways to drop an identity. `keep` mutes it: the sample's attention is the text's alone. To train
        what classifier-free guidance compares with at inference, give the tokens of the encoder on zeros in that row
        (`undressed`), as PuLID's published pipeline does in the unconditional half.

        Args:
            tokens: [B, L, E], with or without gradient; B divides the batch of the passes.
            keep: bool or 0..1 [B]: factor on each sample's strength. None: all 1.

        Raises:
            InputError: `keep` is not [B].
        """
        like = next(attention_of(self.unet, self.sites[0]).to_q.parameters())
        kv = {site.name: self._project(site, tokens, like) for site in self.sites}
        if keep is None:
            return Person(kv, (self.id_scale,))
        if keep.shape != tokens.shape[:1]:
            raise InputError(f"training: keep must be [{len(tokens)}], one per row of tokens, got {list(keep.shape)}")
        return Person(kv, keep.detach().to(like.device, torch.float32)[None] * self.id_scale)

    def _project(self, site: Site, tokens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.system.project(site, tokens)
        return tuple(
            t.to(like.device, like.dtype).unflatten(-1, (site.heads, site.head_dim)).transpose(1, 2) for t in (k, v)
        )

    @contextlib.contextmanager
    def using(self, person: Person | None, tap: Tap | None = None) -> Iterator[None]:
        """Passes of the UNet in this block have this person, or none.

        Args:
            person: of `person(...)`; None: no identity. The result is then bit-equal to the bare UNet.
            tap: called at every conditioned layer with its name, the queries [B, H, Lq, D] after `to_q` and the text's
                keys [B, H, Lt, D]. With a tap passes without identity go through `id_attention` too (equal up to
                rounding). Under checkpointing it is called again in backward, and must do the same again.
        """
        if not self._on:
            raise InputError("training: this injection was taken off its UNet; make a new one")
        if self.unet.is_gradient_checkpointing and not self._checkpoints:
            raise InputError(
                "training: the UNet checkpoints by itself, and would recompute its blocks with whatever person comes "
                "later; unet.disable_gradient_checkpointing(), and use Injection.checkpointing()"
            )
        before = self._given.person, self._stack.tap
        self._given.person, self._stack.tap = person, tap
        try:
            yield
        finally:
            self._given.person, self._stack.tap = before

    def checkpointing(self, on: bool = True) -> None:
        """Recompute the UNet's blocks in backward in place of keeping their activations."""
        if on:
            self.unet.enable_gradient_checkpointing(self._checkpointed)
        elif self._checkpoints:
            self.unet.disable_gradient_checkpointing()
        self._checkpoints = on

    @contextlib.contextmanager
    def checkpointed(self, on: bool = True) -> Iterator[None]:
        """`checkpointing(True)` for this block alone; with on=False as it was before."""
        if not on or self._checkpoints:
            yield
            return
        self.checkpointing(True)
        try:
            yield
        finally:
            self.checkpointing(False)

    def _checkpointed(self, block: Callable[..., Any], *args: Any) -> Any:
        person, tap = self._given.person, self._stack.tap

        def run(*given: Any) -> Any:
            with self.using(person, tap):
                return block(*given)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class _GivenPerson:
    """What the attention layer asks of a conditioning (`attention.conditioning.Conditioning`), for one person that
    changes from pass to pass and whose keys and values carry gradients."""

    has_masks = False
    replaces = False
    plan = None
    running = None

    def __init__(self, sites: list[Site], options: AttentionOptions, backend: str | None) -> None:
        self.sites = {site.name: site for site in sites}
        self.options, self.backend = options, backend
        self.rows_now: tuple[str, ...] = ("cond",)
        self.person: Person | None = None

    def rows(self) -> tuple[str, ...]:
        return ("cond",)

    def begin(self, timestep: Any) -> None:
        """Nothing hangs on the step."""

    def is_off(self, name: str) -> bool:
        return self.person is None

    def branch(self, name: str, q: Tensor, size: tuple[int, int] | None) -> Branch:
        k, v = (t.to(q.dtype) for t in self.person.kv[name])
        if q.shape[0] % k.shape[0]:
            raise InputError(
                f"training: identity tokens of {k.shape[0]} samples do not fit a batch of {q.shape[0]}; give one row, "
                "or one per sample"
            )
        scale = self.person.scale
        if isinstance(scale, Tensor) and scale.shape[1] != q.shape[0]:
            scale = scale.repeat_interleave(q.shape[0] // scale.shape[1], 1)
        return Branch((k,), (v,), scale, None)


def undressed(tokens: Tensor, uncond: Tensor, keep: Tensor) -> Tensor:
    """Tokens [B, L, E] with the rows where `keep` [B] is False replaced by the encoder's tokens of zeros [1, L, E]."""
    return torch.where(keep.to(tokens.device).bool()[:, None, None], tokens, uncond.to(tokens.dtype))
