"""The systems that learn a person from one photo side by side, on tiny-sd and drawn people whom no training saw.

    python -m idcore.training.personal.table --out runs/personal --docs docs [--dreamidentity RESULT ...]

Of each seed other people are learned, from one photo each, by textual inversion, DreamBooth with LoRA, SeFi-IDE and,
where a trained one is given, DreamIdentity; all through the project's own loop. What they draw for the prompts of the
set `tiny-edits` is judged by `metrics.drawn_attributes`. Resumable: what is measured is passed over.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ... import prompts
from ...attach import attach
from ...errors import InputError
from ...identity import Identity
from ...metrics.drawn_attributes import DrawnExam, drawn_photo, table_people
from ...workflows import write_text
from ..bases.opening import TINY_SD, open_text_base
from ..commands import Say
from ..experiments import carry_out, parser_of
from .config import BoothConfig, InversionConfig, load_config

EDITS = "tiny-edits"
PEOPLE = 2  # learned for each seed
GALLERY = 16  # people whom a picture may be taken for
# Our choice: what a CPU core trains in half a minute a person.
COMMON = ("loop.trackers=", "loop.keep=1", "loop.save_every=1000", "validation.faces=null")
CHANGES = {
    "textual inversion": (*COMMON, "loop.steps=150", "loop.batch=4", "loop.lr=2e-2"),
    "DreamBooth-LoRA": (*COMMON, "loop.steps=100", "loop.batch=8", "loop.lr=1e-3", "tune.rank=8"),
    "SeFi-IDE": (*COMMON, "loop.steps=150", "loop.batch=4", "loop.lr=1e-3"),
}


@dataclass
class Learned:
    """A person as one system has it.

    Attributes:
        subject: what prompts say.
        on: a context in which the base's pipeline knows the person.
        seconds: that learning took, of all threads together; None: nothing was learned.
        files: what was written, to say its size.
    """

    subject: str
    on: Callable[[], Any] = contextlib.nullcontext
    seconds: float | None = None
    files: Sequence[Path] = ()


class Learners:
    """How each system learns the person of a photo.

    Args:
        base: tiny-sd.
        out: folder of the table.
        dream: result folders of `idcore train dreamidentity`, one for each seed or one for all.
        changes: settings by system, as `CHANGES`.
    """

    def __init__(self, base: Any, out: Path, dream: Sequence[Path], changes: Mapping[str, Sequence[str]]) -> None:
        self.base, self.out, self.dream, self.changes = base, out, list(dream), changes

    def systems(self) -> dict[str, Callable[[int, int, Path, int], Learned]]:
        """By name: (seed, person's seed, folder, number of the seed) -> `Learned`. The first two are bounds."""
        found = {
            "a person": self.nobody, "word made from the drawing": self.oracle, "textual inversion": self.inversion,
            "DreamBooth-LoRA": self.booth, "SeFi-IDE": self.sefi,
        }  # fmt: skip
        return found | ({"DreamIdentity": self.dreamidentity} if self.dream else {})

    def nobody(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        """The base alone."""
        return Learned("a person")

    def oracle(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        """The word that tiny-sd would know this person by: the best that its word space holds."""
        from ..tiny.people import sample_person
        from ..tiny_sd.codes import codes

        word = torch.from_numpy(codes([sample_person(np.random.default_rng(who), wildness=0.0)]))[None]
        person = Identity(word, None, "words", {"placeholder": "S*"})
        return Learned("S*", lambda: attach(self.base.pipe, None, person))

    def inversion(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        from ...text.inversion import read_words
        from .textual_inversion import train_textual_inversion

        config = self._seeded(load_config(InversionConfig, None, self.changes["textual inversion"]), seed)
        made, seconds = self._timed(train_textual_inversion, config, folder, who)
        person = read_words(made / "learned_embeds.safetensors")
        files = [made / "learned_embeds.safetensors"]
        return Learned("S*", lambda: attach(self.base.pipe, None, person), seconds, files)

    def booth(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        from ...systems.lora import load_lora
        from .dreambooth import class_pictures, train_dreambooth

        config = self._seeded(load_config(BoothConfig, None, self.changes["DreamBooth-LoRA"]), seed)
        class_pictures(config, self.base, 64, self.out)
        config = replace(config, prior=replace(config.prior, pictures=str(self.out / "class")))
        made, seconds = self._timed(train_dreambooth, config, folder, who)
        weights = made / "pytorch_lora_weights.safetensors"
        return Learned(config.person.placeholder, lambda: load_lora(self.base.pipe, weights), seconds, [weights])

    def sefi(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        from ...systems.sefi_files import load_tokens
        from ..sefi_ide.config import load_config as sefi_config
        from ..sefi_ide.run import train_sefi_ide

        config = self._seeded(sefi_config(None, self.changes["SeFi-IDE"]), seed)
        made, seconds = self._timed(train_sefi_ide, config, folder, who)
        person = load_tokens(made / "person.safetensors")
        files = [made / "person.safetensors"]
        return Learned(config.person.placeholder, lambda: attach(self.base.pipe, None, person), seconds, files)

    def dreamidentity(self, seed: int, who: int, folder: Path, number: int) -> Learned:
        from ...systems.loading import load_system
        from ...workflows import chosen_files

        result = self.dream[number % len(self.dream)]
        system = load_system(**chosen_files(str(result), {}, for_photos=True), for_photos=True)
        photo = drawn_photo(who).resize((256, 256), Image.Resampling.BICUBIC)  # detectors want larger ones
        start = time.process_time()
        person = system.encode([photo])
        seconds = time.process_time() - start
        person.save(folder / "person.safetensors")
        files = [folder / "person.safetensors"]
        return Learned("S*", lambda: attach(self.base.pipe, system, person, placeholder="S*"), seconds, files)

    def _seeded(self, config: Any, seed: int) -> Any:
        return replace(config, loop=replace(config.loop, seed=seed))

    def _timed(self, train: Callable[..., Path], config: Any, folder: Path, who: int) -> tuple[Path, float]:
        shutil.rmtree(folder, ignore_errors=True)  # half a training cannot be timed
        start = time.process_time()
        made = train(config, folder, images=[drawn_photo(who)], base=self.base)
        return made, time.process_time() - start


def run(
    out: Path, seeds: Sequence[int], *, people: int = PEOPLE, dream: Sequence[Path] = (), base: str = TINY_SD,
    changes: Mapping[str, Sequence[str]] | None = None, say: Say = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Learn and measure what is missing; a row for each seed, system and person."""
    out.mkdir(parents=True, exist_ok=True)
    who, exam = table_people(GALLERY)
    if people * len(seeds) > GALLERY:
        raise InputError(f"table: {people} people for each of {len(seeds)} seeds are more than the {GALLERY} there are")
    learners = Learners(open_text_base(base), out, dream, {**CHANGES, **(changes or {})})
    rows = []
    for place in range(people * len(seeds)):
        number = place % len(seeds)
        seed = seeds[number]
        for name, learn in learners.systems().items():
            folder = out / f"seed{seed}" / f"person{place}" / name.replace(" ", "-")
            file = folder / "measures.json"
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                measured = _measured(learn(seed, who[place], folder, number), learners.base, exam, place, folder)
                write_text(file, json.dumps(measured))
            rows.append({"seed": seed, "person": place, "run": name, **json.loads(file.read_text())})
            say(f"seed {seed}, person {place}, {name}: " + _told(rows[-1]))
    return rows


def _told(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {row[k]:.3f}" for k in ("distance", "rank1", "adherence", "seconds") if row.get(k) is not None
    )


@torch.no_grad()
def _measured(learned: Learned, base: Any, exam: DrawnExam, place: int, folder: Path) -> dict[str, Any]:
    with learned.on():
        told_of = examined(base.pipe, learned.subject, exam, place, folder)
    size = sum(f.stat().st_size for f in learned.files) / 1024 if learned.files else None
    return {**told_of, "seconds": learned.seconds, "kilobytes": size}


def examined(pipe: Any, subject: str, exam: DrawnExam, place: int, folder: Path) -> dict[str, float]:
    """Scores of what a pipeline draws of `subject`, whom the exam knows by `place`; pictures to FOLDER/drawn.png."""
    asked = prompts.load(EDITS, subject=subject)
    drawn = draw(pipe, asked.texts)
    strip = Image.new("RGB", (64 * len(drawn), 64))
    for i, picture in enumerate(drawn):
        strip.paste(picture, (64 * i, 0))
    strip.save(folder / "drawn.png")
    return exam.score(drawn, [place] * len(drawn), asked.labels)


def draw(pipe: Any, texts: Sequence[str], steps: int = 4) -> list[Image.Image]:
    """A picture of each prompt, all from the same seeds whoever is drawn."""
    return pipe(
        list(texts), num_inference_steps=steps, guidance_scale=1.0, height=64, width=64,
        generator=[torch.Generator().manual_seed(i) for i in range(len(texts))],
    ).images  # fmt: skip


def truth(out: Path, people: Sequence[int]) -> dict[str, float]:
    """What the renderer's own drawings of these people score: the best there is."""
    file = out / "truth.json"
    if not file.exists():
        who, exam = table_people(GALLERY)
        asked = prompts.load(EDITS)
        jobs = [(i, labels) for i in people for labels in asked.labels]
        drawn = [drawn_photo(who[i], number=1, **labels) for i, labels in jobs]
        write_text(file, json.dumps(exam.score(drawn, [i for i, _ in jobs], [labels for _, labels in jobs])))
    return json.loads(file.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    from .table_page import report

    parser = parser_of("personal.table", __doc__, "runs/personal")
    parser.add_argument("--people", type=int, default=PEOPLE, help="learned for each seed")
    parser.add_argument("--dreamidentity", type=Path, nargs="+", default=[], help="results of its training")
    parser.add_argument("--base", default=TINY_SD)

    def rows(o: Any, say: Say) -> list[dict[str, Any]]:
        return run(o.out, o.seeds, people=o.people, dream=o.dreamidentity, base=o.base, say=say)

    return carry_out(parser, rows, report, argv)


if __name__ == "__main__":
    sys.exit(main())
