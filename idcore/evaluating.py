"""What `idcore evaluate` does, callable from Python: make the pictures where asked to, judge them, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .workflows import chosen_files, writable_folder, write_text

if TYPE_CHECKING:
    from .metrics.making import Maker
    from .metrics.people import Person

CONDITIONED = ("faces", "second-faces", "neither", "unknown")


@dataclass(frozen=True)
class EvaluateRequest:
    """Arguments of `idcore evaluate`; see `idcore evaluate --help` for each."""

    out: Path
    pictures: Path | None = None
    people: str | None = None
    prompts: str = "tiny"
    seeds: int = 4
    first_seed: int = 0
    base: str = "tiny"
    system: str = "auto"
    weights: Path | None = None
    vision: Path | None = None
    parsing: Path | None = None
    retinaface: Path | None = None
    steps: int = 4
    id_scale: float = 1.0
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    negative: str = ""
    placeholder: str | None = None
    instead_of: str = "a person"
    styles: Sequence[Path] = ()
    style_scale: float | Sequence[float] = 1.0
    without: bool = False
    faces: str = "embedded"
    second_faces: str | None = None
    conditioned_by: str = "unknown"
    min_score: float | None = None
    choose: str = "largest"
    clip: Path | None = None
    features: str | None = None
    real: Path | None = None
    attributes: bool = False
    against: Path | None = None


def run_evaluation(r: EvaluateRequest) -> dict[str, Any]:
    """Make (unless `r.pictures` is given), judge, compare; returns the object of `OUT/evaluation.json`, with "changes"
    where `r.against` is given (also written to `OUT/changes.json`).

    Raises:
        InputError, WeightsError, NoFaceError: see `metrics.evaluate` and `metrics.making`.
    """
    from .metrics.against import compare, read_evaluation
    from .metrics.evaluate import PAGE, evaluate
    from .metrics.gate import print_progress
    from .metrics.people import read_people
    from .metrics.report import write_page

    _check(r)
    out = writable_folder(r.out)
    before = read_evaluation(r.against) if r.against else None  # before the work, not after it
    people = read_people(r.people, out / "people") if r.people else []
    pictures, rows, maker = r.pictures, None, None
    if pictures is None:
        from .metrics.making import make_pictures
        from .prompts import load

        maker, prompts, pictures = _maker(r, people), load(r.prompts), out / "pictures"
        seeds = range(r.first_seed, r.first_seed + r.seeds)
        rows = make_pictures(maker, people, prompts, seeds, pictures, twins=r.without, progress=print_progress)
    judges = _judges(r, maker)
    result = evaluate(pictures, out, judges, people=people, real=r.real, rows=rows, progress=print_progress)
    if before is not None:
        changes = compare(before, result)
        result["changes"] = [{"key": c.key, "verdict": c.verdict, "words": str(c)} for c in changes]
        write_text(out / "changes.json", json.dumps(result["changes"], indent=1))
        write_page(result, out / PAGE, pictures, {p.name: p.photos[0] for p in people})
    return result


def _check(r: EvaluateRequest) -> None:
    if r.pictures is None and r.people is None:
        raise InputError(
            "evaluate: wanted pictures to judge (a folder), or people to make pictures of: --people PHOTO, FOLDER or "
            "drawn:24"
        )
    if r.conditioned_by not in CONDITIONED:
        raise InputError(f"evaluate: --conditioned-by is one of {', '.join(CONDITIONED)}, got {r.conditioned_by!r}")
    if r.conditioned_by == "second-faces" and r.second_faces is None:
        raise InputError("evaluate: --conditioned-by second-faces needs --second-faces")
    if r.pictures is not None and r.without:
        raise InputError("evaluate: --without makes pictures; of a folder, name the twins in its metadata.jsonl")


def _tiny(r: EvaluateRequest) -> bool:
    from .generating import is_tiny

    return is_tiny(r.base)


def _draws_tiny(r: EvaluateRequest) -> bool:
    """Whether the pictures are the small models' drawings."""
    from .generating import is_tiny_sd

    return _tiny(r) or is_tiny_sd(r.base)


def _maker(r: EvaluateRequest, people: list[Person]) -> Maker:
    from .generating import GenerateRequest
    from .generating_people import saved_person, system_of
    from .metrics.making import base_maker, tiny_maker
    from .metrics.probes import recogniser_key

    if _tiny(r):
        if r.styles:
            raise InputError('evaluate: --style: base "tiny" takes none; give --base tiny-sd, SDXL or SD 1.5')
        return tiny_maker(r.base, steps=r.steps, id_scale=r.id_scale, system_file=r.weights)
    from .encoders.analyzer import analyzer_from

    names = ("base", "system", "weights", "vision", "parsing", "retinaface", "steps", "id_scale", "guidance", "width")
    names += ("height", "negative", "placeholder", "styles", "style_scale", "faces", "choose")
    look = GenerateRequest(prompt="", out=r.out, command="evaluate", **{n: getattr(r, n) for n in names})
    saved = [None if p.identity is None else saved_person(p.identity) for p in people]
    system = system_of(look, saved) if people else None
    conditions = recogniser_key(analyzer_from(_faces_of(r))) if any(s is None for s in saved) else ""
    return base_maker(look, system, recogniser=conditions, instead_of=r.instead_of)


def _faces_of(r: EvaluateRequest) -> str:
    """Face models that encode photos: those of a fetched recipe, or of --faces."""
    return str(chosen_files(r.system, {"faces": r.faces}, for_photos=True).get("faces", r.faces))


def _judges(r: EvaluateRequest, maker: Maker | None) -> Any:
    from .encoders.analyzer import EmbeddedAnalyzer, analyzer_from
    from .metrics.evaluate import Judges
    from .metrics.gate import MIN_SCORE
    from .metrics.networks import Clip, feature_network
    from .metrics.probes import recogniser_key

    tiny = r.pictures is None and _draws_tiny(r)
    least = r.min_score if r.min_score is not None else MIN_SCORE if tiny else None
    faces = {}
    for role, spec in (("faces", r.faces), ("second-faces", r.second_faces)):
        if spec is not None:
            drawn = spec == "embedded" and least is not None
            faces[role] = EmbeddedAnalyzer(min_score=least) if drawn else analyzer_from(spec)
    conditions = maker.recogniser if maker else ""
    if r.conditioned_by in faces:
        conditions = recogniser_key(faces[r.conditioned_by])
    elif r.conditioned_by == "neither":
        conditions = "neither"
    names = {"faces": "embedded" if r.faces == "embedded" else Path(r.faces).name}
    if r.second_faces is not None:
        second = "embedded" if r.second_faces == "embedded" else Path(r.second_faces).name
        if recogniser_key(faces["faces"]) == recogniser_key(faces["second-faces"]):
            raise InputError(
                f"evaluate: --second-faces {r.second_faces} is the recogniser of --faces; a second opinion needs "
                "another network"
            )
        names["second-faces"] = second if second != names["faces"] else f"{second}-2"
    clip = Clip(r.clip, _device()) if r.clip else None
    features = feature_network(r.features, _device()) if r.features else None
    return Judges({names[k]: a for k, a in faces.items()}, conditions, clip, features, r.attributes or tiny)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
