"""Pictures to be judged, made by a system: people x prompts x seeds, resumable, each from its own seed alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError
from ..files import file_hash
from ..prompts import PromptSet
from ..workflows import save_picture, writable_folder, write_text
from .people import Person
from .rows import METADATA, Row

PLAN = "plan.json"
Draw = Callable[[str, Any, Sequence[int]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Maker:
    """Something that draws. `draw(prompt, identity or None, seeds)` gives a picture per seed; `encode(person)` an
    identity; `key` names everything that decides the pictures; `recogniser`: key of the one that conditions them, or
    "" where unknown."""

    key: dict[str, Any]
    draw: Draw
    encode: Callable[[Person], Any]
    recogniser: str = ""
    batch: int = 16


def plan(people: Sequence[Person], prompts: PromptSet, seeds: Sequence[int], twins: bool) -> list[Row]:
    """Rows in the order in which they are made; with `twins` also each prompt and seed without identity."""
    rows = []
    for k, (prompt, labels) in enumerate(zip(prompts, prompts.labels)):
        for seed in seeds if twins or not people else ():
            rows.append(Row(_twin(k, seed), prompt, seed=seed, labels=labels))
        for person in people:
            for seed in seeds:
                file, twin = f"{_safe(person.name)}/{k:03d}_{seed}.png", _twin(k, seed) if twins else ""
                rows.append(Row(file, prompt, person.name, seed, twin, labels))
    if len({r.file for r in rows}) < len(rows):
        raise InputError("evaluate: two people have names that give one file name; rename one of them")
    return rows


def _twin(k: int, seed: int) -> str:
    return f"_without/{k:03d}_{seed}.png"


def _safe(name: str) -> str:
    """A name of a folder: letters, digits, "-", "_" and "."; never one that begins with "_" or "."."""
    text = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip("_.")
    return text or "person"


def make_pictures(
    maker: Maker,
    people: Sequence[Person],
    prompts: PromptSet,
    seeds: Sequence[int],
    folder: Path,
    *,
    twins: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Make what is not there yet and write `metadata.jsonl` and `plan.json`; returns the rows.

    Pictures are written whole or not at all, so that what stands there is done. More people, prompts or seeds may be
    asked for later; other weights or settings are refused, since the folder would mix two systems.
    """
    rows = plan(people, prompts, seeds, twins)
    writable_folder(folder)
    _claim(folder, maker, people)
    write_text(folder / METADATA, "\n".join(r.as_json() for r in rows))
    known, identities = {p.name: p for p in people}, {}
    todo = [part for part in _parts(rows, maker.batch) if not all((folder / r.file).is_file() for r in part)]
    for number, part in enumerate(todo, 1):
        row = part[0]
        if row.person and row.person not in identities:
            identities = {row.person: maker.encode(known[row.person])}
        # A part begun before is drawn whole again: in a smaller batch sums round otherwise.
        made = maker.draw(row.prompt, identities.get(row.person), [r.seed for r in part])
        for r, picture in zip(part, made):
            (folder / r.file).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / r.file).is_file():
                save_picture(picture, folder / r.file)
        if progress:
            progress(number, len(todo), "batches of pictures")
    return rows


def _parts(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Runs of at most `size` rows with one person and prompt; one person after the other, so that each is encoded
    once."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in sorted(rows, key=lambda r: r.person):
        groups.setdefault((r.person, r.prompt), []).append(r)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def _claim(folder: Path, maker: Maker, people: Sequence[Person]) -> None:
    """Refuse to mix two systems, or two people of one name, in a folder."""
    path, mine = folder / PLAN, {"maker": maker.key, "people": {p.name: p.key() for p in people}}
    if path.is_file():
        there = json.loads(path.read_text())
        both = there["people"].keys() & mine["people"].keys()
        wrong = sorted(n for n in both if there["people"][n] != mine["people"][n])
        if there["maker"] != maker.key or wrong:
            what = (
                f"other photos of {wrong[0]!r}" if wrong else f"other settings: {_differences(there['maker'], maker)}"
            )
            raise InputError(f"evaluate: {folder} holds pictures made with {what}; choose another --out")
        mine["people"] = there["people"] | mine["people"]
    write_text(path, json.dumps(mine, indent=1))


def _folder_key(folder: Path, ends: int = 1 << 20) -> str:
    """Hash over names, sizes and both ends of a model folder's files: gigabytes are not read for it."""
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".json", ".txt")):
        size = path.stat().st_size
        h.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as f:
            h.update(f.read(ends))
            f.seek(max(0, size - ends))
            h.update(f.read(ends))
    return h.hexdigest()[:16]


def _differences(there: dict, maker: Maker) -> str:
    names = sorted(k for k in there.keys() | maker.key.keys() if there.get(k) != maker.key.get(k))
    return ", ".join(f"{k} {there.get(k)!r}, now {maker.key.get(k)!r}" for k in names)


def tiny_maker(base: str = "tiny", *, steps: int = 4, id_scale: float = 1.0, system_file: Path | None = None) -> Maker:
    """The embedded model, or one of `idcore train tiny`."""
    from ..encoders.analyzer import default_analyzer
    from ..identity import Identity
    from ..sampling.tiny_pipeline import PACKAGE_FOLDER, WEIGHTS, TinyPipeline
    from .probes import recogniser_key

    if system_file is not None:
        raise InputError("evaluate: --weights are those of PuLID on an SDXL folder; name it with --base")
    folder = PACKAGE_FOLDER if base == "tiny" else Path(base)
    pipe = TinyPipeline.from_folder(folder)

    def encode(person: Person) -> Identity:
        return Identity.load(person.identity) if person.identity else pipe.encode(list(person.photos))

    def draw(prompt: str, identity: Any, seeds: Sequence[int]) -> list[Image.Image]:
        return pipe(
            prompt, identity, id_scale=id_scale, num_inference_steps=steps, seed=list(seeds),
            num_images_per_prompt=len(seeds),
        )  # fmt: skip

    key = {"base": "tiny", "weights": file_hash(folder / WEIGHTS), "steps": steps, "id_scale": id_scale}
    return Maker(key, draw, encode, recogniser_key(default_analyzer()))


def sdxl_maker(
    base: str,
    system: Any = None,
    *,
    steps: int = 4,
    id_scale: float = 1.0,
    guidance: float = 1.2,
    width: int | None = None,
    height: int | None = None,
    negative: str = "",
    weights: Path | None = None,
    recogniser: str = "",
    dtype: Any = None,
    device: str | None = None,
) -> Maker:
    """An SDXL folder through `IDPipeline`, with an identity system; the UNet's own size where none is given.

    People need photos that the system can encode, or identities beside them.
    """
    import torch

    from ..identity import Identity
    from ..sampling.id_pipeline import IDPipeline

    pipe = IDPipeline.from_pretrained(base, system, dtype=dtype, device=device)
    pipe.pipe.set_progress_bar_config(disable=True)

    def encode(person: Person) -> Identity:
        return Identity.load(person.identity) if person.identity else pipe.encode(list(person.photos))

    def draw(prompt: str, identity: Any, seeds: Sequence[int]) -> list[Image.Image]:
        made = []
        for seed in seeds:  # one at a time: the same seed gives the same picture whatever is made beside it
            made += pipe(
                prompt, negative or None, id_embeds=identity, id_scale=id_scale, num_inference_steps=steps,
                guidance_scale=guidance, width=width, height=height, generator=torch.Generator().manual_seed(seed),
            ).images  # fmt: skip
        return made

    key = {"base": str(base), "files": _folder_key(Path(base)), "system": getattr(system, "name", None), "steps": steps}
    key |= {"id_scale": id_scale, "guidance": guidance, "width": width, "height": height, "negative": negative}
    key["weights"] = file_hash(weights) if weights else None
    return Maker(key, draw, encode, recogniser, batch=4)
