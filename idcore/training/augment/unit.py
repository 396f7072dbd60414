"""The work on one name: its source pictures, its edited pictures, and the pairs that pass. All workers run this."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .draw import Drawer
from .judge import FaceJudge, Seen, TextJudge
from .options import AugmentConfig, Made, Pair, Prompt, plain


@dataclass(frozen=True)
class _Shot:
    """A drawn picture that passed: its number among the tries, its noise, its face, its file."""

    number: int
    seed: int
    picture: Image.Image
    face: Seen
    text: float | None = None


def seed_of(seed: int, name: str, text: str, number: int) -> int:
    """The noise's seed of a picture: another one for each name, prompt and try, the same on every machine."""
    said = f"{seed}\n{name}\n{text}\n{number}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=7).digest(), "big")


class Unit:
    """Makes the pairs of a name. The result hangs on the name, the settings and the models alone.

    Args:
        drawer, faces, texts: who draws and who judges.
        config: the settings.
        source_prompts: of the source pictures, taken in turn.
        prompts: of the edited pictures.
    """

    def __init__(
        self,
        drawer: Drawer,
        faces: FaceJudge,
        texts: TextJudge,
        config: AugmentConfig,
        source_prompts: Sequence[Prompt],
        prompts: Sequence[Prompt],
    ) -> None:
        self.drawer, self.faces, self.texts, self.config = drawer, faces, texts, config
        self.source_prompts, self.prompts = list(source_prompts), list(prompts)
        self.least = texts.least if config.text is None else config.text

    def __call__(self, name: str) -> Made:
        """Pairs, drops and PNG files of a name. Raises what the models raise."""
        made = Made(name)
        sources = self._sources(made)
        if not sources:
            return made
        for i, s in enumerate(sources):
            made.pictures[f"source-{i}.png"] = _png(s.picture)
        wanted = list(range(len(self.prompts)))
        kept: dict[int, list[_Shot]] = {i: [] for i in wanted}
        lost: dict[int, tuple[str, str, str]] = {}
        for number in range(self.config.tries):
            wanted = [i for i in wanted if len(kept[i]) < self.config.edits]
            for i, shot in self._edits(made, wanted, number, sources):
                if isinstance(shot, _Shot):
                    kept[i].append(shot)
                else:
                    lost[i] = (f"{name}: {self.prompts[i].text}", *shot)
        made.drops += [lost[i] for i in lost if not kept[i]]
        for i, shots in kept.items():
            for shot in shots:
                made.pairs += self._pairs(made, i, shot, sources)
        used = {f for pair in made.pairs for f in (pair.source, pair.edited)}
        made.pictures = {f: content for f, content in made.pictures.items() if f in used}
        return made

    # -- source pictures ------------------------------------------------------------------------------------

    def _sources(self, made: Made) -> list[_Shot]:
        """The pictures of a name that show one person, the most typical first; none: the base does not know it."""
        c, shots, reasons = self.config, [], []
        prompts = [self.source_prompts[k % len(self.source_prompts)] for k in range(c.source_tries)]
        for k, _, shot in self._drawn(made, prompts, range(c.source_tries)):
            if isinstance(shot, _Shot):
                shots.append(shot)
            else:
                reasons.append(shot)
                made.drops.append((f"{made.name}: {prompts[k].text} ({k})", *shot))
        if not shots:
            made.drops.append((made.name, "no source", f"{c.source_tries} drawn, none can be used: {reasons[-1][0]}"))
            return []
        faces = [s.face for s in shots]
        values = self.faces.values(faces, faces)
        same = self.faces.same(values)
        middle = int(self.faces.best_first(values.sum(1))[0])
        like = int(same[middle].sum())
        if like < c.agree * c.source_tries:
            said = f"{like} of {c.source_tries} source pictures show one person; wanted {c.agree:.0%} (agree)"
            made.drops.append((made.name, "not known", said))
            return []
        order = [k for k in self.faces.best_first(values[middle]) if same[middle][k]]
        return [shots[k] for k in order[: c.sources]]

    # -- edited pictures ------------------------------------------------------------------------------------

    def _edits(
        self, made: Made, wanted: Sequence[int], number: int, sources: list[_Shot]
    ) -> Iterator[tuple[int, _Shot | tuple[str, str]]]:
        """One try of each wanted prompt: a picture that fits, or why it does not."""
        prompts = [self.prompts[i] for i in wanted]
        found = list(self._drawn(made, prompts, [number] * len(prompts)))
        scores = self.texts.scores([p for _, p, _ in found], prompts) if found else []
        for (k, _, shot), score in zip(found, scores):
            if isinstance(shot, _Shot):
                values = self.faces.values([s.face for s in sources], [shot.face])[:, 0]
                if not self.faces.same(values).any():
                    best = values[self.faces.best_first(values)[0]]
                    shot = ("another person", f"{self.faces.measure.name} {best:.3f}, limit {self.faces.limit:g}")
                elif score is not None and score < self.least:
                    shot = ("not the prompt", f"{self.texts.words} {score:.3f}, wanted {self.least:g}")
                else:
                    shot = _Shot(shot.number, shot.seed, shot.picture, shot.face, score)
            yield wanted[k], shot

    def _drawn(
        self, made: Made, prompts: Sequence[Prompt], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Image.Image, _Shot | tuple[str, str]]]:
        """(place, picture, the shot or why there is none) for each prompt."""
        seeds = [seed_of(self.config.seed, made.name, p.text, n) for p, n in zip(prompts, numbers)]
        pictures = self.drawer([p.of(made.name) for p in prompts], seeds) if prompts else []
        made.drawn += len(pictures)
        for k, (picture, seed, number) in enumerate(zip(pictures, seeds, numbers)):
            face = self.faces.look(picture)
            yield k, picture, _Shot(number, seed, picture, face) if isinstance(face, Seen) else face

    def _pairs(self, made: Made, prompt: int, shot: _Shot, sources: list[_Shot]) -> Iterator[Pair]:
        """An edited picture with each source picture that shows the same person."""
        edited = f"edited-{prompt:03d}-{shot.number}.png"
        made.pictures[edited] = _png(shot.picture)
        values = self.faces.values([s.face for s in sources], [shot.face])[:, 0]
        for i in np.flatnonzero(self.faces.same(values)):
            source, p = sources[i], self.prompts[prompt]
            files = [f"source-{i}.png", edited]
            hashes = [f"sha256:{hashlib.sha256(made.pictures[f]).hexdigest()}" for f in files]
            yield Pair(
                f"{prompt:03d}-{shot.number}-{i}", made.name, *files, *hashes, p.text, dict(p.labels),
                list(shot.picture.size), plain(source.face.box), plain(source.face.points),
                round(source.face.score, 4), plain(shot.face.box), plain(shot.face.points), round(shot.face.score, 4),
                round(float(values[i]), 4), None if shot.text is None else round(shot.text, 4),
                [source.seed, shot.seed],
            )  # fmt: skip


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG", compress_level=4)
    return out.getvalue()
