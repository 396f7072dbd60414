"""Two evaluations side by side: what got worse beyond what chance explains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .evaluation_json import FORMAT, VERSION
from .intervals import Interval, change

WORSE, BETTER, SAME, UNSURE = "worse", "better", "no clear change", "cannot be told"


@dataclass(frozen=True)
class Change:
    """A figure before and after. `by` is after minus before with its interval; `pairs` pictures in common, 0 where the
    two were compared as unpaired; `why` where nothing can be told."""

    key: str
    before: float
    after: float
    by: Interval | None
    pairs: int
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        numbers = f"{self.key:28} {self.before:9.4f} -> {self.after:9.4f}"
        if self.by is None or np.isnan(self.by.low):
            return f"{numbers}  {self.verdict}" + (f" ({self.why})" if self.why else "")
        how = f"{self.pairs} pairs" if self.pairs else "unpaired"
        return f"{numbers}  by {self.by.mean:+.4f} [{self.by.low:+.4f}, {self.by.high:+.4f}], {how}: {self.verdict}"


def read_evaluation(path: Path) -> dict[str, Any]:
    """The object of an `evaluation.json`. Raises InputError where the file is missing or another."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"against: {path} cannot be read as an evaluation ({e}); name its evaluation.json") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"against: {path} is no evaluation of `idcore evaluate`; name its evaluation.json")
    if found.get("version") != VERSION:
        raise InputError(f"against: {path} has version {found.get('version')}, wanted {VERSION}; evaluate again")
    return found


def compare(before: dict[str, Any], after: dict[str, Any], *, seed: int = 0) -> list[Change]:
    """Changes of the figures that both have, and for which one direction is better.

    Rows with the same person, prompt and seed are pairs: then the mean of their differences is judged, which sees
    much smaller changes. A figure is worse where its 95 % interval lies wholly on the worse side of 0. Of twenty
    figures that did not change about one half will cross that line by chance (our choice of level).
    """
    return [
        _change(key, before, after, seed)
        for key, f in after["figures"].items()
        if f["better"] and key in before["figures"] and f["mean"] is not None
        and before["figures"][key]["mean"] is not None
    ]  # fmt: skip


def _change(key: str, before: dict[str, Any], after: dict[str, Any], seed: int) -> Change:
    old, new = before["figures"][key], after["figures"][key]
    why = _other_judge(key, before, after)
    if why:
        return Change(key, old["mean"], new["mean"], None, 0, UNSURE, why)
    a, b = _values(before, key), _values(after, key)
    if not a or not b:
        return _of_intervals(key, old, new)
    common = [k for k in b if k in a]
    pairs = len(common) if len(common) >= 2 and _names_all(before) and _names_all(after) else 0
    if pairs:
        by = change([a[k] for k in common], [b[k] for k in common], paired=True, seed=seed)
    else:
        by = change(list(a.values()), list(b.values()), paired=False, seed=seed)
    if np.isnan(by.low):
        return Change(key, old["mean"], new["mean"], by, pairs, UNSURE, "fewer than two pictures")
    return Change(key, old["mean"], new["mean"], by, pairs, _verdict(by.low, by.high, new["better"]))


def _verdict(low: float, high: float, better: str) -> str:
    if low <= 0 <= high:
        return SAME
    return BETTER if (low > 0) == (better == "higher") else WORSE


def _of_intervals(key: str, old: dict, new: dict) -> Change:
    """Figures of whole sets: those with intervals differ where these do not overlap."""
    if any(f.get("low") is None for f in (old, new)):
        return Change(key, old["mean"], new["mean"], None, 0, UNSURE, "this figure has no interval")
    by = Interval(new["mean"] - old["mean"], new["low"] - old["high"], new["high"] - old["low"], 0)
    return Change(key, old["mean"], new["mean"], by, 0, _verdict(by.low, by.high, new["better"]))


def _values(evaluation: dict, key: str) -> dict[tuple, float]:
    """Score by (person, prompt, seed); by file where that is not unique."""
    rows = [r for r in evaluation["rows"] if key in r["scores"]]
    if _names_all(evaluation):
        return {_name(r): r["scores"][key] for r in rows}
    return {(r["file"],): r["scores"][key] for r in rows}


def _name(row: dict) -> tuple:
    return row["person"], row["prompt"], row["seed"]


def _names_all(evaluation: dict) -> bool:
    rows = evaluation["rows"]
    return all(r["seed"] is not None for r in rows) and len({_name(r) for r in rows}) == len(rows)


def _other_judge(key: str, before: dict, after: dict) -> str:
    name = key.removeprefix("without.").split(".")[0]
    if name in after["recognisers"]:
        keys = [e["recognisers"].get(name, {}).get("key") for e in (before, after)]
        return "" if keys[0] == keys[1] else f"{name} is another recogniser now"
    last = key.split(".")[-1]
    role = {"clip_text": "clip", "clip_image": "clip", "clip": "clip", "features": "features"}.get(last)
    role = "features" if key in ("fid", "kid") else role
    if role and before["networks"].get(role) != after["networks"].get(role):
        return f"another {role} network now"
    return ""
