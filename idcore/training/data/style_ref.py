"""StyleForge's StyleRef images: is the mix of people and backgrounds right? (arXiv 2404.05256)

The paper takes 15 to 20 images that mix people and backgrounds: with backgrounds alone or people alone its FID is
distinctly worse. Multi-StyleForge wants the same images as two sets; `check_style_ref` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...encoders.analyzer import default_analyzer
from ...encoders.images import load_image
from ...errors import InputError
from ...photos import SUFFIXES

COUNT = (15, 20)  # images, section 4 of the paper
SHARE = (0.25, 0.75)  # of images with people; our choice, the paper gives none


@dataclass(frozen=True)
class StyleMix:
    """Files with a face and files without, what is doubtful about the mix, and files that cannot be read."""

    people: tuple[Path, ...]
    backgrounds: tuple[Path, ...]
    warnings: tuple[str, ...]
    unreadable: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"StyleRef: {len(self.people)} with people, {len(self.backgrounds)} without"]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def check_style_ref(images: str | Path | Sequence[Path], analyzer: Any = None) -> StyleMix:
    """Sort StyleRef images by whether the detector finds a face, and warn about the mix.

    Args:
        images: a folder (all pictures below it), or files.
        analyzer: whose detector looks; the embedded one by default. It is made for photos: people whom a style changes
            much, or who are seen from behind, count as backgrounds. Look at both lists.

    Raises InputError where there is no picture.
    """
    files = _files(images)
    analyzer = analyzer or default_analyzer()
    people, backgrounds, unreadable = [], [], {}
    for path in files:
        try:
            picture = load_image(path)
        except InputError as e:
            unreadable[path] = str(e)
            continue
        (people if analyzer.detect(picture) else backgrounds).append(path)
    return StyleMix(tuple(people), tuple(backgrounds), _warnings(people, backgrounds, unreadable), unreadable)


def _files(images: str | Path | Sequence[Path]) -> list[Path]:
    if not isinstance(images, (str, Path)):
        files = [Path(p) for p in images]
    else:
        folder = Path(images)
        if not folder.is_dir():
            raise InputError(f"StyleRef: {folder} is no folder; wanted one with {COUNT[0]} to {COUNT[1]} pictures")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"StyleRef: no pictures ({', '.join(SUFFIXES)}) in {images}")
    return files


def _warnings(people: list[Path], backgrounds: list[Path], unreadable: dict[Path, str]) -> tuple[str, ...]:
    n, said = len(people) + len(backgrounds), []
    if not COUNT[0] <= n <= COUNT[1]:
        said.append(f"{n} images; the paper takes {COUNT[0]} to {COUNT[1]}")
    if n and not people:
        said.append("a face was found in none: with backgrounds alone the style does not reach people")
    elif n and not backgrounds:
        said.append("a face was found in all: with people alone the model adds people where the prompt has none")
    elif n and not SHARE[0] <= len(people) / n <= SHARE[1]:
        said.append(f"{len(people)} of {n} show people; mix more evenly ({SHARE[0]:.0%} to {SHARE[1]:.0%}, our choice)")
    said += [f"{path} cannot be read: {why}" for path, why in unreadable.items()]
    return tuple(said)
