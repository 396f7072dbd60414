"""Photos to identities of the embedded model: detect, align, read the recogniser's features, encode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..encoders.align import align
from ..encoders.analyzer import EmbeddedAnalyzer, default_analyzer, find_face
from ..encoders.face import Policy
from ..encoders.images import ImageLike
from ..errors import InputError
from ..identity import Identity
from .tiny import FRAME, NUM_GLOBAL, WIDE_PADDING, TinySystem, chips_of


def aligned_frame(photo: ImageLike, analyzer: EmbeddedAnalyzer | None = None, choose: Policy = "largest") -> np.ndarray:
    """The picture [96, 96, 3] uint8 that an identity is read from: the whole head, eyes at fixed places.

    Where the frame reaches beyond the photo it is filled with the photo's mean colour.

    Raises:
        NoFaceError, SeveralFacesError, InputError: see `idcore.encoders.analyzer.find_face`.
    """
    picture, face = find_face(photo, analyzer, policy=choose)
    fill = tuple(int(c) for c in np.asarray(picture.resize((8, 8))).reshape(-1, 3).mean(0))
    return align(picture, face.points, "dlib", FRAME, WIDE_PADDING, fill)


def _uint8_chips(chips: Tensor) -> np.ndarray:
    return (chips.permute(0, 2, 3, 1).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()


def encode_frames(system: TinySystem, frames: np.ndarray, analyzer: EmbeddedAnalyzer | None = None) -> Tensor:
    """Tokens [N, 260, E] float32 of aligned frames uint8 [N, 96, 96, 3]."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[1:] != (FRAME, FRAME, 3) or frames.dtype != np.uint8:
        raise InputError(f"aligned frames are uint8 [N, {FRAME}, {FRAME}, 3], got {frames.dtype} {list(frames.shape)}")
    recogniser = (analyzer or default_analyzer()).recogniser
    wide, tight = chips_of(torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float() / 255)
    feats = [torch.from_numpy(f) for f in recogniser.features(_uint8_chips(wide)).feats[:3]]
    embedding = torch.from_numpy(recogniser.embed(_uint8_chips(tight)))
    with torch.no_grad():
        return system.encoder(feats, embedding).float()


def encode_photos(
    system: TinySystem,
    photos: ImageLike | Sequence[ImageLike],
    analyzer: EmbeddedAnalyzer | None = None,
    choose: Policy = "largest",
) -> Identity:
    """One person's photos to an `Identity` of the system "tiny".

    The spatial tokens come from the first photo (two photos do not lie on each other pixel by pixel); the
    global ones are the mean over all photos.

    Raises:
        NoFaceError, SeveralFacesError: a photo without a face, or with several and choose="only".
        InputError: no photo, or an analyzer that is not the embedded one (the tokens are read from its features).
    """
    photos = list(photos) if isinstance(photos, (list, tuple)) else [photos]
    if not photos:
        raise InputError("an identity needs at least one photo, got none")
    if analyzer is not None and not isinstance(analyzer, EmbeddedAnalyzer):
        raise InputError(
            f"the tiny system reads the embedded recogniser's features, got the analyzer {analyzer.name!r}: "
            "leave the analyzer out"
        )
    frames = np.stack([aligned_frame(p, analyzer, choose) for p in photos])
    tokens = encode_frames(system, frames, analyzer)
    joint = tokens[:1].clone()
    joint[:, :NUM_GLOBAL] = tokens[:, :NUM_GLOBAL].mean(0, keepdim=True)
    return Identity(joint, None, system.name, {"photos": len(photos), "recogniser": "dlib_resnet"})
