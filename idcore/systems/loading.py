"""The system that a weights file holds, ready to encode photos; what the command line builds systems with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from idcore.errors import InputError, WeightsError
from idcore.hub import usable
from idcore.recipes import RECIPES, fetch_command, recipe
from idcore.weights import PULID_LAYOUTS, describe

SYSTEMS = ("pulid", "faceid", "instantid", "dreamidentity", "sefi-ide")
# Files of this project's own, named in their metadata.
_FORMATS = {"idcore-dreamidentity": "dreamidentity", "idcore-sefi-ide": "sefi-ide"}
_RECIPES = {"pulid": "pulid-v1", "faceid": "faceid-plusv2-sdxl", "instantid": "instantid"}
# What a needed recipe is to `load_system`, and its file; "": the folder.
_ROLES = {
    "eva-clip": ("vision", "EVA02_CLIP_L_336_psz14_s6B.pt"),
    "clip-vit-h": ("vision", ""),
    "bisenet": ("parsing", "parsing_bisenet.pth"),
    "retinaface": ("retinaface", "detection_Resnet50_Final.pth"),
    "antelopev2": ("faces", ""),
    "buffalo-l": ("faces", ""),
}


def system_of(weights: Path) -> str:
    """One of `SYSTEMS`, read from the file's header.

    Raises:
        WeightsError: the file cannot be read, or holds none of them.
    """
    info = describe(weights)
    if info.metadata.get("format") in _FORMATS:
        return _FORMATS[info.metadata["format"]]
    if info.layout in PULID_LAYOUTS:
        return "pulid"
    if info.layout == "ip_adapter" and info.version in ("faceid", "faceid-plus", "resampler"):
        return "instantid" if info.version == "resampler" else "faceid"
    what = "a torch pickle: convert it first (idcore convert FILE --out FILE --unpickle)"
    what = what if info.container == "torch pickle" else f"of layout {info.layout} {info.version}".rstrip()
    raise WeightsError(
        f"{weights} holds no identity system; wanted PuLID, FaceID, InstantID or DreamIdentity, it is {what}"
    )


def fetched(name: str, *, for_photos: bool = True, home: str | os.PathLike | None = None) -> dict[str, Any]:
    """Arguments of :func:`load_system` from the files of a recipe that was fetched.

    Args:
        name: "pulid-v1", "pulid-v1.1", "instantid", or one of the "faceid-" ones.
        for_photos: Also the files that encode photos.
        home: Folder of weights; by default $IDCORE_HOME, else ~/.cache/idcore.

    Raises:
        InputError: not a recipe of a system.
        WeightsError: a file is not there; the text says how to get it.
    """
    r = recipe(name)
    if not name.startswith(SYSTEMS):
        raise InputError(f"{name} is no system; those are {', '.join(n for n in RECIPES if n.startswith(SYSTEMS))}")
    found: dict[str, Any] = {"weights": _fetched_file(name, name, r.files[0].path, home)}
    for other in r.needs if for_photos else ():
        role, path = _ROLES.get(other, ("", ""))
        if not role:
            continue
        for file in recipe(other).files:
            if path in ("", file.path):
                at = _fetched_file(name, other, file.path, home)
                found[role] = at if path else at.parent
    return found | ({"faces": str(found["faces"])} if "faces" in found else {})


def _fetched_file(system: str, name: str, path: str, home: Any) -> Path:
    at = usable(name, path, home)
    if at is None:
        raise WeightsError(
            f"{system} was not fetched wholly: {name} has no {path} that can be read; run "
            f"`{fetch_command(system, '--needs', '--convert')}` (`idcore doctor {system}` says what is here and the "
            "licences), or pass your own files with --weights"
        )
    return at


def load_system(
    weights: Path | None,
    *,
    system: str = "auto",
    vision: Path | None = None,
    parsing: Path | None = None,
    retinaface: Path | None = None,
    faces: str = "embedded",
    policy: str | int = "largest",
    preset: str | None = None,
    features: str = "pulid",
    for_photos: bool = True,
) -> Any:
    """A system with its weights.

    Args:
        weights: Its safetensors file.
        system: "auto" (read from the file), or one of `SYSTEMS`.
        vision: PuLID: EVA02-CLIP weights; FaceID Plus and PlusV2: a folder with a CLIP ViT-H/14 of transformers.
        parsing: PuLID: face parsing weights.
        retinaface: PuLID: landmark detector of the published chain; None: the landmarks of `faces`.
        faces: "embedded", or a folder with SCRFD and ArcFace models.
        policy: Which face of a photo.
        preset: PuLID: its mode.
        features: PuLID: what its encoder reads of photos: "pulid", as published, or "tiny-pulid" (the embedded
            recogniser alone; own trainings).
        for_photos: Whether photos will be encoded; otherwise no face models are loaded.

    Raises:
        WeightsError: no file, or not a file of that system; or the encoder of photos is not given.
        InputError: an unknown system.
    """
    if system not in ("auto", *SYSTEMS):
        raise InputError(f'system must be "auto", {", ".join(SYSTEMS)}, got {system!r}')
    if weights is None:
        name = "pulid" if system == "auto" else system
        recipe = _RECIPES.get(name)
        if recipe is None:
            raise WeightsError(
                f"{name} needs weights that were trained for this base model: pass --weights FILE (safetensors); none "
                "are published"
            )
        raise WeightsError(
            f"{name} needs its adapter weights: pass --weights FILE (safetensors). "
            f"`{fetch_command(recipe, '--convert')}` downloads them and makes safetensors, `idcore doctor {recipe}` "
            "says what is here"
        )
    found = system_of(weights)
    if system not in ("auto", found):
        raise WeightsError(f"wanted weights of {system}, {weights} holds {found}")
    if found == "pulid":
        files = {"vision": vision, "parsing": parsing, "retinaface": retinaface}
        if features == "tiny-pulid":
            return _pulid_of_dlib(weights, policy, preset, for_photos)
        return _pulid(weights, files, faces, policy, preset, for_photos)
    if found == "sefi-ide":
        raise InputError(
            f"{weights} is a person of SeFi-IDE, which is trained from photos and cannot read new ones; draw with it: "
            f"idcore generate --weights {weights}"
        )
    if found == "dreamidentity":
        return _dreamidentity(weights, faces, policy, for_photos)
    return _face_adapter(found, weights, vision, faces, policy, for_photos)


def _analyzer(faces: str) -> Any:
    from idcore.encoders.analyzer import analyzer_from

    return analyzer_from(faces)


def _pulid(weights: Path, files: dict[str, Any], faces: str, policy: Any, preset: str | None, for_photos: bool) -> Any:
    from idcore.systems.pulid import PuLID

    preprocess = None
    if for_photos:
        from idcore.encoders.pulid_preprocess import PuLIDPreprocess

        if files["vision"] is None:
            raise WeightsError(
                "PuLID encodes photos with EVA02-CLIP-L-336: pass --vision FILE, or give an identity that was "
                "encoded before (--id me.safetensors)"
            )
        preprocess = PuLIDPreprocess.from_weights(
            _analyzer(faces), files["vision"], files["parsing"], files["retinaface"], policy=policy
        )
    return PuLID.from_weights(weights, mode=preset, preprocess=preprocess)


def _pulid_of_dlib(weights: Path, policy: Any, preset: str | None, for_photos: bool) -> Any:
    from idcore.systems.pulid import PuLID

    preprocess = None
    if for_photos:
        from idcore.encoders.dlib_tokens import DlibTokens

        preprocess = DlibTokens(policy=policy)
    return PuLID.from_weights(weights, mode=preset, preprocess=preprocess)


def _dreamidentity(weights: Path, faces: str, policy: Any, for_photos: bool) -> Any:
    from idcore.encoders.face_crops import FaceCrops
    from idcore.systems.dreamidentity import DreamIdentity

    loaded = DreamIdentity.from_weights(weights)
    if for_photos:
        c = loaded.config
        loaded.__dict__["preprocess"] = FaceCrops(
            c.vit.image_size, _analyzer(faces), policy=policy, template=c.template
        )
    return loaded


def system_for(identity: Any) -> Any:
    """The system of saved identities that needs no weights to be attached, since they act through the prompt; None:
    it needs them, or they are of several."""
    from idcore.systems.sefi_files import NAME
    from idcore.systems.sefi_ide import SeFiIDE
    from idcore.systems.words import WORD_SYSTEMS, WordSystem

    people = identity if isinstance(identity, (list, tuple)) else [identity]
    made_by = {getattr(p, "system", None) for p in people}
    if made_by == {NAME}:
        return SeFiIDE()
    return WordSystem() if made_by and made_by <= set(WORD_SYSTEMS) else None


def _face_adapter(name: str, weights: Path, vision: Any, faces: str, policy: Any, for_photos: bool) -> Any:
    from idcore.encoders.face_features import FacePreprocess
    from idcore.systems.faceid import FaceID
    from idcore.systems.instantid import InstantID

    loaded = InstantID.from_weights(weights) if name == "instantid" else FaceID.from_weights(weights)
    if for_photos:
        c = loaded.config.projector
        if c.kind == "faceid-plus" and vision is None:
            raise WeightsError(
                f"{loaded.name} also reads photos with CLIP ViT-H/14: pass --vision FOLDER (`idcore fetch clip-vit-h`)"
                ", or give an identity that was encoded before (--id me.safetensors)"
            )
        loaded.__dict__["preprocess"] = FacePreprocess(
            _analyzer(faces), normalise=name == "faceid", policy=policy, id_dim=c.id_dim,
            tower=_clip(vision) if c.kind == "faceid-plus" else None,
        )  # fmt: skip
    return loaded


def _clip(folder: Path) -> Any:
    from transformers import CLIPVisionModelWithProjection

    try:
        tower = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        first = str(e).strip().splitlines()[0]
        raise WeightsError(f"{folder} does not load as a CLIP vision model of transformers: {first}") from e
    return tower.eval().requires_grad_(False)
