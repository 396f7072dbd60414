"""What SeFi-IDE's parts do, in small: with and without the attention loss, with one stage and with five.

    python -m idcore.training.sefi_ide.ablation --out runs/sefi-ablation --docs docs

On tiny-sd, drawn people whom no training saw, one photo each; the prompts, the people and the judges are those of the
table of all systems (`idcore.training.personal.table`). Resumable: what is measured is passed over.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...attach import attach
from ...attention.staged import AttentionLoss
from ...errors import InputError
from ...identity import Identity
from ...metrics.drawn_attributes import DrawnExam, drawn_photo, table_people
from ...systems.sefi_files import load_tokens, stages_of
from ...systems.sefi_ide import stage_text, staged_unet, watching
from ...workflows import write_text
from ..bases.latent import LatentBase
from ..bases.opening import TINY_SD, open_text_base
from ..commands import Say
from ..data.few import FewPictures
from ..experiments import carry_out, cell, mean_of, parser_of, table, write_page
from ..personal.run import native_edge, photos
from ..personal.table import EDITS, GALLERY, examined
from .config import SeFiTrainConfig, load_config
from .run import train_sefi_ide

# Our choice: what a CPU core trains in a quarter of a minute a person.
CHANGES = (
    "loop.steps=120", "loop.batch=4", "loop.lr=1e-3", "loop.trackers=", "loop.keep=1", "loop.save_every=1000",
    "validation.faces=null",
)  # fmt: skip
VARIANTS = {
    "five stages, lambda 0.003": (),
    "lambda 0.0001": ("loss.attention=0.0001",),
    "without attention loss": ("loss.attention=0",),
    "one stage": ("words.stages=1",),
}
COLUMNS = {
    "distance": "distance to the person", "rank1": f"nearest of {GALLERY}", "found": "face found",
    "adherence": "asked attributes", "background": "background", "style": "style", "expression": "expression",
    "pose": "pose", "attention": "attention's distance", "seconds": "CPU seconds",
}  # fmt: skip
PEOPLE = 1  # learned for each seed
TIMES = (50, 150, 300, 500, 700, 850, 950)  # timesteps at which the attention's distance is taken
TILE = 96


def run(
    out: Path, seeds: Sequence[int], *, people: int = PEOPLE, base: str = TINY_SD, changes: Sequence[str] = (),
    say: Say = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Learn and measure what is missing; a row for each seed, person and variant.

    Raises:
        InputError: more people than there are, or as `idcore train sefi-ide`.
    """
    if people * len(seeds) > GALLERY:
        raise InputError(f"ablation: {people} people for each of {len(seeds)} seeds, there are {GALLERY}")
    model, (who, exam) = open_text_base(base), table_people(GALLERY)
    rows = []
    for number, seed in enumerate(seeds):
        for place in range(number * people, (number + 1) * people):
            for name, own in VARIANTS.items():
                folder = out / f"seed{seed}" / f"person{place}" / name.replace(" ", "-").replace(",", "")
                if not (folder / "measures.json").exists():
                    config = load_config(None, [*CHANGES, *changes, *own, f"loop.seed={seed}"], base)
                    found = _learned(config, model, exam, who[place], place, folder)
                    write_text(folder / "measures.json", json.dumps(found))
                rows.append({"seed": seed, "person": place, "run": name, "folder": str(folder.relative_to(out))})
                rows[-1] |= json.loads((folder / "measures.json").read_text())
                say(f"seed {seed}, person {place}, {name}: " + _told(rows[-1]))
    return rows


def _learned(
    config: SeFiTrainConfig, base: LatentBase, exam: DrawnExam, who: int, place: int, folder: Path
) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)  # half a training cannot be timed
    photo, start = drawn_photo(who), time.process_time()
    made = train_sefi_ide(config, folder, images=[photo], base=base)
    seconds = time.process_time() - start
    person = load_tokens(made / "person.safetensors")
    with attach(base.pipe, None, person):
        scores = examined(base.pipe, config.person.placeholder, exam, place, folder)
    return {**scores, "attention": attention_distance(config, base, person, photo), "seconds": seconds}


@torch.no_grad()
def attention_distance(config: SeFiTrainConfig, base: LatentBase, person: Identity, photo: Image.Image) -> float:
    """L_attn of a person on the photo, unweighted: the mean over `TIMES`, from the same noise for everybody."""
    stages, meta = stages_of(person), person.meta
    widths = [int(w) for w in meta["widths"]]
    words = [w.unflatten(0, (stages, 2)) for w in person.tokens[0].split(widths, -1)]
    source = FewPictures([photos(config, [photo], "sefi-ide")], native_edge(base))
    pixels = next(iter(source.micro_batches(0, 0, 0, 1, 1, 1))).pixels
    latents = base.encode_pictures(pixels).expand(len(TIMES), -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    said = [config.texts(config.person.prompts)[0]] * len(TIMES)
    with staged_unet(base.unet, stages) as staged:
        x, t = base.noised(latents, noise, (torch.tensor(TIMES) + 0.5) / 1000)
        staged.begin(t, base.device)
        text, _ = stage_text(
            base.pipe, said, words, staged.stage, placeholder=config.person.placeholder,
            class_word=config.person.class_word,
        )  # fmt: skip
        plain = base.text(said[:1], *pixels.shape[-2:]).expand(len(TIMES))
        loss = AttentionLoss(base.unet, staged, text, weight=1.0, form=config.loss.attention_form)
        with watching(base.unet, loss):
            base.predict(x, t, replace(plain, embeds=text))
    return float(loss.total())


def _told(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {row[k]:.3f}" for k in COLUMNS if k in row)


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path) -> list[Path]:
    """docs/results/sefi-ablation.json, docs/sefi-ablation.md and docs/sefi-ablation.png."""
    seeds = sorted({r["seed"] for r in rows})
    facts = {"seeds": seeds, "settings": list(CHANGES), "variants": {k: list(v) for k, v in VARIANTS.items()}}
    cells = {name: [cell([mean_of(rows, name, seed, k) for seed in seeds]) for k in COLUMNS] for name in VARIANTS}
    page = _words(table(COLUMNS, cells.items()), seeds, len({r["person"] for r in rows}))
    written = [*write_page(docs, "sefi-ablation", facts, rows, page), docs / "sefi-ablation.png"]
    _sheet(out, [r for r in rows if r["person"] == rows[0]["person"]]).save(written[-1])
    return written


def _words(lines: Sequence[str], seeds: Sequence[int], people: int) -> str:
    return "\n".join([
        "# The parts of SeFi-IDE, in small", "",
        f"On tiny-sd: {people} drawn people whom no training saw, one 64 px photo each, other people for each of "
        f"{len(seeds)} seed(s); eight prompts (`{EDITS}`), four steps, the same noise for all. Means over the seeds, "
        "with half the range between them. The recogniser's distance is to a neutral drawing of the person (a picture "
        "without a face counts 1.5); the attention's distance is L_attn on the photo, unweighted.", "",
        *lines, "",
        f"Changed settings: `{' '.join(CHANGES)}`. All runs: `docs/results/sefi-ablation.json`. Again: `python -m "
        "idcore.training.sefi_ide.ablation --docs docs`.", "",
        "![drawings by variant](sefi-ablation.png)", "",
        "One person: the photo on the left, then a column for each prompt; a row for each variant, in the table's "
        "order.",
    ])  # fmt: skip


def _sheet(out: Path, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    strips = [Image.open(out / r["folder"] / "drawn.png") for r in rows]
    place = rows[0]["person"]
    photo = drawn_photo(table_people(max(2, place + 1))[0][place]).resize((TILE, TILE), Image.Resampling.NEAREST)
    columns = strips[0].width // 64
    sheet = Image.new("RGB", ((1 + columns) * TILE, len(strips) * TILE), "white")
    for y, strip in enumerate(strips):
        sheet.paste(photo, (0, y * TILE))
        sheet.paste(strip.resize((columns * TILE, TILE), Image.Resampling.NEAREST), (TILE, y * TILE))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = parser_of("sefi_ide.ablation", __doc__, "runs/sefi-ablation", "a setting, for all variants")
    parser.add_argument("--people", type=int, default=PEOPLE, help="learned for each seed")
    parser.add_argument("--base", default=TINY_SD)

    def rows(o: Any, say: Say) -> list[dict[str, Any]]:
        return run(o.out, o.seeds, people=o.people, base=o.base, changes=o.changes, say=say)

    return carry_out(parser, rows, report, argv)


if __name__ == "__main__":
    sys.exit(main())
