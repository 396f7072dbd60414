"""The ops: mathematics with one stem each, independent of any host model."""

from .align_face import align_face
from .dispatch import explain
from .id_attention import id_attention
from .kv_bank import kv_bank
from .semantic_alignment import semantic_alignment
from .stage_tokens import stage_tokens
from .token_attention_loss import token_attention_loss

__all__ = [
    "align_face",
    "explain",
    "id_attention",
    "kv_bank",
    "semantic_alignment",
    "stage_tokens",
    "token_attention_loss",
]
