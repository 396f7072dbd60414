"""The adapter over FaceAnalysis' interface, with a stand-in that checks what it is given."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from idcore.encoders.align import template
from idcore.encoders.analyzer import InsightFaceAnalyzer, analyzer_from
from idcore.errors import InputError

COLOUR = (200, 100, 50)


class Detector:
    """det_model: boxes [N,5] and landmarks [N,5,2] of a BGR picture."""

    input_size, det_thresh = (640, 640), 0.5

    def __init__(self, found):
        self.found = found

    def detect(self, img, max_num=0, metric="default"):
        assert img.dtype == np.uint8 and img.ndim == 3 and img.flags["C_CONTIGUOUS"] and max_num == 0
        assert tuple(img[0, 0]) == COLOUR[::-1], "FaceAnalysis wants BGR"
        return self.found


class Recogniser:
    """models['recognition']: features [1,512] of an aligned BGR chip."""

    input_size = (112, 112)
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    def get_feat(self, img):
        assert img.shape == (112, 112, 3) and img.flags["C_CONTIGUOUS"]
        return np.tile(img.reshape(-1, 3).mean(0), 171)[None, :512]


def stand_in(found=None, **changes):
    points = np.stack([template("arcface") + (50, 50), template("arcface") / 2]).astype(np.float32)
    boxes = np.array([[0, 0, 40, 40, 0.8], [50, 50, 160, 160, 0.9]], np.float32)
    app = SimpleNamespace(det_model=Detector(found or (boxes, points[::-1])), models={"recognition": Recogniser()})
    for name, value in changes.items():
        setattr(app, name, value)
    return app


def test_detect_align_embed():
    picture = Image.new("RGB", (300, 200), COLOUR)
    analyzer = analyzer_from(stand_in())
    assert isinstance(analyzer, InsightFaceAnalyzer) and analyzer.provider == "CUDAExecutionProvider"
    faces = analyzer.detect(picture)
    assert [round(face.score, 1) for face in faces] == [0.9, 0.8]  # largest first
    np.testing.assert_allclose(faces[0].points, template("arcface") + (50, 50), atol=1e-4)
    assert faces[0].image_size == (300, 200)
    embedding = analyzer.embed(picture, faces[0])
    assert embedding.shape == (512,) and embedding.dtype == np.float32
    np.testing.assert_allclose(embedding[:3], COLOUR[::-1], atol=1.01)  # the chip was BGR, too
    assert analyzer.measure.name == "cosine" and analyzer.choose(faces, 1) is faces[1]


def test_no_face():
    nothing = (np.zeros((0, 5), np.float32), None)
    assert analyzer_from(stand_in(nothing)).detect(Image.new("RGB", (30, 20), COLOUR)) == []


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"no recognition model \(it has detection\).*allowed_modules"):
        analyzer_from(stand_in(models={"detection": 1}))
    unprepared = stand_in()
    unprepared.det_model.input_size = None
    with pytest.raises(InputError, match=r"not prepared: call app.prepare\(ctx_id=0, det_size=\(640, 640\)\)"):
        analyzer_from(unprepared)
    no_points = stand_in((np.array([[0, 0, 9, 9, 0.9]]), None))
    with pytest.raises(InputError, match="gives no landmarks"):
        analyzer_from(no_points).detect(Image.new("RGB", (30, 20), COLOUR))
