"""Mean and spread of names' word embeddings: where a text encoder expects people to lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .reader import text_parts


def name_statistics(pipe: Any, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Per-dimension mean and standard deviation of names' embeddings, both text encoders' side by side.

    StableIdentity takes 326 names of celebrities whose first and last name are one token each. Here, every token of
    every name counts that is one token long as a word (names that fall into pieces are left out).

    Args:
        pipe: A diffusers pipeline (SD 1.x, SD 2.x, SDXL).
        names: Such as "Ada Lovelace"; each word is one sample.

    Returns:
        mean and std [sum of widths], float32 on the CPU.

    Raises:
        InputError: fewer than two words are one token of every text encoder.
    """
    words = sorted({w for name in names for w in name.split()})
    parts = text_parts(pipe)
    found = []
    for word in words:
        ids = [p.tokenizer(word, add_special_tokens=False)["input_ids"] for p in parts]
        if all(len(i) == 1 for i in ids):
            rows = [p.encoder.get_input_embeddings().weight[i[0]].float().cpu() for p, i in zip(parts, ids)]
            found.append(torch.cat(rows))
    if len(found) < 2:
        raise InputError(
            f"name_statistics: of {len(words)} words of names {len(found)} are one token of this tokenizer, at least 2 "
            "are needed; give common first and last names"
        )
    table = torch.stack(found).detach()
    return table.mean(0), table.std(0)
