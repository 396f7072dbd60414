"""Tile sizes per kernel, GPU generation, element size and padded head dim: a table, no search at run time.

The values are such that no kernel spills (`ahead.read` tells it without a GPU); not yet tuned on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Image tokens of a program, keys of an inner block, Triton's num_warps and num_stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# (kernel, 16-bit or 32-bit, padded head dim) -> Tile; a generation's own table goes before "any".
TABLES: dict[str, dict[tuple[str, int, int], Tile]] = {
    "any": {
        ("forward", 2, 16): Tile(64, 64, 4, 2),
        ("forward", 2, 32): Tile(64, 64, 4, 2),
        ("forward", 2, 64): Tile(64, 64, 4, 2),
        ("forward", 2, 128): Tile(32, 64, 4, 2),
        ("forward", 2, 256): Tile(32, 32, 8, 2),
        ("forward_bias", 2, 64): Tile(32, 64, 4, 2),
        ("forward", 4, 16): Tile(16, 32, 4, 1),
        ("forward", 4, 32): Tile(16, 32, 4, 1),
        ("forward", 4, 64): Tile(16, 32, 4, 1),
        ("forward", 4, 128): Tile(16, 16, 8, 1),
        ("rows", 2, 16): Tile(32, 64, 4, 1),
        ("rows", 2, 32): Tile(32, 64, 4, 1),
        ("rows", 2, 64): Tile(32, 64, 4, 1),
        ("rows", 2, 128): Tile(32, 32, 8, 1),
        ("rows", 2, 256): Tile(16, 32, 8, 1),
        ("rows", 4, 16): Tile(16, 32, 4, 1),
        ("rows", 4, 32): Tile(16, 32, 4, 1),
        ("rows", 4, 64): Tile(16, 32, 4, 1),
        ("rows", 4, 128): Tile(16, 16, 8, 1),
        ("coupling", 2, 128): Tile(64, 32, 8, 1),
        ("loss", 2, 16): Tile(64, 128, 8, 1),
        ("loss", 2, 32): Tile(64, 128, 8, 1),
        ("loss", 2, 64): Tile(64, 128, 8, 1),
        ("loss", 2, 128): Tile(32, 128, 8, 1),
        ("loss", 2, 256): Tile(32, 32, 8, 1),
        ("loss_bwd", 2, 16): Tile(32, 128, 8, 1),
        ("loss_bwd", 2, 32): Tile(32, 128, 8, 1),
        ("loss_bwd", 2, 64): Tile(32, 64, 8, 1),
        ("loss_bwd", 2, 128): Tile(32, 64, 8, 1),
        ("loss_bwd", 2, 256): Tile(16, 32, 8, 1),
        ("text", 2, 16): Tile(32, 128, 8, 1),
        ("text", 2, 32): Tile(32, 128, 8, 1),
        ("text", 2, 64): Tile(32, 64, 8, 1),
        ("text", 2, 128): Tile(32, 64, 8, 1),
        ("text", 2, 256): Tile(16, 32, 8, 1),
        ("gather", 2, 16): Tile(128, 64, 8, 3),
        ("gather", 2, 32): Tile(128, 64, 8, 3),
        ("gather", 2, 64): Tile(128, 64, 8, 3),
        ("gather", 2, 128): Tile(128, 64, 8, 2),
        ("gather", 2, 256): Tile(64, 32, 8, 2),
        ("merge", 2, 16): Tile(128, 0, 8, 1),
        ("merge", 2, 32): Tile(128, 0, 8, 1),
        ("merge", 2, 64): Tile(128, 0, 8, 1),
        ("merge", 2, 128): Tile(64, 0, 8, 1),
        ("merge", 2, 256): Tile(32, 0, 8, 1),
        ("merge", 4, 16): Tile(128, 0, 8, 1),
        ("merge", 4, 32): Tile(128, 0, 8, 1),
        ("merge", 4, 64): Tile(128, 0, 8, 1),
        ("merge", 4, 128): Tile(64, 0, 8, 1),
        ("keys", 2, 16): Tile(64, 32, 8, 1),
        ("keys", 2, 32): Tile(64, 32, 8, 1),
        ("keys", 2, 64): Tile(64, 32, 8, 1),
        ("keys", 2, 128): Tile(32, 32, 8, 1),
        ("keys", 2, 256): Tile(32, 32, 8, 1),
        ("keys", 4, 16): Tile(16, 32, 4, 1),
        ("keys", 4, 32): Tile(16, 32, 4, 1),
        ("keys", 4, 64): Tile(16, 32, 4, 1),
        ("keys", 4, 128): Tile(16, 16, 8, 1),
    },
    # 77 tokens in one block, so that one kernel gives dq and dk: with wgmma and tcgen05 the tiles of K and the gradient
    # stay in shared memory; with mma.sync they would be held in registers, and spill
    "sm90": {("text", 2, 64): Tile(32, 128, 8, 1), ("loss_bwd", 2, 64): Tile(32, 128, 8, 1)},
    "sm100": {("text", 2, 64): Tile(32, 128, 8, 1), ("loss_bwd", 2, 64): Tile(32, 128, 8, 1)},
}
# Under the interpreter every block costs the same whatever its size, so tiles are few and big.
INTERPRETED = Tile(256, 128, 4, 1)


# whose entry serves where a kernel has none
OTHERWISE = {
    "forward_bias": ("forward",),
    "coupling": ("rows",),
    "loss": ("rows",),
    "loss_bwd": ("rows",),
    "text": ("keys",),
    "gather": ("keys",),
}


def padded(head_dim: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, capability: int, element_size: int, padded_dim: int, interpreted: bool = False) -> Tile:
    """Tile of a kernel, a name of the table, on a GPU generation (80, 90, 100, ...).

    Raises:
        KeyError: no entry for this element size or padded head dim.
    """
    if interpreted:
        return INTERPRETED
    for name in (kernel, *OTHERWISE.get(kernel, ())):
        key = (name, element_size, padded_dim)
        for table in (TABLES.get(f"sm{capability}", {}), TABLES["any"]):
            if key in table:
                return table[key]
    raise KeyError(key)


def split(count: int, block: int) -> tuple[int, int, int]:
    """Cut `count` keys into (block, keys covered by whole blocks,
    last block or 0); the last is a power of two >= 16."""
    whole = count // block * block
    rest = count - whole
    return block, whole, min(padded(rest), block) if rest else 0


def unrolled(element_size: int, padded_dim: int) -> bool:
    """Whether forward's loops over the keys are unrolled: faster, but wide tiles would spill."""
    return element_size == 2 and padded_dim <= 128
