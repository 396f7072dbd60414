"""What one `attach` puts on a UNet: identities, their keys and values per layer, scales, masks, batch halves."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import masks as _masks
from .scales import expand
from .types import AttentionOptions, Site

ROWS = ("uncond", "cond")
HALVES = (("cond",), ("uncond", "cond"))


Pair = tuple[Tensor, Tensor]


class Branch(NamedTuple):
    """The identities of one conditioning at one layer, as `id_attention` takes them."""

    k: tuple[Tensor, ...]  # n times [Bi, H, Li, D]
    v: tuple[Tensor, ...]
    scale: tuple[float, ...] | Tensor  # n floats, or float32 [n] or [n, B]
    mask: list[Tensor | None] | None  # per identity None or [1 or B, Lq]


def people_of(identity: Any, system: Any) -> tuple[Any, ...]:
    """One identity or a sequence of them, checked, as a tuple.

    Raises:
        InputError: nothing, something without tokens, or an identity that another system made.
    """
    people = tuple(identity) if isinstance(identity, (list, tuple)) else (identity,)
    if not people:
        raise InputError("attach: got an empty list of identities; give one Identity or a list of them")
    for j, person in enumerate(people):
        tokens = getattr(person, "tokens", None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or not tokens.dtype.is_floating_point:
            raise InputError(
                f"attach: identity {j} must be an Identity with floating-point tokens [Bi, L, E], "
                f"got {type(person).__name__}"
            )
        made_by = getattr(person, "system", None)
        if made_by is not None and made_by != system.name:
            raise InputError(
                f"attach: identity {j} was made by system {made_by!r}, this system is {system.name!r}; "
                "encode the photo with the system that you attach"
            )
    return people


def guidance_rows(cfg: Any, pipe: Any) -> Callable[[], tuple[str, ...]]:
    """A function that tells, at each call, of which parts a UNet batch is made.

    Args:
        cfg: "auto", bool, or the order of the parts, e.g. ("cond", "uncond", "uncond") for InstructPix2Pix.
        pipe: the pipeline given to `attach`, or None for a bare UNet.
    """
    if cfg is True or cfg is False or (cfg == "auto" and pipe is None):
        rows = HALVES[cfg is True]
        return lambda: rows
    if isinstance(cfg, (tuple, list)) and "cond" in cfg and all(r in ROWS for r in cfg):
        rows = tuple(cfg)
        return lambda: rows
    if cfg != "auto":
        raise InputError(
            f"attach: cfg must be 'auto', True, False or the order of a batch's parts such as {HALVES[1]}, got {cfg!r}"
        )
    kind = type(pipe)
    if not hasattr(kind, "do_classifier_free_guidance") or hasattr(kind, "image_guidance_scale"):
        raise InputError(
            f"attach: {kind.__name__} does not tell how its batches are made; give cfg=True where they are "
            "[uncond, cond] halves, cfg=False without guidance, or the order of the parts as a tuple"
        )
    return _AskPipe(pipe)


class _AskPipe:
    """Reads the pipeline's own guidance state, without keeping the pipeline alive."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)
        self.has_pag = hasattr(type(pipe), "do_perturbed_attention_guidance")

    def __call__(self) -> tuple[str, ...]:
        pipe = self.pipe()
        if pipe is None:
            raise InputError("attach: the pipeline that was attached is gone; attach to its UNet with cfg=...")
        # Before the pipeline's first call its guidance state does not exist yet.
        rows = HALVES[1] if getattr(pipe, "do_classifier_free_guidance", False) else HALVES[0]
        if self.has_pag and getattr(pipe, "do_perturbed_attention_guidance", False):
            rows = (*rows, "cond")
        return rows


class Conditioning:
    """Identities of one `attach`, ready for every layer.

    Keys and values are projected once per identity, dtype and device and kept here. They are projected anew
    when the system's weights changed in place, and not kept at all while gradients flow into them.
    """

    def __init__(
        self,
        system: Any,
        people: Sequence[Any],
        sites: Sequence[Site],
        options: AttentionOptions,
        rows: Callable[[], tuple[str, ...]],
        backend: str | None,
    ) -> None:
        self.system = system
        self.people = tuple(people)
        self.sites = {site.name: site for site in sites}
        self.places = {site.name: i for i, site in enumerate(sites)}
        self.options = options
        self.rows = rows
        self.backend = backend
        self.device = torch.device("cpu")
        self._bank: dict[Any, Any] = {}
        self._versions_seen: tuple[tuple[int, bool], ...] = ()
        self._grids: dict[Any, Tensor] = {}
        self._table: Tensor | None = None
        self.set_scale(1.0)
        self.set_masks(None)

    # -- what the user may change while attached ------------------------------------------------

    def set_people(self, people: Sequence[Any]) -> None:
        """Swap the identities; scales and masks stay, so their number must fit."""
        count = len(people)
        if count != len(self.people):
            if self.has_masks:
                raise InputError(
                    f"identity: masks for {len(self.people)} identities are set, got {count} identities; "
                    "call handle.masks(None) first"
                )
            expanded = self._expanded(self.spec, count)
            self.floats, self.tensor = expanded
            self._table = None
            self.masks = (None,) * count
        self.people = tuple(people)
        self.refresh()

    def set_scale(self, scale: Any) -> None:
        """Numbers for the eager path; the same numbers in a tensor, changed in place, for compiled graphs."""
        self.floats, self.tensor = self._expanded(scale, len(self.people))
        self.spec = scale
        if self.floats is not None and self._table is not None:
            self._table.copy_(self._rows_of_floats())

    def set_masks(self, masks: Any) -> None:
        """Region masks; see `masks.read_masks` for the forms."""
        read = _masks.read_masks(masks, len(self.people))
        self.masks = tuple(None if m is None else m.to(self.device) for m in read)
        self.has_masks = any(m is not None for m in read)
        self._grids = {}

    def refresh(self) -> None:
        """Forget all keys and values."""
        self._bank = {}

    # -- what a layer asks for ------------------------------------------------------------------

    def is_off(self, name: str) -> bool:
        """True where every scale is the number 0: the layer then runs as if nothing were attached."""
        return self.floats is not None and not any(self.floats[name])

    def branch(self, name: str, q: Tensor, size: tuple[int, int] | None) -> Branch:
        """Everything that `id_attention` needs of this conditioning at layer `name`.

        Args:
            name: site name.
            q: queries [B, H, Lq, D].
            size: height and width of the UNet's input, needed where masks are set.

        Raises:
            InputError: the batch is not made of the parts that guidance says, or the identities' rows do not
                divide the number of images.
        """
        rows = self.rows()
        self._check_batch(q.shape[0], rows)
        pairs = self._pairs(name, rows, q)
        silent = tuple(getattr(p, "uncond_tokens", None) is None for p in self.people)
        scale = self._scale(name, q, rows, silent)
        mask = self._mask(q, size, rows) if self.has_masks else None
        return Branch(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), scale, mask)

    def begin(self) -> None:
        """Called before each forward of the UNet: drop keys and values if weights or tokens changed in place."""
        versions = self._versions()
        if versions != self._versions_seen:
            self.refresh()
            self._versions_seen = versions

    def fill(self, dtype: torch.dtype, device: torch.device) -> None:
        """Project keys and values of all sites now, so that mistakes show before anything is attached."""
        self.device = device
        self.masks = tuple(None if m is None else m.to(device) for m in self.masks)
        if self.floats is not None:
            self._scale_table(device)
        self.begin()
        like = torch.empty(0, dtype=dtype, device=device)
        for name in self.sites:
            for rows in HALVES:
                self._pairs(name, rows, like)

    # -- inside ---------------------------------------------------------------------------------

    def _expanded(self, scale: Any, count: int) -> tuple[dict[str, tuple[float, ...]] | None, Tensor | None]:
        wide = expand(scale, tuple(self.sites.values()), count)
        return (None, wide) if isinstance(wide, Tensor) else (wide, None)

    def _rows_of_floats(self) -> Tensor:
        return torch.tensor([self.floats[name] for name in self.sites], dtype=torch.float32)

    def _check_batch(self, batch: int, rows: tuple[str, ...]) -> None:
        if batch % len(rows):
            raise InputError(
                f"id_attention: guidance says that a batch is made of {rows}, got a batch of {batch}, which "
                f"{len(rows)} does not divide; a UNet called without its pipeline needs attach(..., cfg=False)"
            )
        images = batch // len(rows)
        for j, person in enumerate(self.people):
            if images % person.tokens.shape[0]:
                raise InputError(
                    f"id_attention: identity {j} has rows for {person.tokens.shape[0]} images, which do not divide "
                    f"the {images} images of this batch; give one row, or one per image (Identity.batch)"
                )

    def _pairs(self, name: str, rows: tuple[str, ...], like: Tensor) -> tuple[Pair, ...]:
        """Keys and values of every identity at a layer for these batch parts. n times ([R, H, L, D] twice)"""
        bank = self._bank
        key = (name, rows, like.dtype, like.device)
        entry = bank.get(key)
        if entry is not None and (entry[0] or not torch.is_grad_enabled()):
            return entry[1]
        people = self.people
        whole = self._projected(name, like, bank)
        pairs = tuple(_parts(pair, person, rows) for pair, person in zip(whole, people, strict=True))
        self._keep(bank, key, pairs)
        return pairs

    def _projected(self, name: str, like: Tensor, bank: dict[Any, Any]) -> tuple[Pair, ...]:
        """Keys and values of every identity for [uncond, cond], or for cond alone where there is no uncond."""
        key = (name, like.dtype, like.device)
        entry = bank.get(key)
        if entry is not None and (entry[0] or not torch.is_grad_enabled()):
            return entry[1]
        traced = torch.compiler.is_compiling()
        # Tensors made under inference_mode could never serve a later call with gradients.
        with contextlib.nullcontext() if traced else torch.inference_mode(False):
            pairs = tuple(self._project(name, person, like) for person in self.people)
        self._keep(bank, key, pairs)
        return pairs

    def _keep(self, bank: dict[Any, Any], key: Any, pairs: tuple[Pair, ...]) -> None:
        """Store a result unless it belongs to one autograd graph; mark whether calls with gradients may use it."""
        if torch.compiler.is_compiling() or any(k.requires_grad or v.requires_grad for k, v in pairs):
            return
        bank[key] = (torch.is_grad_enabled() or not self._trainable(), pairs)

    def _trainable(self) -> bool:
        if any(p.tokens.requires_grad for p in self.people):
            return True
        return isinstance(self.system, nn.Module) and any(p.requires_grad for p in self.system.parameters())

    def _versions(self) -> tuple[tuple[int, bool], ...]:
        tensors = [t for p in self.people for t in (p.tokens, getattr(p, "uncond_tokens", None)) if t is not None]
        if isinstance(self.system, nn.Module):
            tensors += self.system.parameters()
        return tuple((0 if t.is_inference() else t._version, t.requires_grad) for t in tensors)

    def _project(self, name: str, person: Any, like: Tensor) -> Pair:
        tokens, uncond = person.tokens, getattr(person, "uncond_tokens", None)
        if uncond is None:
            tokens = tokens.clone()
        else:
            tokens = torch.cat([uncond.expand(tokens.shape[0], -1, -1), tokens])
        site = self.sites[name]
        k, v = _checked_kv(self.system, site, tokens)
        return _heads(k, site, like), _heads(v, site, like)

    def _scale(
        self, name: str, q: Tensor, rows: tuple[str, ...], silent: tuple[bool, ...]
    ) -> tuple[float, ...] | Tensor:
        mute = any(silent) and "uncond" in rows
        if self.tensor is None and not mute and not torch.compiler.is_compiling():
            return self.floats[name]
        if self.tensor is not None:
            scale = self.tensor.to(device=q.device, dtype=torch.float32).expand(len(self.people))
        else:
            scale = self._scale_table(q.device)[self.places[name]]
        if not mute:
            return scale
        images = q.shape[0] // len(rows)
        heard = [[0.0 if quiet and row == "uncond" else 1.0 for row in rows] for quiet in silent]
        return scale[:, None] * torch.tensor(heard, device=q.device).repeat_interleave(images, 1)

    def _scale_table(self, device: torch.device) -> Tensor:
        """float32 [sites, n], written in place by `set_scale`: a compiled graph sees new scales as data."""
        if self._table is None or self._table.device != device:
            self._table = self._rows_of_floats().to(device)
        return self._table

    def _mask(self, q: Tensor, size: tuple[int, int] | None, rows: tuple[str, ...]) -> list[Tensor | None]:
        if size is None:
            raise InputError(
                "id_mask: the size of the latent is not known, because the layer was called outside of its UNet; "
                "call the UNet, or drop the masks"
            )
        batch, _, tokens, _ = q.shape
        grid = _masks.grid_of(tokens, *size)
        images = batch // len(rows)
        small = (self._mask_of(j, mask, grid, images, q.device) for j, mask in enumerate(self.masks))
        return [m if m is None or m.shape[0] == 1 else m.repeat(len(rows), 1) for m in small]

    def _mask_of(self, j: int, mask: Tensor | None, grid: Any, images: int, device: Any) -> Tensor | None:
        if mask is None:
            return None
        if mask.shape[0] not in (1, images):
            raise InputError(
                f"id_mask: mask {j} has {mask.shape[0]} rows for {images} images; give one, or one per image"
            )
        key = (j, grid, device)
        small = self._grids.get(key) if not torch.compiler.is_compiling() else None
        if small is None:
            small = _masks.to_tokens(mask.to(device), grid)
            if not torch.compiler.is_compiling():
                self._grids[key] = small
        return small


def _parts(pair: Pair, person: Any, rows: tuple[str, ...]) -> Pair:
    """Rows of [uncond, cond] keys and values put into the order of the batch's parts."""
    count = person.tokens.shape[0]
    if getattr(person, "uncond_tokens", None) is None:
        # The uncond part takes the cond rows at scale 0; one row serves every part.
        if count == 1 or len(rows) == 1:
            return pair
        return pair[0].repeat(len(rows), 1, 1, 1), pair[1].repeat(len(rows), 1, 1, 1)
    if rows == HALVES[1]:
        return pair
    start = {"uncond": 0, "cond": count}
    k, v = ([t[start[row] : start[row] + count] for row in rows] for t in pair)
    return (k[0], v[0]) if len(rows) == 1 else (torch.cat(k), torch.cat(v))


def _heads(x: Tensor, site: Site, like: Tensor) -> Tensor:
    """[R, L, C] -> [R, H, L, D] in dtype and on the device of `like`."""
    x = x.to(device=like.device, dtype=like.dtype)
    return x.unflatten(-1, (site.heads, site.head_dim)).transpose(1, 2).contiguous()


def _checked_kv(system: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
    result = system.project(site, tokens)
    want = (*tokens.shape[:2], site.hidden)
    good = isinstance(result, (tuple, list)) and len(result) == 2
    if not good or any(not isinstance(t, Tensor) or tuple(t.shape) != want for t in result):
        got = [list(getattr(t, "shape", ())) for t in result] if good else type(result).__name__
        raise InputError(
            f"attach: system {system.name!r} must project {site.name} to keys and values of shape {list(want)}, got {got}"
        )
    return result[0], result[1]
