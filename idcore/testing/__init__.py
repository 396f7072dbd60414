"""Helpers for tests of code that embeds idcore; shipped with the package."""

from .cases import MODEL_CASES, ODD_CASES, SDXL_LAYERS, Case, make_inputs, random_case
from .parity import Parity, assert_parity, check_parity

__all__ = [
    "MODEL_CASES", "ODD_CASES", "SDXL_LAYERS", "Case", "Parity", "assert_parity", "check_parity", "make_inputs",
    "random_case",
]  # fmt: skip
