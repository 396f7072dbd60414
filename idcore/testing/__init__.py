"""Helpers for tests of code that embeds idcore; shipped with the package."""

from .cases import MODEL_CASES, ODD_CASES, SDXL_LAYERS, Case, make_inputs, random_case
from .loss_cases import SemanticCase, TokenLossCase, random_semantic_case, random_token_loss_case
from .parity import Parity, assert_gradients, assert_parity, check_gradients, check_parity
from .stage_cases import StageTokensCase, random_stage_case

__all__ = [
    "MODEL_CASES", "ODD_CASES", "SDXL_LAYERS", "Case", "Parity", "SemanticCase", "StageTokensCase", "TokenLossCase",
    "assert_gradients", "assert_parity", "check_gradients", "check_parity", "make_inputs", "random_case",
    "random_semantic_case", "random_stage_case", "random_token_loss_case",
]  # fmt: skip
