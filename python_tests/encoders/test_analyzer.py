"""The embedded analyzer end to end, the policies, and the choice of an analyzer."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from idcore.encoders.analyzer import (
    EmbeddedAnalyzer,
    Face,
    FaceAnalyzer,
    InsightFaceAnalyzer,
    analyzer_from,
    choose,
    default_analyzer,
    embed_photo,
    find_face,
)
from idcore.encoders.dlib_resnet import DlibResnet
from idcore.errors import InputError, NoFaceError, SeveralFacesError, WeightsError
from idcore.metrics.similarity import DLIB_L2


@pytest.fixture(scope="module")
def reference(analyzer, photo, face):
    return analyzer.embed(photo, face)


def face_at(x, y, side=50.0, size=(400, 300)):
    box = np.array([x, y, x + side, y + side], np.float32)
    return Face(box, 0.99, np.zeros((5, 2), np.float32), size)


def test_embedding_and_chip(analyzer, photo, face, reference):
    assert reference.shape == (128,) and reference.dtype == np.float32
    assert 1.0 < np.linalg.norm(reference) < 1.8
    assert analyzer.align(photo, face).shape == (150, 150, 3)
    features = analyzer.features(photo, face)
    np.testing.assert_allclose(features.embedding[0], reference, atol=1e-6)
    assert [f.shape[1:] for f in features.feats] == [(32, 35, 35), (64, 17, 17), (128, 8, 8), (256, 4, 4), (256, 2, 2)]
    wide = analyzer.features(photo, face, padding=0.6)
    assert np.abs(wide.feats[0] - features.feats[0]).max() > 0.1


def variants(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=50)
    rows = np.asarray(photo).astype(float)
    return {
        "mirrored": ImageOps.mirror(photo),
        "half size": photo.resize((256, 256), Image.Resampling.BICUBIC),
        "third size": photo.resize((170, 170), Image.Resampling.BICUBIC),
        "double size": photo.resize((1024, 1024), Image.Resampling.BICUBIC),
        "jpeg 50": buffer.getvalue(),
        "darker": Image.fromarray((rows * 0.6).astype(np.uint8)),
        "tilted": photo.rotate(12, Image.Resampling.BICUBIC),
        "moved": photo.crop((60, 0, 500, 400)),
    }


@pytest.mark.parametrize(
    "name", ["mirrored", "half size", "third size", "double size", "jpeg 50", "darker", "tilted", "moved"]
)
def test_same_person_stays_close(analyzer, photo, reference, name):
    (embedding,) = embed_photo(variants(photo)[name], analyzer)
    assert DLIB_L2.value(reference, embedding) < 0.4


def test_photo_turned_by_exif(analyzer, photo, reference, tmp_path):
    stored = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = tmp_path / "phone.jpg"
    stored.save(path, quality=95, exif=exif)
    (embedding,) = embed_photo(path, analyzer)
    assert DLIB_L2.value(reference, embedding) < 0.15
    stored.save(path, quality=95)  # without the tag the face lies on its side and is not found
    with pytest.raises(NoFaceError, match=r"phone.jpg \(512x512, analyzer embedded\).*on_no_face='skip'"):
        embed_photo(path, analyzer)


def test_batch_of_chips_equals_single_ones(analyzer, photo, face):
    chips = np.stack([analyzer.align(photo, face, padding) for padding in (0.2, 0.25, 0.3, 0.4, 0.5)])
    small = DlibResnet("cpu", batch_size=2)
    together = small.embed(chips)
    alone = np.concatenate([small.embed(chip[None]) for chip in chips])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert small.embed(chips[:0]).shape == (0, 128)


@pytest.mark.parametrize("chips", [np.zeros((1, 112, 112, 3), np.uint8), np.zeros((1, 150, 150, 3), np.float32)])
def test_wrong_chips(analyzer, chips):
    with pytest.raises(InputError, match=r"uint8 RGB \[N,150,150,3\], got .*align"):
        analyzer.recogniser.embed(chips)


def test_no_face(analyzer):
    empty = Image.new("RGB", (320, 200), (90, 120, 60))
    with pytest.raises(NoFaceError, match=r"No face was found in the picture \(320x200.*upright"):
        find_face(empty, analyzer)
    picture, face = find_face(empty, analyzer, on_no_face="skip")
    assert face is None and picture.size == (320, 200)
    with pytest.raises(InputError, match="on_no_face must be 'raise' or 'skip', got 'ignore'"):
        find_face(empty, analyzer, on_no_face="ignore")
    with pytest.raises(NoFaceError, match="in any of 2 photos"):
        embed_photo([empty, empty], analyzer, on_no_face="skip")


def test_skip_leaves_photos_out(analyzer, photo):
    empty = Image.new("RGB", (320, 200))
    assert embed_photo([photo, empty, photo], analyzer, on_no_face="skip").shape == (2, 128)
    with pytest.raises(NoFaceError):
        embed_photo([photo, empty], analyzer)


def test_policies():
    small_in_the_middle, large, other = face_at(175, 125), face_at(0, 0, 90), face_at(300, 200, 60)
    faces = [large, other, small_in_the_middle]
    assert choose(faces) is large and choose(list(reversed(faces)), "largest") is large
    assert choose(faces, "center") is small_in_the_middle
    assert choose(faces, 1) is other and choose(faces, -1) is small_in_the_middle
    assert choose([other], "only") is other
    with pytest.raises(
        SeveralFacesError, match=r"one face is wanted, 3 were found: 0: face at \(0, 0, 90, 90\).*'center'"
    ):
        choose(faces, "only")
    with pytest.raises(InputError, match="no face 3 among 3"):
        choose(faces, 3)
    for policy in ("biggest", True, 1.5, None):
        with pytest.raises(InputError, match="wanted largest, center, only or an index"):
            choose(faces, policy)
    with pytest.raises(NoFaceError, match="no face to choose from"):
        choose([])


def test_policies_on_a_picture_with_two_people(analyzer, photo, reference):
    canvas = Image.new("RGB", (700, 420), (90, 90, 90))
    head = photo.crop((120, 20, 330, 230))
    canvas.paste(head, (10, 100))
    canvas.paste(ImageOps.mirror(head).resize((400, 400), Image.Resampling.BICUBIC), (290, 10))
    with pytest.raises(SeveralFacesError, match="2 were found"):
        find_face(canvas, analyzer, policy="only")
    _, first = find_face(canvas, analyzer, policy=0)
    _, second = find_face(canvas, analyzer, policy=1)
    assert first.center[0] > 290 > second.center[0]
    for index in (0, 1):
        (embedding,) = embed_photo(canvas, analyzer, policy=index)
        assert DLIB_L2.value(reference, embedding) < 0.4


def test_default_analyzer(photo):
    analyzer = default_analyzer("cpu")
    assert analyzer is default_analyzer("cpu") and isinstance(analyzer, FaceAnalyzer)
    assert analyzer.provider == "CPUExecutionProvider" and analyzer.measure.name == "l2"
    assert analyzer_from("embedded", "cpu") is analyzer and analyzer_from(None, "cpu") is analyzer
    assert analyzer_from(analyzer) is analyzer
    (face,) = analyzer.detect(photo)
    assert analyzer.choose([face]) is face


def test_analyzer_from_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(InputError, match="No face analyzer follows from int: wanted 'embedded', a folder"):
        analyzer_from(7)
    with pytest.raises(WeightsError, match="is not there; wanted a folder with SCRFD and ArcFace"):
        analyzer_from(tmp_path / "antelopev2")
    with pytest.raises(WeightsError, match="holds no detector.*It holds: no .onnx file.*antelopev2"):
        analyzer_from(str(tmp_path))
    with pytest.raises(InputError, match="FaceAnalysis object is wanted, got int"):
        InsightFaceAnalyzer(3)


def test_min_score_reaches_the_detector():
    assert EmbeddedAnalyzer("cpu", min_score=0.8).detector.thresholds[2] == 0.8
