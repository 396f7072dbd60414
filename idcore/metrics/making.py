"""Pictures to be judged, made by a system: people x prompts x seeds, resumable, each from its own seed alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import InputError
from ..files import file_hash
from ..prompts import PromptSet
from ..workflows import save_picture, writable_folder, write_text
from .people import Person
from .rows import METADATA, Row

if TYPE_CHECKING:
    from ..generating import GenerateRequest

PLAN = "plan.json"
INSTEAD_OF = "a person"  # of the shipped prompt sets
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
        raise InputError("evaluate: --weights are those of an identity system on another base; name it with --base")
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


def base_maker(
    look: GenerateRequest, system: Any = None, *, recogniser: str = "", instead_of: str = INSTEAD_OF
) -> Maker:
    """SDXL, SD 1.5 or tiny-sd with an identity system and styles; the UNet's own size where none is given.

    Args:
        look: base, styles, and how to draw; its prompt and people are not read.
        system: what encodes the people's photos, and puts those who act in the attention on; None where people are
            saved and act through the prompt.
        recogniser: key of the one that conditions the pictures, or "".
        instead_of: what prompts say where a person that acts through the prompt is put in.

    Raises:
        InputError: a prompt that does not say it.
    """
    from ..generating_base import Artist
    from ..generating_people import grouped, placeholders_of, saved_person

    artist = Artist(look, None if hasattr(system, "put_on") else system, sized=False)

    def encode(person: Person) -> Any:
        return saved_person(person.identity) if person.identity else system.encode(list(person.photos))

    def draw(prompt: str, identity: Any, seeds: Sequence[int]) -> list[Image.Image]:
        parties = [] if identity is None else grouped([identity], system)
        names = placeholders_of(parties, look.placeholder) if any(p.by_prompt for p in parties) else {}
        with artist.scene(naming(prompt, names.get(0), instead_of), parties) as one:
            return [one(seed) for seed in seeds]  # one at a time: a seed's picture hangs on nothing beside it

    return Maker(_key_of(look, system), draw, encode, recogniser, batch=4)


def naming(prompt: str, name: str | None, instead_of: str = INSTEAD_OF) -> str:
    """A prompt that names the person who acts through it; without a person (None) the prompt as it is.

    Raises:
        InputError: the prompt has no place for the person.
    """
    from ..text.placeholders import mentions, replaced

    if name is None or mentions(prompt, [name]):
        return prompt
    if not mentions(prompt, [instead_of]):
        raise InputError(
            f"evaluate: the person acts through the prompt, and {prompt!r} says neither {name} nor {instead_of!r}; "
            f"write {name} into the prompts, or say which words stand for the person with --instead-of"
        )
    return replaced(prompt, {instead_of: name})


def _key_of(look: GenerateRequest, system: Any) -> dict[str, Any]:
    from ..generating import TINY_SD
    from ..generating_styles import style_file

    folder = Path(look.base)
    if look.base == TINY_SD:
        from ..sampling.tiny_sd import PACKAGE_FOLDER as folder
    key = {"base": str(look.base), "files": _folder_key(folder), "system": getattr(system, "name", None)}
    key |= {"steps": look.steps, "id_scale": look.id_scale, "guidance": look.guides(), "width": look.width}
    key |= {"height": look.height, "negative": look.negative}
    key["weights"] = file_hash(look.weights) if look.weights else None
    if look.styles:
        files = [style_file(p) for p in look.styles]
        key["styles"] = [_folder_key(p) if p.is_dir() else file_hash(p) for p in files]
        key["style_scale"] = look.style_scale if isinstance(look.style_scale, (int, float)) else list(look.style_scale)
    return key
