"""SCRFD and ArcFace from a model folder: the layouts, the conventions, and what is said of other files."""

import numpy as np
import onnx_models
import pytest
from PIL import Image

from idcore.encoders.analyzer import ModelFolderAnalyzer, analyzer_from
from idcore.encoders.onnx_file import read_signature
from idcore.encoders.scrfd import ArcFace, Scrfd, find_models, kind_of
from idcore.errors import InputError, WeightsError


def marked(size, *blocks):
    """A white picture with pure red squares (x, y, side)."""
    image = Image.new("RGB", size, (255, 255, 255))
    for x, y, side in blocks:
        image.paste((255, 0, 0), (x, y, x + side, y + side))
    return image


def expected(x, y, stride, scale):
    """Box and points in picture pixels for the cell whose corner is at (x, y) of the letterbox."""
    left, top, right, bottom = onnx_models.REACH
    box = np.array([x - left * stride, y - top * stride, x + right * stride, y + bottom * stride]) / scale
    points = (np.array([x, y]) + np.array(onnx_models.POINTS) * stride) / scale
    return box, points


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return onnx_models.antelopev2(tmp_path_factory.mktemp("models") / "antelopev2")


@pytest.fixture(scope="module")
def detector(folder):
    return Scrfd(folder / "scrfd_10g_bnkps.onnx", "cpu")


def test_decoding_at_half_scale(detector):
    # 1280x960 becomes 640x480; the 16 px block fills the cell at (320, 160) of stride 8.
    (face,) = detector.detect(marked((1280, 960), (640, 320, 16)))
    box, points = expected(320, 160, 8, 0.5)
    np.testing.assert_allclose(face.box, box, atol=1e-3)
    np.testing.assert_allclose(face.points, points, atol=1e-3)
    assert face.score > 0.9 and face.image_size == (1280, 960)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_every_stride(detector, stride):
    # One cell of this stride alone is all red; finer cells inside are red too and give smaller boxes.
    corner = 10 * stride
    faces = detector.detect(marked((640, 640), (corner, corner, stride)))
    box, points = expected(corner, corner, stride, 1.0)
    np.testing.assert_allclose(faces[0].box, box, atol=1e-3)
    np.testing.assert_allclose(faces[0].points, points, atol=1e-3)


def test_tall_picture_and_upscaling(detector):
    # Four times as large, the block fills a cell of stride 32 (and finer ones inside, with smaller boxes).
    face = detector.detect(marked((80, 160), (40, 80, 8)))[0]
    box, _ = expected(160, 320, 32, 4.0)
    np.testing.assert_allclose(face.box, box, atol=1e-3)


def test_letterbox_pixels(detector):
    planes, scale_x, scale_y = detector.letterbox(marked((640, 320), (0, 0, 320)))
    assert planes.shape == (1, 3, 640, 640) and (scale_x, scale_y) == (1.0, 1.0)
    np.testing.assert_allclose(planes[0, :, 5, 5], (np.array([255, 0, 0]) - 127.5) / 128)  # RGB order
    np.testing.assert_allclose(planes[0, :, 500, 5], [-127.5 / 128] * 3)  # black below


def test_other_colours_and_empty_pictures_give_nothing(detector):
    blue = Image.new("RGB", (640, 640), (0, 0, 255))  # red, if the channels were swapped
    assert detector.detect(blue) == []
    assert detector.detect(Image.new("RGB", (1, 1))) == []
    assert detector.detect(Image.new("RGB", (3000, 1), (255, 255, 255))) == []


def test_overlapping_cells_leave_one_box_and_distant_ones_stay(detector):
    faces = detector.detect(marked((640, 640), (80, 80, 16), (400, 400, 8)))
    assert len(faces) >= 2
    areas = [face.area for face in faces]
    assert areas == sorted(areas, reverse=True)
    small = faces[-1]
    np.testing.assert_allclose(small.box, expected(400, 400, 8, 1)[0], atol=1e-3)


@pytest.mark.parametrize("options", [{"size": 320}, {"size": 320, "batched": True}, {"batched": True}])
def test_fixed_sizes_and_batched_outputs(tmp_path, options):
    detector = Scrfd(onnx_models.detector(tmp_path / "det.onnx", **options), "cpu")
    assert detector.size == options.get("size", 640)
    (face,) = detector.detect(marked((1280, 1280), (640, 640, 1280 * 8 // detector.size)))
    scale = detector.size / 1280
    np.testing.assert_allclose(face.box, expected(640 * scale, 640 * scale, 8, scale)[0], atol=1e-2)


def test_arcface_conventions(tmp_path):
    chips = np.random.default_rng(0).integers(0, 255, (3, 112, 112, 3), np.uint8)
    wanted = ((chips.astype(float) - 127.5) / 127.5).mean((1, 2)) @ onnx_models.projection()
    plain = ArcFace(onnx_models.recogniser(tmp_path / "a.onnx"), "cpu")
    np.testing.assert_allclose(plain.embed(chips), wanted, atol=1e-5)
    assert plain.length == 512 and plain.provider == "CPUExecutionProvider"
    single = ArcFace(onnx_models.recogniser(tmp_path / "b.onnx", batch=1), "cpu")
    np.testing.assert_allclose(single.embed(chips), wanted, atol=1e-5)
    old = ArcFace(onnx_models.recogniser(tmp_path / "c.onnx", own_scaling=True), "cpu")
    np.testing.assert_allclose(old.embed(chips), wanted, atol=1e-5)
    with pytest.raises(InputError, match=r"uint8 RGB \[N,112,112,3\] with N >= 1"):
        plain.embed(chips[:, :100])


def test_kinds_are_told_by_shape(folder):
    kinds = {path.name: kind_of(read_signature(path)) for path in folder.glob("*.onnx")}
    assert kinds == {
        "scrfd_10g_bnkps.onnx": "detector",
        "glintr100.onnx": "recogniser",
        "genderage.onnx": None,
        "2d106det.onnx": None,
        "1k3d68.onnx": None,
    }


def test_other_names_and_nested_folder(tmp_path):
    onnx_models.detector(tmp_path / "buffalo_x" / "buffalo_x" / "first.onnx")
    onnx_models.recogniser(tmp_path / "buffalo_x" / "buffalo_x" / "second.onnx")
    found = find_models(tmp_path / "buffalo_x")
    assert found["detector"].name == "first.onnx" and found["recogniser"].name == "second.onnx"


def test_known_name_wins_and_else_one_must_choose(tmp_path):
    onnx_models.detector(tmp_path / "det_10g.onnx")
    onnx_models.recogniser(tmp_path / "another.onnx")
    onnx_models.recogniser(tmp_path / "w600k_r50.onnx")
    assert find_models(tmp_path)["recogniser"].name == "w600k_r50.onnx"
    (tmp_path / "w600k_r50.onnx").rename(tmp_path / "mine.onnx")
    with pytest.raises(InputError, match="several files that could be the recogniser: .*another.onnx.*mine.onnx"):
        find_models(tmp_path)


def test_what_is_missing_is_named(tmp_path, folder):
    onnx_models.detector(tmp_path / "d.onnx")
    with pytest.raises(WeightsError, match=r"holds no recogniser: wanted an ArcFace.*It holds: d.onnx \(detector\)"):
        find_models(tmp_path)
    with pytest.raises(WeightsError, match="is a file; wanted a folder"):
        find_models(tmp_path / "d.onnx")
    six = onnx_models.detector(tmp_path / "six.onnx", landmarks=False)
    with pytest.raises(WeightsError, match="has 6 outputs; wanted an SCRFD detector with landmarks"):
        Scrfd(six, "cpu")
    with pytest.raises(WeightsError, match=r"genderage.onnx takes \[\(None, 3, 96, 96\)\].*wanted an ArcFace"):
        ArcFace(folder / "genderage.onnx", "cpu")
    (tmp_path / "broken.onnx").write_bytes(b"\x3a\xff\xff")
    with pytest.raises(WeightsError, match="broken.onnx is not an ONNX file"):
        find_models(tmp_path)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"size": 100}, "multiple of 32 pixels, got 100"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"overlap": 0}, "between"),
    ],
)
def test_bad_settings(folder, options, text):
    with pytest.raises(InputError, match=text):
        Scrfd(folder / "scrfd_10g_bnkps.onnx", "cpu", **options)


def test_analyzer_over_a_folder(folder):
    analyzer = analyzer_from(folder, "cpu")
    assert isinstance(analyzer, ModelFolderAnalyzer) and analyzer.measure.name == "cosine"
    picture = marked((640, 640), (320, 320, 8))
    (face,) = analyzer.detect(picture)
    chip = analyzer.align(picture, face)
    assert chip.shape == (112, 112, 3)
    wanted = ((chip.astype(float) - 127.5) / 127.5).mean((0, 1)) @ onnx_models.projection()
    np.testing.assert_allclose(analyzer.embed(picture, face), wanted, atol=1e-5)
    assert analyzer.choose([face]) is face
