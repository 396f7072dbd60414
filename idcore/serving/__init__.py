"""What a server or an app around the engine needs: engines behind one interface, dynamic batching, enrolled people."""

from .batcher import Batcher, Closed, QueueFull, Stopped, Ticket
from .engines import Engine, SdxlEngine, TinyEngine, load_engine
from .requests import DrawRequest
from .store import IdentityStore

__all__ = [
    "Batcher",
    "Closed",
    "DrawRequest",
    "Engine",
    "IdentityStore",
    "QueueFull",
    "SdxlEngine",
    "Stopped",
    "Ticket",
    "TinyEngine",
    "load_engine",
]
