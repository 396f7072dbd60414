"""What `idcore augment` does with its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..bases.opening import TINY_SD
from ..settings import load
from .lists import check_prompts, read_names, read_prompts
from .on_ray import Cluster
from .options import AugmentConfig, Prompt
from .report import AugmentReport
from .run import augment
from .setup import Job, NamedModels

# Between pictures of one person by tiny-sd, whose people lie nearer to each other than photographed ones, for whom the
# recogniser's own limit is meant: 95 of 100 pictures of one lie within 0.31, the medians of one and of two are 0.23 and
# 0.29 (our choice).
DRAWN_LIMIT = 0.35


def run_augment(
    *,
    out: Path,
    base: str,
    names: str | None,
    prompts: str | None,
    source_prompts: Sequence[str],
    clip: Path | None,
    text: str | None,
    faces: str,
    unet: Path | None,
    dtype: str,
    device: str,
    config: Path | None,
    changes: Sequence[str],
    cluster: Cluster | None,
    say: Callable[[str], Any] = print,
) -> AugmentReport:
    """Make the data set; see `idcore augment --help`.

    Raises:
        InputError: lists, settings or models that do not fit, or no pair was kept.
    """
    tiny = base == TINY_SD
    if not tiny and (names is None or prompts is None):
        raise InputError(
            "augment: --names FILE and --prompts FILE are missing (one a line, {person} in the prompts); only "
            f"--base {TINY_SD} brings its own. A shipped set of prompts: --prompts dreamidentity-edits"
        )
    settings = load(AugmentConfig, config, changes)
    if tiny and settings.identity is None:
        settings = replace(settings, identity=DRAWN_LIMIT)
    how = text or ("drawn" if tiny else "clip")
    if how == "clip" and clip is None:
        raise InputError(
            "augment: text alignment is judged by CLIP: give --clip FOLDER (such as a copy of "
            "openai/clip-vit-large-patch14), or leave it out with --text none"
        )
    models = NamedModels(
        base, None if unet is None else str(unet), dtype, device, faces, how, None if clip is None else str(clip)
    )
    sources = {} if not source_prompts else {
        "source_prompts": tuple(check_prompts([Prompt(p) for p in source_prompts], "--source-prompt"))
    }  # fmt: skip
    job = Job(models, settings, tuple(read_prompts(prompts or "tiny-augment")), **sources)
    report = augment(read_names(names or TINY_SD), out, job, cluster=cluster)
    say(report.table())
    if not report.pairs:
        raise InputError(f"augment: no pair was kept of {report.names} names; reasons in {out / 'dropped.jsonl'}")
    say(f"{out}: {len(report.pairs):,} pairs of {report.used:,} people; examples: {out / 'examples.png'}")
    return report
