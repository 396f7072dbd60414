"""`idcore stylise`, callable from Python: photos redrawn in a style (SDEdit), with people kept, written to a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .generating import GenerateRequest, about, is_tiny, plain_values, progress
from .generating_base import Artist, opener
from .generating_checks import check_texts
from .workflows import check_system, save_picture, writable_folder, write_text

if TYPE_CHECKING:
    from PIL import Image

RECORD = "stylise.json"


@dataclass(frozen=True)
class StyliseRequest(GenerateRequest):
    """Arguments of `idcore stylise`; see `idcore stylise --help` for each. Size, `like` and `compare` are not read."""

    base: str = "tiny-sd"
    photos: Sequence[Path] = ()
    strength: float = 0.6
    long_side: int | None = None
    command: str = "stylise"


def stylise_photos(r: StyliseRequest, say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
    """Redraw the photos and write the pictures with `stylise.json` into `r.out`.

    Picture i of photo k is made from seed `r.seed + i` alone, whatever the counts.

    Args:
        r: what to draw.
        say: gets notes, and a line per photo about what was kept.

    Returns:
        What `stylise.json` holds: "pictures" (names in `r.out`), "kept" (per photo "layout", how alike photo and
        pictures are in coarse shades, -1 to 1, and "likeness" in the recogniser's measure where the photo shows a face;
        both one value per picture), "request".
    """
    from .generating_styles import unsaid_words

    _check(r)
    out = writable_folder(r.out)
    for line in unsaid_words(r.styles, [r.prompt, r.background or ""]):
        say(line)
    redrawer = Redrawer(r, say)
    photos = redrawer.photos()
    seeds = range(r.seed, r.seed + r.count)
    made: list[list[Image.Image]] = []
    facts, paths = about(r) | {"strength": str(r.strength)}, []
    with redrawer.ready() as draw, progress(len(photos) * r.count, "stylise") as bar:
        for k, photo in enumerate(photos):
            made.append([])
            for seed in seeds:
                made[-1].append(draw(photo, seed))
                path = out / f"{k:03d}_seed{seed}.png"  # written now: what stops the others does not cost this one
                paths.append(save_picture(made[-1][-1], path, facts | {"seed": str(seed)}).name)
                bar.update(1)
    info = {"pictures": paths, "kept": _kept(r, photos, made, say), "request": plain_values(asdict(r))}
    write_text(out / RECORD, json.dumps(info, indent=1))
    return info


def _check(r: StyliseRequest) -> None:
    """What can be told before anything is loaded."""
    from .sampling.stylise import check_strength

    if not r.photos:
        raise InputError("stylise: wanted at least one photo, got none")
    check_texts(r)
    if is_tiny(r.base):
        raise InputError(
            f"stylise: base {r.base} draws from the identity alone and cannot begin at a photo; give --base tiny-sd, "
            "or a folder with SD 1.x, SD 2.x or SDXL"
        )
    check_system(r.system)
    check_strength(r.strength, r.steps)


class Redrawer(Artist):
    """A base model, opened once, whose pictures begin at photos."""

    def __init__(self, r: StyliseRequest, say: Callable[[str], Any] = lambda text: None) -> None:
        from .generating_people import parties_of
        from .generating_regions import masks_of
        from .sampling.stylise import redrawer

        opens = opener(r)
        self.parties = parties_of(r, say)
        self.masks = masks_of(r, sum(len(p.people) for p in self.parties))
        self._photo: Image.Image | None = None
        super().__init__(r, None, lambda request, system: redrawer(opens(request, system)), sized=False)

    def photos(self) -> list[Image.Image]:
        """Those of the request, in the size in which they are redrawn: by default the base's own on the long side."""
        from .encoders.images import load_image
        from .sampling.stylise import sized

        r = self.request
        own = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return [sized(load_image(p), r.long_side or own) for p in r.photos]

    @contextlib.contextmanager
    def ready(self) -> Iterator[Callable[[Image.Image, int], Image.Image]]:
        """People and texts put on; gives a function from a photo and a seed to a picture."""
        with self.scene(self.request.prompt, self.parties, self.masks) as draw:

            def redraw(photo: Image.Image, seed: int) -> Image.Image:
                self._photo = photo
                return draw(seed)

            yield redraw

    def _size(self) -> dict[str, Any]:
        return {"image": self._photo, "strength": self.request.strength}


def _kept(
    r: StyliseRequest, photos: Sequence[Image.Image], made: Sequence[Sequence[Image.Image]], say: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Per photo what its pictures kept of it."""
    from .encoders.analyzer import find_face
    from .generating_likeness import judge_of, likeness, summary_line
    from .metrics.layouts import same_layout

    judge, told = judge_of(r), []
    for photo, path, pictures in zip(photos, r.photos, made, strict=True):
        one: dict[str, Any] = {"layout": [round(same_layout(photo, p), 4) for p in pictures]}
        say(f"{path.name}: layout kept {sum(one['layout']) / len(pictures):.2f}")
        if find_face(path, judge, on_no_face="skip")[1] is None:
            say(f"{path.name}: no face found in the photo")
        else:
            values = likeness(path, pictures, judge, choose=r.choose)
            one |= {"likeness": values, "measure": judge.measure.describe()}
            say(summary_line(path.name, values, judge.measure))
        told.append(one)
    return told
