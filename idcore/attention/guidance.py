"""Of which parts a UNet batch is made: the halves of classifier-free guidance and their relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InputError
from .running import Running

ROWS = ("uncond", "cond")
HALVES = (("cond",), ("uncond", "cond"))
# Pipelines of diffusers whose `do_classifier_free_guidance` is not what their batches follow.
_UNTRUE = ("StableDiffusionPanoramaPipeline", "LEditsPPPipelineStableDiffusionXL")


def guidance_rows(cfg: Any, pipe: Any) -> Callable[[], tuple[str, ...]]:
    """A function that tells, at each call, of which parts a UNet batch is made.

    Args:
        cfg: "auto", bool, or the order of the parts, e.g. ("cond", "uncond", "uncond") for InstructPix2Pix.
        pipe: the pipeline given to `attach` (None for a bare UNet), or what tells the one that runs.

    Raises:
        InputError: another value; or "auto" with a pipeline that does not tell.
    """
    running = pipe if isinstance(pipe, Running) else Running(pipe)
    if cfg is True or cfg is False:
        return _Fixed(HALVES[cfg is True])
    if isinstance(cfg, (tuple, list)) and "cond" in cfg and all(r in ROWS for r in cfg):
        return _Fixed(tuple(cfg))
    if cfg != "auto":
        raise InputError(
            f"attach: cfg must be 'auto', True, False or the order of a batch's parts such as {HALVES[1]}, got {cfg!r}"
        )
    if not running.alone:
        _require_telling(running())
    return _AskPipe(running)


def _require_telling(pipe: Any) -> None:
    kind = type(pipe)
    untrue = hasattr(kind, "image_guidance_scale") or any(base.__name__ in _UNTRUE for base in kind.__mro__)
    if untrue or not hasattr(kind, "do_classifier_free_guidance"):
        raise InputError(
            f"attach: {kind.__name__} does not tell how its batches are made; give cfg=True where they are "
            "[uncond, cond] halves, cfg=False without guidance, or the order of the parts as a tuple"
        )


class _Fixed:
    """The same parts at each call."""

    def __init__(self, rows: tuple[str, ...]) -> None:
        self.rows = rows

    def __call__(self) -> tuple[str, ...]:
        return self.rows


class _AskPipe:
    """Reads the guidance state of the pipeline that runs."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(self) -> tuple[str, ...]:
        pipe = self.running()
        if pipe is None and self.running.alone:
            return HALVES[0]
        if pipe is None:
            raise InputError("attach: the pipeline that was attached is gone; attach to its UNet with cfg=...")
        _require_telling(pipe)
        # The pipeline's state begins with its first call: without it, something else runs the UNet.
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        if guided is None:
            raise InputError(
                f"attach: the UNet runs outside of the {type(pipe).__name__} that was attached, so its guidance is not "
                "known; attach to the pipeline that runs, or give cfg=True, False or the order of the batch's parts"
            )
        rows = HALVES[1] if guided else HALVES[0]
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            rows = (*rows, "cond")
        return rows
