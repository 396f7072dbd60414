"""`idcore evaluate`: pictures in, one JSON and one HTML page out. Resumable; nothing is measured twice.

The JSON's form is in docs/evaluation.md. Everything looked at lies in `OUT/scores.sqlite`; figures are computed from
there anew each time, so that they never mix two versions of a formula.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..encoders.analyzer import FaceAnalyzer
from ..encoders.images import load_image
from ..errors import InputError, NoFaceError
from ..workflows import writable_folder, write_text
from .distances import SUBSET_SIZE, SUBSETS, frechet_distance, kernel_distance
from .evaluation_json import result_of
from .figures import FaceFigures, Gallery, Score, face_figures, label_score
from .networks import Clip, Looker
from .pairs import cosine, pixel_distance, structure_similarity
from .people import Person
from .probes import FaceProbe, NetworkProbe, Progress, TinyProbe, recogniser_key, run_probe
from .rows import Row, read_rows
from .store import Result, Store

JSON, PAGE, STORE = "evaluation.json", "index.html", "scores.sqlite"
PAIRS = "pairs-v1"


@dataclass
class Judges:
    """Who looks. All are optional but the first recogniser.

    Attributes:
        faces: one or two recognisers, by name; the first one's detector counts the faces.
        conditioned_by: key (`probes.recogniser_key`) of the recogniser whose embeddings condition the pictures, ""
            where unknown.
        clip: for text and image scores.
        features: network of FID, KID and of pairs' feature similarity.
        attributes: background and style of the embedded model's world.
    """

    faces: dict[str, FaceAnalyzer]
    conditioned_by: str = ""
    clip: Clip | None = None
    features: Looker | None = None
    attributes: bool = False

    def circular(self, name: str) -> str:
        """ "yes" where this recogniser conditions the pictures that it judges, "no", or "unknown"."""
        if not self.conditioned_by:
            return "unknown"
        return "yes" if recogniser_key(self.faces[name]) == self.conditioned_by else "no"


@dataclass
class Job:
    """What one evaluation holds while it runs."""

    folder: Path
    rows: list[Row]
    people: list[Person]
    judges: Judges
    store: Store
    progress: Progress | None
    scores: dict[str, Score] = field(default_factory=dict)
    single: dict[str, dict] = field(default_factory=dict)
    faces: dict[str, FaceFigures] = field(default_factory=dict)
    seen: dict[str, list] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [self.folder / r.file for r in self.rows]

    def probe(self, probe: Any, files: Sequence[Path]) -> list[Result | None]:
        return run_probe(self.store, probe, files, self.progress)

    def vectors(self, probe: Any, files: Sequence[Path]) -> list[np.ndarray | None]:
        return [None if r is None else r[1] for r in self.probe(probe, files)]


def evaluate(
    pictures: Path,
    out: Path,
    judges: Judges,
    *,
    people: Sequence[Person] = (),
    real: Path | None = None,
    rows: Sequence[Row] | None = None,
    kid_subsets: int = SUBSETS,
    kid_size: int = SUBSET_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a folder of pictures; writes `evaluation.json` and `index.html` into `out` and returns the JSON's object.

    Args:
        pictures: the folder (see `rows.read_rows`).
        out: made if missing; an earlier run's store in it is gone on with.
        judges: who looks.
        people: whom the pictures show, by the names in `Row.person`; of one person alone all show that one where
            no row names anybody.
        real: folder of real pictures for FID and KID.
        rows: in place of reading the folder.
        kid_subsets, kid_size: see `distances.kernel_distance`.
        progress: called with (done, all, what).

    Raises:
        InputError: nothing to judge, unknown people, pairs of two sizes. NoFaceError: a person's photo without a face.
    """
    start = time.perf_counter()
    if not judges.faces:
        raise InputError("evaluate: wanted at least one face recogniser, got none")
    if real is not None and judges.features is None:
        raise InputError("evaluate: FID and KID against --real need a feature network; name one with --features")
    writable_folder(out)
    rows = list(rows) if rows is not None else read_rows(pictures)
    if len(people) == 1 and not any(r.person for r in rows):  # one person, and nobody is named: all show that one
        twins = {r.without for r in rows}
        rows = [r if r.file in twins else replace(r, person=people[0].name) for r in rows]
    _check_people(rows, people)
    with Store(out / STORE) as store:
        job = Job(pictures, rows, list(people), judges, store, progress)
        _faces(job)
        if judges.clip is not None:
            _clip(job)
        if judges.attributes:
            _attributes(job)
        _pairs(job)
        if real is not None:
            _against_real(job, real, kid_subsets, kid_size)
        _set_twins_apart(job)
        result = result_of(job, pictures)
    result["seconds"] = round(time.perf_counter() - start, 1)
    write_text(out / JSON, json.dumps(result, indent=1, allow_nan=False))
    from .report import write_page

    write_page(result, out / PAGE, pictures, {p.name: p.photos[0] for p in people})
    return result


def _check_people(rows: Sequence[Row], people: Sequence[Person]) -> None:
    names = {p.name for p in people}
    if people and (strange := sorted({r.person for r in rows if r.person} - names)):
        raise InputError(
            f"evaluate: pictures show {strange[0]!r}, of whom there is no photo among {', '.join(sorted(names))}; "
            "names must be those of the photos (or of the folders with photos)"
        )


def _faces(job: Job) -> None:
    for number, (name, analyzer) in enumerate(job.judges.faces.items()):
        probe = FaceProbe(analyzer)
        gallery = _gallery(job, probe, name)
        found = job.probe(probe, job.files)
        if not number:
            _note_files(job, found)
            counts = np.array([np.nan if r is None or "faces" not in r[0] else r[0]["faces"] for r in found])
            has = np.where(np.isnan(counts), np.nan, counts > 0)
            several = np.where(np.isnan(counts), np.nan, counts > 1)
            job.scores["face_found"] = Score("share in which a face is found", "higher", has)
            job.scores["several_faces"] = Score("share in which several faces are found", "", several)
        vectors = [None if r is None else r[1] for r in found]
        job.faces[name] = face_figures(name, analyzer.measure, job.rows, vectors, gallery)
        job.scores |= job.faces[name].scores


def _note_files(job: Job, found: Sequence[Result | None]) -> None:
    for row, r in zip(job.rows, found):
        if r is None:
            job.unreadable[row.file] = "missing"
        elif "unreadable" in r[0]:
            job.unreadable[row.file] = r[0]["unreadable"]
    if len(job.unreadable) == len(job.rows):
        raise InputError(f"evaluate: none of {len(job.rows)} pictures in {job.folder} can be read")


def _gallery(job: Job, probe: FaceProbe, name: str) -> Gallery:
    gallery = Gallery([p.name for p in job.people])
    for person in job.people:
        vectors = job.vectors(probe, person.photos)
        for photo, vector in zip(person.photos, vectors):
            if vector is None:
                raise NoFaceError(f"evaluate: {name} finds no face in {photo} of {person.name!r}; use another photo")
        gallery.photos.append(np.stack(vectors))
    return gallery


def _clip(job: Job) -> None:
    """Text score 100 cos(picture, prompt); image score cos(picture, the person's photos)."""
    clip = job.judges.clip
    probe = NetworkProbe(clip)
    job.seen["clip"] = vectors = job.vectors(probe, job.files)
    prompts = list(dict.fromkeys(r.prompt for r in job.rows if r.prompt))
    texts = {}
    for i in range(0, len(prompts), 64):
        part = prompts[i : i + 64]
        texts |= dict(zip(part, clip.text(part)))
    photos = {p.name: np.stack(job.vectors(probe, p.photos)) for p in job.people}
    text, image = np.full(len(job.rows), np.nan), np.full(len(job.rows), np.nan)
    for i, (row, v) in enumerate(zip(job.rows, vectors)):
        if v is not None and row.prompt:
            text[i] = 100 * float(cosine(v[None], texts[row.prompt][None])[0])
        if v is not None and row.person in photos:
            image[i] = float(cosine(v[None], photos[row.person]).mean())
    words = {"clip_text": ("100 x cosine of picture and prompt", text)}
    words["clip_image"] = ("cosine of picture and the person's photos", image)
    job.scores |= {k: Score(f"{w}, {clip.words}", "higher", v) for k, (w, v) in words.items() if not np.isnan(v).all()}


def _attributes(job: Job) -> None:
    probe = TinyProbe()
    said = [None if r is None else r[0] for r in job.probe(probe, job.files)]
    job.seen["attributes"] = said
    for label in ("background", "style"):
        score = label_score(job.rows, label, said)
        if score is not None:
            job.scores[label] = score


def _pairs(job: Job) -> None:
    """Pictures with an identity against the ones of the same prompt and seed without."""
    index = [i for i, r in enumerate(job.rows) if r.without and r.file not in job.unreadable]
    if not index:
        return
    twins = [job.folder / job.rows[i].without for i in index]
    if absent := [t for t in twins if not t.is_file()]:
        raise InputError(f"evaluate: {absent[0]} is named as the picture without identity, and does not exist")
    n = len(job.rows)
    values = {k: np.full(n, np.nan) for k in ("pixel", "ssim", "clip", "features")}
    for i, said in zip(index, _pixel_pairs(job, [job.files[i] for i in index], twins)):
        if "unreadable" in said:
            job.unreadable[job.rows[i].without] = said["unreadable"]
        else:
            values["pixel"][i], values["ssim"][i] = said["pixel"], said["ssim"]
    for key, network in (("clip", job.judges.clip), ("features", job.judges.features)):
        if network is not None:
            a, b = (job.vectors(NetworkProbe(network), f) for f in ([job.files[i] for i in index], twins))
            for i, x, y in zip(index, a, b, strict=True):
                if x is not None and y is not None:
                    values[key][i] = cosine(x[None], y[None])[0]
    words = {
        "pixel": ("RMS pixel difference to the picture without identity", "lower"),
        "ssim": ("SSIM to the picture without identity", "higher"),
        "clip": ("CLIP-I: cosine to the picture without identity", "higher"),
        "features": ("cosine of features to the picture without identity", "higher"),
    }
    job.scores |= {f"pair.{k}": Score(*words[k], v) for k, v in values.items() if not np.isnan(v).all()}


def _pixel_pairs(job: Job, files: Sequence[Path], twins: Sequence[Path]) -> list[dict[str, Any]]:
    """Per pair {"pixel", "ssim"}, or {"unreadable": why} of the second."""
    keys = [f"{job.store.hash_of(a)}:{job.store.hash_of(b)}" for a, b in zip(files, twins)]
    done = job.store.get(keys, PAIRS)
    for i, (key, a, b) in enumerate(zip(keys, files, twins)):
        if key in done:
            continue
        try:
            x, y = load_image(a), load_image(b)
        except InputError as e:
            done[key] = ({"unreadable": str(e)}, None)
        else:
            done[key] = ({"pixel": pixel_distance(x, y), "ssim": structure_similarity(x, y)}, None)
        job.store.put(PAIRS, {key: done[key]})
        if job.progress and (i % 16 == 15 or i + 1 == len(keys)):
            job.progress(i + 1, len(keys), "pairs")
    return [done[k][0] for k in keys]


def _against_real(job: Job, real: Path, subsets: int, size: int) -> None:
    probe = NetworkProbe(job.judges.features)
    others = [real / r.file for r in read_rows(real)]
    twins = {r.without for r in job.rows}
    mine = [f for f, r in zip(job.files, job.rows) if r.file not in twins and r.file not in job.unreadable]
    a, b = ([v for v in job.vectors(probe, files) if v is not None] for files in (mine, others))
    if min(len(a), len(b)) < 2:
        raise InputError(
            f"evaluate: FID and KID need two pictures a side at least, got {len(a)} and {len(b)} in {real}"
        )
    a, b = np.stack(a), np.stack(b)
    kid = kernel_distance(a, b, subsets=subsets, size=size)
    n = {"n": len(a), "real": len(b), "features": a.shape[1], "network": probe.words}
    few = min(len(a), len(b)) <= a.shape[1]
    note = "fewer pictures than features: FID is biased upward, compare equal counts only" if few else ""
    words = "Frechet distance of features to the real pictures"
    job.single["fid"] = {"words": words, "better": "lower", "mean": frechet_distance(a, b), "note": note} | n
    spread = 1.96 * kid.std if kid.subsets > 1 else None
    job.single["kid"] = {
        "words": f"kernel distance x 1000, {kid.subsets} subsets of {kid.size}; the interval is theirs",
        "better": "lower", "mean": 1000 * kid.mean, "std": 1000 * kid.std,
        "low": None if spread is None else 1000 * (kid.mean - spread),
        "high": None if spread is None else 1000 * (kid.mean + spread),
    } | n  # fmt: skip


def _set_twins_apart(job: Job) -> None:
    """Pictures without identity are there to compare with: their scores get names of their own."""
    twins = {r.without for r in job.rows}
    apart = np.array([r.file in twins for r in job.rows])
    if not apart.any():
        return
    for key, score in list(job.scores.items()):
        alone = Score(f"without identity: {score.words}", score.better, np.where(apart, score.values, np.nan))
        job.scores[key] = replace(score, values=np.where(apart, np.nan, score.values))
        if not np.isnan(alone.values).all():
            job.scores[f"without.{key}"] = alone
