"""Readers of arguments for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def some_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reader of names with commas between, for argparse."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(n for n in text.split(",") if n)
        wrong = [n for n in names if n not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(allowed)}")
        return names

    return parse


def count(text: str) -> int:
    """Of an argument such as "2"."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Of an argument such as "1,2"."""
    return tuple(map(count, text.split(",")))
