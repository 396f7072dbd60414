"""DreamIdentity's two sources, mixed: faces that are drawn again, and pairs of faces and edited pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...encoders.face_crops import FaceCrops
from ...encoders.images import load_image
from ...errors import InputError
from ...photos import SUFFIXES
from ...systems.dreamidentity import DreamIdentityConfig
from ..commands import Say
from ..contract import Source
from ..data.drawn import DrawnPeople
from ..data.faces import Faces
from ..data.mixed import Mixed, WithCrops
from ..data.opening import prepared_folder
from ..data.pairs import PairSource
from ..data.source import PreparedSource
from ..losses.faces import as_bytes
from .config import DRAWN, DreamIdentityTrainConfig
from .validation import Guest


def open_data(
    data: str | None, pairs: str | Path | None, out: Path, config: DreamIdentityTrainConfig, sizes: DreamIdentityConfig,
    say: Say,
) -> tuple[Source, WithCrops | PairSource]:  # fmt: skip
    """Both sources in their shares, and the one that the validation's people are taken from.

    Args:
        data: faces for reconstruction: pictures, a folder of `idcore prepare`, or "drawn".
        pairs: folder of `idcore augment`.
        out: folder of the run.
        sizes: of the encoder.
        say: gets the report of a preparation.

    Raises:
        InputError: a source is missing whose share is not 0, or does not fit.
    """
    share = config.people.editability
    size, template, edge = sizes.vit.image_size, sizes.template, config.model.resolution
    if (share < 1 and data is None) or (share > 0 and pairs is None):
        what = "pairs (--pairs FOLDER, made by `idcore augment`)" if pairs is None else "faces (--data FOLDER)"
        raise InputError(
            f"train dreamidentity: people.editability={share:g} needs {what}; give them, or set the share to "
            f"{0 if pairs is None else 1}"
        )
    faces: Source | None = None
    if share < 1:
        inner = _faces(str(data), out, config, say)
        faces = WithCrops(inner, size, template, prompts=config.reconstruction())
    edited = None
    if share > 0:
        edited = PairSource(pairs, edge, size, placeholder=config.people.placeholder, template=template)
    if faces is None or edited is None:
        return Mixed([faces or edited], [1.0]), faces or edited
    return Mixed([faces, edited], [1 - share, share]), faces


def _faces(data: str, out: Path, config: DreamIdentityTrainConfig, say: Say) -> Source:
    if data == DRAWN:
        p = config.people
        return DrawnPeople(p.drawn_folder or out / "people", p.drawn, size=config.model.resolution)
    setup = Faces("none", config.people.analyzer)
    return PreparedSource(prepared_folder(Path(data), out, config.prepare, setup, say), config.data)


def guests_of(
    source: WithCrops | PairSource, config: DreamIdentityTrainConfig, sizes: DreamIdentityConfig, analyzer: object
) -> list[Guest]:
    """The validation's people: photos of `validation.people`; else drawn people whom the training does not have; else
    samples of the data."""
    v = config.validation
    if v.people is not None:
        return photo_guests(Path(v.people), v.count, sizes, analyzer)
    if isinstance(source, WithCrops) and isinstance(source.inner, DrawnPeople):
        folder, drawn = source.inner.folder, source.inner
        away = DrawnPeople(folder, v.count, first=drawn.first + drawn.count, size=drawn.size)
        source = WithCrops(away, source.size, source.template)
    batch = next(iter(source.micro_batches(0, config.loop.seed + 1, 0, 1, v.count, 1)))
    shown = batch.pixels if isinstance(source, WithCrops) else batch.face["crop"]
    pictures = [Image.fromarray(a) for a in as_bytes(shown)]
    return [Guest(n, p, c) for n, p, c in zip(batch.ids, pictures, batch.face["crop"])]


def photo_guests(folder: Path, count: int, sizes: DreamIdentityConfig, analyzer: object) -> list[Guest]:
    """The first photos of a folder. Raises InputError where there are none."""
    photos = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)[:count]
    if not photos:
        raise InputError(f"validation.people: no photos ({', '.join(SUFFIXES)}) in {folder}")
    crops = FaceCrops(sizes.vit.image_size, analyzer, template=sizes.template)
    return [Guest(p.stem, load_image(p), crops(p)[0]) for p in photos]


__all__ = ["guests_of", "open_data", "photo_guests"]
