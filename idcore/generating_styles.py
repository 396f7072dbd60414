"""Styles of `idcore generate`: LoRA files, or the result folders of `idcore train styleforge`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .results import is_result, read_result


def style_file(path: Path) -> Path:
    """The LoRA of a result folder; any other path unchanged.

    Raises:
        InputError: the folder holds a whole pipeline.
    """
    found = Path(path) / read_result(path).weights if is_result(path) else Path(path)
    if (found / "model_index.json").is_file():
        raise InputError(f"--style {path} is a whole pipeline, no LoRA; draw with --base {found}")
    return found


def unsaid_words(styles: Sequence[Path], texts: Sequence[str]) -> list[str]:
    """A line for each style of StyleForge whose word none of the texts says: it would do little."""
    from .files import check_container
    from .systems.styleforge import style_words

    lines = []
    for path in map(style_file, styles):
        found = style_words(check_container(path, "LoRA")[1]) if path.is_file() else None
        if found is not None and not any(found.style in t or found.background and found.background in t for t in texts):
            lines.append(
                f"note: the prompt does not say {found.style!r}, the word of {path.name}; write e.g. "
                f"{found.person('a person')!r}"
            )
    return lines


def styles_on(pipe: Any, styles: Sequence[Path], scale: float | Sequence[float] = 1.0) -> contextlib.ExitStack:
    """Put LoRA on a pipeline, one beside the other; closing what comes back takes all off.

    Args:
        pipe: diffusers' pipeline, or an `IDPipeline`.
        styles: files or folders.
        scale: one for all, or one each.

    Raises:
        InputError: another number of scales. WeightsError: a file is missing, damaged, or for another model.
    """
    scales = [scale] * len(styles) if isinstance(scale, (int, float)) else list(scale)
    if len(scales) != len(styles):
        raise InputError(f"{len(styles)} styles need one --style-scale or {len(styles)}, got {len(scales)}")
    with contextlib.ExitStack() as on:
        if styles:
            from .systems.lora import load_lora

            for i, (path, s) in enumerate(zip(styles, scales)):
                on.enter_context(load_lora(pipe, style_file(path), scale=float(s), name=f"style{i}"))
        return on.pop_all()
