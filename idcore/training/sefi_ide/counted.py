"""Which text tokens count in the attention loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...text.placeholders import replaced
from ...text.reader import text_parts
from .config import PersonSettings


def counted_tokens(pipe: Any, prompts: Sequence[str], person: PersonSettings, which: str) -> Tensor | None:
    """Bool [B, L] for `AttentionLoss`; None: all.

    Args:
        pipe: whose first tokenizer gives the positions (SDXL's two agree on them).
        prompts: with the placeholder, which takes one position as the class word does (`check_aligned`).
        person: placeholder and class word.
        which: "all"; "prompt", without the padding behind the end; "person", the placeholder's own.
    """
    if which == "all":
        return None
    tokenizer = text_parts(pipe)[0].tokenizer
    plain = {person.placeholder: person.class_word}
    counted = torch.zeros(len(prompts), tokenizer.model_max_length, dtype=torch.bool)
    for row, prompt in zip(counted, prompts):
        if which == "prompt":
            row[: _count(tokenizer, replaced(prompt, plain)) + 2] = True  # with begin and end
            continue
        parts = prompt.split(person.placeholder)
        for i in range(1, len(parts)):
            before = replaced(person.placeholder.join(parts[:i]), plain)
            row[1 + _count(tokenizer, before)] = True
    return counted


def _count(tokenizer: Any, text: str) -> int:
    """Tokens of a text without begin and end."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text.strip() else 0
