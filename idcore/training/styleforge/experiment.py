"""StyleForge on drawn styles against DreamBooth without Aux, over several seeds.

    python -m idcore.training.styleforge.experiment --base runs/unseeing/model --docs docs

For each style and seed: DreamBooth without Aux (the StyleRef term alone), StyleForge, and Multi-StyleForge, with the
same number of steps and of StyleRef samples in a step, each drawn at every value of --guidance. The base never saw the
styles where `idcore train tiny-sd --set without_styles=pencil,oil,cartoon` made it. Resumable: what is done is passed
over.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...errors import told
from ...results import is_result
from ...systems.lora import load_lora
from ...systems.styleforge import StyleWords
from ...workflows import write_text
from ..bases.tiny_sd import TinySDBase
from ..commands import Say
from ..experiments import parser_of
from .config import load_config
from .drawn import person, place
from .exam import Exam
from .experiment_page import report
from .run import StyleData, train_styleforge

TARGETS = ("pencil", "oil", "cartoon", "duotone")  # painted; Aux images show people in the others by turns
METHODS = {
    "DreamBooth without Aux": ("loss.aux=0", "loop.batch=2"),
    "StyleForge": ("loop.batch=4",),
    "Multi-StyleForge": ("loop.batch=4",),
}
UNTRAINED = "no training"
PEOPLE, PLACES, AUX = 10, 6, 16  # pictures
REF_SEED, AUX_SEED = 5_100_000, 5_200_000  # of the people on them
GUIDANCE = (2.0, 1.0)  # of the drawing, chosen on seed 7; Stable Diffusion is drawn with it, tiny-sd needs none
CHANGES = (
    "loop.steps=300", "loop.ema=0.95", "tune.text_encoder=true", "words.style=[V] style,a photo of [V] style",
    "words.background=[W] style,a photo of [W] style", "words.aux=style,a photo of style", "loop.validate_every=0",
    "loop.save_every=1000", "loop.trackers=", "pictures.mix=false",
)  # fmt: skip


def data_of(target: str, seed: int, multi: bool) -> StyleData:
    """StyleRef and Aux images of a style; other people for each seed."""
    first, others = 1000 * seed + 100 * TARGETS.index(target), [s for s in TARGETS if s != target]
    people = [person(REF_SEED + first + i, [target])[0] for i in range(PEOPLE)]
    places = [place(REF_SEED + first + i, target) for i in range(PLACES)]
    aux = [person(AUX_SEED + first + i, [others[i % len(others)]])[0] for i in range(AUX)]
    return StyleData(None, aux, people, places) if multi else StyleData([*people, *places], aux)


def words_of(method: str) -> StyleWords:
    return StyleWords("[V] style", "[W] style" if method.startswith("Multi") else "")


def run(
    out: Path, seeds: Sequence[int], targets: Sequence[str], changes: Sequence[str], say: Say,
    base: TinySDBase | None = None, guidance: Sequence[float] = GUIDANCE,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure what is missing. A row for each seed, style, method and guidance."""
    out.mkdir(parents=True, exist_ok=True)
    base = base or TinySDBase.from_package()
    exam: Exam | None = None
    rows = []
    for seed in seeds:
        for target in targets:
            for method in (*METHODS, *([UNTRAINED] if seed == seeds[0] else [])):
                folder = out / f"seed{seed}" / target / method.replace(" ", "-")
                missing = [g for g in guidance if not measures_of(folder, g).exists()]
                if missing:
                    exam = exam or open_exam(base, out, guidance)
                    _one(exam, base, folder, (seed, target, method), missing, changes, say)
                for g in guidance:
                    rows.append({"seed": seed, "target": target, "method": method, "guidance": g})
                    rows[-1] |= json.loads(measures_of(folder, g).read_text())
    return {**json.loads((out / "exam.json").read_text()), "rows": rows}


def measures_of(folder: Path, guidance: float) -> Path:
    """Where a run's figures at a guidance are; its pictures lie beside them."""
    return folder / f"measures-{guidance:g}.json"


def open_exam(base: TinySDBase, out: Path, guidance: Sequence[float]) -> Exam:
    """The exam on a base as it is; what is known of both goes to OUT/exam.json."""
    exam = Exam(base)
    for g in guidance:
        exam.remember(words_of(""), g)
    shipped = exam.by_word() if base.name == "tiny-sd" else Exam(TinySDBase.from_package()).by_word()
    told_of = {"name": base.name, "by word": exam.by_word()}
    config = Path(base.name) / "config.json"
    if config.is_file():
        told_of["training"] = json.loads(config.read_text()).get("training")
    write_text(
        out / "exam.json",
        json.dumps({"judge": {"right": exam.styles.right, "shipped base by word": shipped}, "base": told_of}, indent=1),
    )
    return exam


def _one(
    exam: Exam, base: TinySDBase, folder: Path, what: tuple[int, str, str], guidance: Sequence[float],
    changes: Sequence[str], say: Say,
) -> None:  # fmt: skip
    """Train one style by one method where it is not there yet, draw with it, write its measures."""
    seed, target, method = what
    folder.mkdir(parents=True, exist_ok=True)
    on: Any = contextlib.nullcontext()
    if method in METHODS:
        config = load_config(None, [*CHANGES, *METHODS[method], *changes, f"loop.seed={seed}"], "tiny-sd")
        data, made, start = data_of(target, seed, method.startswith("Multi")), folder / "model", time.process_time()
        if not is_result(made):
            going_on = any(folder.glob("checkpoints/step-*"))
            made = train_styleforge(config, data, folder, base=base, resume=going_on)
            say(f"seed {seed}, {target}, {method}: trained, {time.process_time() - start:.0f} s of CPU")
        on = load_lora(base.pipe, made / "styleforge.safetensors")
    with on:
        for g in guidance:
            figures, pictures = exam(target, words_of(method), g)
            file = measures_of(folder, g)
            _row(pictures).save(file.with_suffix(".png"))
            write_text(file, json.dumps(figures))
            found = ", ".join(f"{k} {v:.2f}" for k, v in figures.items())
            say(f"seed {seed}, {target}, {method}, guidance {g:g}: {found}")


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (64 * len(pictures), 64))
    for i, p in enumerate(pictures):
        row.paste(p, (64 * i, 0))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("styleforge.experiment", __doc__, "runs/styleforge", "of idcore train styleforge")
    parser.add_argument("--base", type=Path, default=None, help="result of idcore train tiny-sd; default: the shipped")
    parser.add_argument("--guidance", default=",".join(f"{g:g}" for g in GUIDANCE), help="pictures are drawn at each")
    parser.add_argument("--styles", default="pencil,oil,cartoon", help=f"of {', '.join(TARGETS)}")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    def all_of_it() -> None:
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        seeds, styles = [int(s) for s in options.seeds.split(",")], options.styles.split(",")
        base = TinySDBase.from_folder(options.base) if options.base else TinySDBase.from_package()
        guidance = [float(g) for g in options.guidance.split(",")]
        found = run(options.out, seeds, styles, options.changes, say, base, guidance)
        settings = [*CHANGES, *options.changes]
        for path in report(options.out, found, settings, options.docs or options.out / "report"):
            print(path)

    return told(all_of_it)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["data_of", "report", "run"]
