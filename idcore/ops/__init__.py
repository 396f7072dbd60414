"""The ops: mathematics with one stem each, independent of any host model."""

from .dispatch import explain
from .id_attention import id_attention

__all__ = ["explain", "id_attention"]
