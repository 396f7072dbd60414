"""IdentityNet, InstantID's ControlNet (Wang et al. 2024, arXiv 2401.07519): identity tokens in place of the text's, and
the picture of five keypoints that it reads.

IdentityNet itself is a plain diffusers ControlNetModel; what is special is its text input, which stock pipelines fill
with the prompt. A hook on the ControlNet puts the identity there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from idcore.attention.guidance import guidance_rows
from idcore.attention.running import Running
from idcore.attention.sites import unwrap
from idcore.errors import InputError
from idcore.identity import Identity

# As the published weights were trained: a colour per point, and a limb from each of the others to the nose (point 2).
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
LIMB, POINT, DIM = 4, 10, 0.6  # half width of a limb and radius of a point, pixels; brightness of limbs


def keypoint_picture(points: Any, width: int, height: int) -> Image.Image:
    """The picture that IdentityNet reads: five points and their limbs on black.

    Args:
        points: [5, 2], x and y in pixels of the picture that is to be made: left eye, right eye, nose, left and right
            mouth corner as seen (`Face.points`, scaled from the photo where sizes differ).
        width, height: Of the picture that is to be made, pixels.

    Raises:
        InputError: other points, or a size below 1.
    """
    found = np.asarray(points, np.float64)
    if found.shape != (5, 2) or not np.isfinite(found).all() or width < 1 or height < 1:
        raise InputError(
            "keypoint_picture: wanted five finite points [5, 2] and a size of at least 1x1, got "
            f"{list(found.shape)} and {width}x{height}"
        )
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    for i, colour in enumerate(COLOURS):
        if i != NOSE:
            draw.polygon(_limb(found[i], found[NOSE]), fill=tuple(int(c * DIM) for c in colour))
    for (x, y), colour in zip(found.astype(int), COLOURS):
        draw.ellipse((x - POINT, y - POINT, x + POINT, y + POINT), fill=colour)
    return picture


def _limb(a: np.ndarray, b: np.ndarray) -> list[tuple[float, float]]:
    """Outline of the slender ellipse between two points."""
    (cx, cy), (dx, dy) = (a + b) / 2, a - b
    half, angle = math.hypot(dx, dy) / 2, math.atan2(dy, dx)
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    along, across = half * np.cos(turn), LIMB * np.sin(turn)
    x = cx + along * math.cos(angle) - across * math.sin(angle)
    y = cy + along * math.sin(angle) + across * math.cos(angle)
    return list(zip(x.tolist(), y.tolist()))


class IdentityNetHandle:
    """An identity on a ControlNet: swap it, take it off. Also a context manager that takes it off."""

    def __init__(
        self, controlnet: nn.Module, identity: Identity, rows: Callable[[], tuple[str, ...]], running: Running
    ) -> None:
        self.identity, self._rows, self._running = identity, rows, running
        self._hook = controlnet.register_forward_pre_hook(self._instead_of_text, with_kwargs=True)

    def __enter__(self) -> IdentityNetHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take it off: the ControlNet reads the text again. May be called again."""
        self._hook.remove()

    def _instead_of_text(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        text = kwargs.get("encoder_hidden_states")
        if not isinstance(text, Tensor):
            raise InputError("IdentityNet: the ControlNet was called without encoder_hidden_states as a keyword")
        self._running.look(module)
        rows = ("cond",) if kwargs.get("guess_mode") else self._rows()
        return args, {**kwargs, "encoder_hidden_states": self._tokens(rows, text)}

    def _tokens(self, rows: tuple[str, ...], text: Tensor) -> Tensor:
        """Tokens [B, L, E] for the batch of `text`, its parts in the order of `rows`."""
        cond, batch = self.identity.tokens, text.shape[0]
        images, rest = divmod(batch, len(rows))
        if rest or images % cond.shape[0]:
            raise InputError(
                f"IdentityNet: guidance makes a batch of {rows} and the identity has {cond.shape[0]} rows, got a batch "
                f"of {batch}; give attach and this the same cfg, and an identity of one row or one per image"
            )
        if text.shape[-1] != cond.shape[-1]:
            raise InputError(
                f"IdentityNet: the ControlNet reads tokens of width {text.shape[-1]}, the identity has "
                f"{cond.shape[-1]}; use the ControlNet that belongs to these weights"
            )
        uncond = torch.zeros_like(cond) if self.identity.uncond_tokens is None else self.identity.uncond_tokens
        parts = {"cond": cond, "uncond": uncond}
        spread = [parts[r].repeat_interleave(images // parts[r].shape[0], 0) for r in rows]
        return torch.cat(spread).to(text.device, text.dtype)


def put_identity(pipe: Any, identity: Identity, controlnet: Any, cfg: Any) -> IdentityNetHandle:
    """See `InstantID.identity_net`."""
    net = unwrap(controlnet if controlnet is not None else getattr(pipe, "controlnet", None))
    if not isinstance(net, nn.Module) or hasattr(net, "nets"):
        raise InputError(
            "IdentityNet: wanted a ControlNet pipeline, got "
            + (f"{type(net).__name__} with several; say which with controlnet=" if hasattr(net, "nets") else
               f"{type(pipe).__name__} without a controlnet; give one with controlnet=")
        )  # fmt: skip
    running = Running(pipe)
    return IdentityNetHandle(net, identity, guidance_rows(cfg, running), running)
