"""What the nodes share: types of their wires, and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from comfy_api.latest import io

CATEGORY = "idcore"
System = io.Custom("IDCORE_SYSTEM")
Person = io.Custom("IDCORE_IDENTITY")


def photos_of(image: Any) -> list[np.ndarray]:
    """ComfyUI's pictures [B, H, W, C], 0..1, as uint8 RGB."""
    return [np.asarray(photo[..., :3].cpu() * 255 + 0.5).clip(0, 255).astype(np.uint8) for photo in image]
