"""idcore: an accelerated engine for identity-customised text-to-image diffusion.

Names are loaded when first used: `import idcore` reads no compiled code, starts no GPU and opens no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "attach": "attach",
    "detach": "attach",
    "Handle": "attach",
    "Identity": "identity",
    "id_attention": "ops",
    "explain": "ops",
    "PuLID": "systems.pulid",
    "FaceID": "systems.faceid",
    "InstantID": "systems.instantid",
    "DreamIdentity": "systems.dreamidentity",
    "SeFiIDE": "systems.sefi_ide",
    "IDPipeline": "sampling.id_pipeline",
    "TinyPipeline": "sampling.tiny_pipeline",
    "default_analyzer": "encoders.analyzer",
    "analyzer_from": "encoders.analyzer",
    "load_image": "encoders.images",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .attach import Handle, attach, detach
    from .encoders.analyzer import analyzer_from, default_analyzer
    from .encoders.images import load_image
    from .identity import Identity
    from .ops import explain, id_attention
    from .sampling.id_pipeline import IDPipeline
    from .sampling.tiny_pipeline import TinyPipeline
    from .systems.dreamidentity import DreamIdentity
    from .systems.faceid import FaceID
    from .systems.instantid import InstantID
    from .systems.pulid import PuLID
    from .systems.sefi_ide import SeFiIDE


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'idcore' has no attribute {name!r}; it exports {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
