"""What `idcore prepare` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..settings import load
from .faces import Faces
from .options import PrepareConfig
from .prepare import prepare
from .report import Report

EDGES = {"tiny-pulid": 64}  # of the embedded base; the others' is SDXL's


def run_prepare(
    data: Path,
    out: Path | None,
    faces: Faces,
    *,
    changes: Sequence[str] = (),
    base: str | None = None,
    dtype: str = "float32",
    texts: bool = False,
    procedural: int = 0,
    seed: int = 0,
    workers: int = 1,
    dry_run: bool = False,
    say: Callable[[str], Any] = print,
) -> Report:
    """Draw pictures where asked, prepare the folder, encode it where a base is given; see `idcore prepare --help`.

    Args:
        changes: settings of `PrepareConfig` as name=value.
        texts: also encode the captions by the base.

    Raises:
        InputError: settings or data that do not fit, pictures where some should be drawn, or nothing kept.
    """
    given = [f"resolution={EDGES.get(faces.system, 1024)}", *changes]
    config = load(PrepareConfig, None, given)
    if out is None and not dry_run:
        raise InputError("prepare: --out FOLDER is missing; --dry-run needs none")
    if texts and base is None:
        raise InputError("prepare: --texts are encoded by a base model: name it with --base")
    if procedural:
        draw_into(data, procedural, seed, workers)
    report = prepare(data, out or Path(), config, faces, workers=workers, dry_run=dry_run)
    say(report.table())
    if dry_run:
        return report
    if not report.records:
        raise InputError(
            f"prepare: nothing was kept of {report.found} pictures; reasons above and in {out / 'dropped.jsonl'}"
        )
    if base is not None:
        import torch

        from ..bases.opening import open_base
        from .latents import cache_latents

        model = open_base(base, dtype=getattr(torch, dtype), device=faces.device)
        say(f"{cache_latents(out, model):,} pictures were encoded by {base}")
        if texts:
            from .texts import cache_texts

            say(f"{cache_texts(out, model):,} captions were encoded by {base}")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20
    say(f"{out}: {len(report.records):,} pictures, {size:,.1f} MiB; what was dropped: {out / 'dropped.jsonl'}")
    return report


def draw_into(data: Path, people: int, seed: int, workers: int) -> None:
    """Draw a folder of people, or go on drawing it; refuse a folder with other pictures."""
    from .procedural import procedural_folder

    said = {"people": people, "seed": seed}
    note = data / "procedural.json"
    if data.exists() and any(data.iterdir()):
        was = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if was is None or was["seed"] != seed or was["people"] > people:
            told = "other files" if was is None else f"drawn people of seed {was['seed']}, {was['people']} of them"
            raise InputError(f"prepare: {data} holds {told}; choose an empty folder for --procedural {people}")
    from ...files import replace_text

    data.mkdir(parents=True, exist_ok=True)
    replace_text(note, json.dumps(said) + "\n")
    procedural_folder(data, people, seed, workers=workers)
