"""Encoded prompts, each encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import InputError

Rows = tuple[Tensor, Tensor | None]
KEPT = 2048  # prompts; 330 kB each for SDXL in 16 bit (our choice)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError unless this is a list of one or more strings."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompts: wanted a list of one or more strings, got {prompts!r:.80}")


class TextCache:
    """Prompts to rows of embeddings, in main memory, the longest unused dropped first.

    Args:
        encode: prompts to (embeds [B, L, E], pooled [B, P] or None); called without gradients.
        kept: prompts that are kept.

    Attributes:
        stored: prompt to its rows ([L, E], [P] or None), or None where it has none: asked before `encode`
            (`data.texts.DiskTexts`).
    """

    def __init__(self, encode: Callable[[list[str]], Rows], kept: int = KEPT) -> None:
        self._encode, self.kept = encode, kept
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        self.stored: Callable[[str], Rows | None] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, prompts: Sequence[str]) -> Rows:
        """(embeds [B, L, E], pooled [B, P] or None), new tensors on the CPU.

        Raises:
            InputError: no list of strings, or an empty one.
        """
        check_prompts(prompts)
        for prompt in dict.fromkeys(prompts):
            if prompt in self._rows:
                continue
            found = None if self.stored is None else self.stored(prompt)
            if found is not None:
                self._rows[prompt] = found
                continue
            # One by one: the last bits of a row hang on the batch it is in, and a resumed run meets other batches.
            with torch.no_grad():
                embeds, pooled = self._encode([prompt])
            row = embeds[0].detach().cpu().clone()
            self._rows[prompt] = row, None if pooled is None else pooled[0].detach().cpu().clone()
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        rows = [self._rows[p] for p in prompts]
        while len(self._rows) > self.kept:
            self._rows.popitem(last=False)
        pooled = None if rows[0][1] is None else torch.stack([p for _, p in rows])
        return torch.stack([e for e, _ in rows]), pooled
