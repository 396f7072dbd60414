"""What came of a preparation: duplicates found, pictures counted by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .options import Drop, PrepareConfig, Record


@dataclass
class Report:
    """What came of it: `found` pictures, `records` kept, `dropped` with reasons, `reused` pictures examined before."""

    found: int
    records: list[Record]
    dropped: list[Drop]
    reused: int = 0
    no_caption: int = 0
    out: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.counts = Counter(d.reason for d in self.dropped)

    def table(self) -> str:
        """Counts by reason, with an example of each."""
        share = 100 / max(self.found, 1)
        rows = [("kept", len(self.records), ""), ("dropped", len(self.dropped), "")]
        for reason, n in self.counts.most_common():
            example = next(d for d in self.dropped if d.reason == reason)
            rows.append((f"  {reason}", n, f"e.g. {example.id}: {example.detail}"))
        if self.no_caption:
            rows.append(("kept without a caption", self.no_caption, ""))
        sizes = Counter(tuple(r.bucket) for r in self.records)
        rows += [(f"  bucket {w}x{h}", n, "") for (w, h), n in sizes.most_common(8)]
        lines = [f"{name:<24}{n:>9,}{n * share:>7.1f} %  {text}".rstrip() for name, n, text in rows]
        return "\n".join([f"{'pictures':<24}{self.found:>9,}", *(line[:160] for line in lines)])


def without_duplicates(records: list[Record], config: PrepareConfig) -> tuple[list[Record], list[Drop]]:
    """The records without those that look like an earlier one, and the drops."""
    if config.duplicates == "keep":
        return records, []
    first: dict[str, str] = {}
    bits = np.empty((len(records), 32), np.uint8)
    kept, drops, ones = [], [], np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    for r in records:
        if r.pixels in first:
            drops.append(Drop(r.id, "duplicate", f"the same pixels as {first[r.pixels]}"))
            continue
        if config.duplicates == "near":
            mine = np.frombuffer(bytes.fromhex(r.looks), np.uint8)
            away = ones[bits[: len(kept)] ^ mine].sum(1)
            if len(kept) and away.min() <= config.near:
                other = kept[int(away.argmin())].id
                drops.append(Drop(r.id, "near duplicate", f"{away.min()} of 256 signs differ from {other}"))
                continue
            bits[len(kept)] = mine
        first[r.pixels] = r.id
        kept.append(r)
    return kept, drops
