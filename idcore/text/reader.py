"""Learned words put in at a text encoder's word embeddings, through `stage_tokens`, while they are attached."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.stage_tokens import stage_tokens
from .placeholders import Words, known_to, teach, unteach

_SEEN = "idcore_ids"  # on the ids that an embedding gets: (reader, ids before the words were taken out)
_lock = threading.RLock()


class TextPart(NamedTuple):
    """One tokenizer and the text encoder behind it."""

    tokenizer: Any
    encoder: nn.Module

    @property
    def width(self) -> int:
        """E, width of its word embeddings."""
        return self.encoder.get_input_embeddings().weight.shape[-1]


def text_parts(pipe: Any) -> tuple[TextPart, ...]:
    """The text encoders of a diffusers pipeline (SD 1.x, SD 2.x: one; SDXL: two), or of an `IDPipeline`.

    Raises:
        InputError: no pipeline, or one whose text encoders are none of CLIP's.
    """
    pipe = components_of(pipe)
    parts = []
    for end in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)
        if tokenizer is not None and isinstance(encoder, nn.Module):
            parts.append(TextPart(tokenizer, encoder))
    special = [getattr(p.tokenizer, n, None) for p in parts for n in ("bos_token_id", "eos_token_id")]
    if not parts or None in special or getattr(pipe, "text_encoder_3", None) is not None:
        raise InputError(
            "words need a diffusers pipeline with its tokenizers and CLIP text encoders (SD 1.x, SD 2.x, SDXL); "
            f"{type(pipe).__name__} has {'others' if parts else 'none'}. Give the pipeline, not its UNet"
        )
    return tuple(parts)


def components_of(pipe: Any) -> Any:
    """The diffusers pipeline inside of an `IDPipeline`; any other object unchanged."""
    inner = getattr(pipe, "pipe", None)
    return inner if getattr(pipe, "text_encoder", None) is None and hasattr(inner, "text_encoder") else pipe


def handles_on(pipe: Any) -> list[Any]:
    """The handles of everybody whose words the pipeline's tokenizers know."""
    pipe = components_of(pipe)
    words = [w for end in ("", "_2") for w in known_to(getattr(pipe, f"tokenizer{end}", None))]
    return list({id(w.handle): w.handle for w in words if w.handle is not None}.values())


class Reader:
    """Hooks on the word embeddings of one text encoder: takes the words' ids out, and puts their vectors in."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.known: dict[int, tuple[Words, int]] = {}  # of each id: its words, and which of `vectors`
        self.module: nn.Module | None = None
        self.handles: list[Any] = []

    def settle(self) -> None:
        """Be on the embeddings that the encoder has now (`load_textual_inversion` replaces them)."""
        with _lock:
            module = self.encoder.get_input_embeddings() if self.known else None
            if module is self.module:
                return
            for handle in self.handles:
                handle.remove()
            self.module = module
            self.handles = []
            if module is not None:
                self.handles = [module.register_forward_pre_hook(self), module.register_forward_hook(self.after)]

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        """The pre-hook: ids that the embedding knows."""
        ids = args[0]
        mine = torch.isin(ids, torch.tensor(list(self.known), device=ids.device))
        if not bool(mine.any()):
            return None
        usual = ids.masked_fill(mine, 0)
        setattr(usual, _SEEN, (*getattr(ids, _SEEN, ()), (self, ids)))
        return (usual, *args[1:])

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """The hook: vectors in the places of their words."""
        for reader, ids in getattr(args[0], _SEEN, ()):
            if reader is self:
                return self._put(ids, output)
        return None

    def _put(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        rows = ids.reshape(-1, ids.shape[-1]).tolist()
        places = [[(at, i) for at, i in enumerate(row) if i in self.known] for row in rows]
        used = list({self.known[i][0]: None for row in places for _, i in row})
        first, count = {}, 0
        for w in used:
            first |= {i: count + j for j, i in enumerate(w.ids)}
            count += len(w.ids)
        width = max(map(len, places))
        positions, chosen = torch.full((len(rows), width), -1), torch.zeros(len(rows), width, dtype=torch.int64)
        for b, row in enumerate(places):
            for t, (at, i) in enumerate(row):
                positions[b, t], chosen[b, t] = at, first[i]
        where = embeddings.device
        vectors = torch.cat([self._rows(w, len(rows)).to(where) for w in used], 1)
        tokens = vectors.gather(1, chosen.to(where)[..., None].expand(-1, -1, vectors.shape[-1]))
        flat = embeddings.reshape(len(rows), -1, embeddings.shape[-1])
        return stage_tokens(flat, tokens[None], positions.to(where))[0].view_as(embeddings)

    def _rows(self, w: Words, batch: int) -> Tensor:
        """[B, k, E] of a batch of prompts."""
        vectors = w.vectors[self.known[w.ids[0]][1]]
        rows = vectors.shape[0]
        if batch % rows:
            raise InputError(
                f"{w.shown} has words for {rows} prompts, which do not divide the {batch} prompts of this call; give "
                "one row, or one per prompt"
            )
        return vectors.repeat_interleave(batch // rows, 0)


def _reader_of(encoder: nn.Module) -> Reader:
    for hook in encoder.get_input_embeddings()._forward_pre_hooks.values():
        if isinstance(hook, Reader) and hook.encoder is encoder:
            return hook
    return Reader(encoder)


def put_on(parts: Sequence[TextPart], words: Sequence[Words]) -> None:
    """Let tokenizers and text encoders know words; all of it or, with an exception, nothing.

    Raises:
        InputError: a placeholder that is taken, or vectors of another width.
    """
    for w in words:
        widths, wanted = [v.shape[-1] for v in w.vectors], [p.width for p in parts]
        if widths != wanted:
            raise InputError(
                f"{w.shown} has words of width {widths}, the text encoders of this pipeline have {wanted}; use words "
                "that were made for this kind of base model"
            )
    with _lock:
        try:
            for tokenizer in {id(p.tokenizer): p.tokenizer for p in parts}.values():
                teach(tokenizer, words)
            for i, part in enumerate(parts):
                reader = _reader_of(part.encoder)
                reader.known = {**reader.known, **{n: (w, i) for w in words for n in w.ids}}
                reader.settle()
                for w in words:
                    w.readers.append(reader)
        except BaseException:
            take_off(parts, words)
            raise


def take_off(parts: Sequence[TextPart], words: Sequence[Words]) -> None:
    """Undo `put_on`; may be called again."""
    gone = {n for w in words for n in w.ids}
    with _lock:
        for part in parts:
            unteach(part.tokenizer, words)
        for w in words:
            for reader in w.readers:
                reader.known = {n: v for n, v in reader.known.items() if n not in gone}
                reader.settle()
            w.readers.clear()
