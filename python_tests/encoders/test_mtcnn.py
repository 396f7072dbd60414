"""MTCNN: the face on the demo photo, the picture's borders, tiny and huge pictures."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from idcore.encoders.mtcnn import Mtcnn, suppress
from idcore.errors import InputError

# Read off the photo by eye, to a few pixels: eyes, nose tip, mouth corners.
POINTS = np.array([[204, 102], [246, 103], [224, 128], [204, 141], [245, 141]])


@pytest.fixture(scope="module")
def detector():
    return Mtcnn("cpu", threads=2)


def test_one_face_where_it_is(detector, photo):
    (face,) = detector.detect(photo)
    assert face.score > 0.99 and face.image_size == (512, 512)
    assert face.box.dtype == np.float32 and face.points.shape == (5, 2)
    assert np.abs(face.points - POINTS).max() < 6
    left, top, right, bottom = face.box
    assert 160 < left < 200 and 40 < top < 80 and 250 < right < 290 and 160 < bottom < 195


def test_mirrored_photo_gives_mirrored_points(detector, photo, face):
    (mirrored,) = detector.detect(ImageOps.mirror(photo))
    points = mirrored.points[[1, 0, 2, 4, 3]] * (-1, 1) + (photo.width - 1, 0)
    assert np.abs(points - face.points).max() < 5
    # A systematic shift would show in the mean; the deep network's own asymmetry stays well below a pixel.
    assert abs((points - face.points)[:, 0].mean()) < 1.2


@pytest.mark.parametrize("side", [170, 240, 300, 700, 1024])
def test_other_sizes_find_the_same_and_nothing_else(detector, photo, face, side):
    (found,) = detector.detect(photo.resize((side, side), Image.Resampling.BICUBIC))
    assert np.abs(found.points * 512 / side - face.points).max() < 6


def test_no_face_upside_down_or_on_noise(detector, photo):
    assert detector.detect(ImageOps.flip(photo)) == []
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    assert detector.detect(Image.fromarray(noise)) == []
    assert detector.detect(Image.new("RGB", (300, 200), (128, 90, 80))) == []


def test_two_faces_largest_first(detector, photo):
    canvas = Image.new("RGB", (900, 520), (90, 90, 90))
    canvas.paste(photo.crop((120, 20, 330, 230)), (20, 20))
    canvas.paste(photo.crop((120, 20, 330, 230)).resize((420, 420), Image.Resampling.BICUBIC), (440, 40))
    faces = detector.detect(canvas)
    assert len(faces) == 2 and faces[0].area > 3 * faces[1].area
    assert faces[0].center[0] > 440 > faces[1].center[0]


@pytest.mark.parametrize("edge", ["left", "top"])
def test_face_at_the_border(detector, photo, face, edge):
    """The picture ends a little inside the face's box: found, with points where they were."""
    shift = (190, 0) if edge == "left" else (0, 72)
    cut = photo.crop((*shift, 512, 512))
    (found,) = detector.detect(cut)
    assert np.abs(found.points + shift - face.points).max() < 8


def test_crop_pads_with_black_outside(detector):
    white = Image.new("RGB", (40, 30), (255, 255, 255))
    chip = detector._crop(white, np.array([-20, 0, 19, 29]), 24)
    assert chip[:, :11].max() < 30 and chip[:, 13:].min() > 225
    far = detector._crop(white, np.array([100, 100, 120, 120]), 24)
    assert far.max() == 0
    degenerate = detector._crop(white, np.array([5, 5, 3, 3]), 24)
    assert degenerate.shape == (24, 24, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (11, 11), (12, 12), (23, 23), (24, 24)])
def test_tiny_pictures_give_no_face_and_no_error(detector, size):
    assert detector.detect(Image.new("RGB", size, (200, 150, 130))) == []
    assert detector.scales(*size) == [] or min(size) >= 24


def test_pyramid_is_bounded(detector):
    scales = detector.scales(20000, 15000)
    assert max(scales) * 20000 <= 1000 and min(scales) * 15000 >= 12
    assert detector.scales(512, 512)[0] == pytest.approx(0.5)
    assert detector.scales(24, 24) == [pytest.approx(0.5)]


def test_huge_picture(detector, photo, face):
    """48 megapixels: the work stays bounded and a large face is still found in its place."""
    canvas = Image.new("RGB", (8000, 6000), (120, 130, 140))
    canvas.paste(photo.resize((3072, 3072), Image.Resampling.BICUBIC), (2500, 1500))
    (found,) = detector.detect(canvas)
    assert np.abs((found.points - (2500, 1500)) / 6 - face.points).max() < 6


def test_threads_may_share_a_detector(detector, photo, face):
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(detector.detect, [photo] * 8):
            np.testing.assert_allclose(found[0].points, face.points, atol=1e-3)


def test_suppression_by_hand():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29], [2, 2, 5, 5]], float)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    assert suppress(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert suppress(boxes, scores, 0.5, over_smaller=True).tolist() == [1, 2]
    assert suppress(boxes, scores, 0.95).tolist() == [1, 0, 2, 3]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize(
    "options, text",
    [
        ({"min_size": 5}, "min_size must be at least 12 pixels.*got 5"),
        ({"max_side": 0}, "max_side must be at least 12 pixels, got 0"),
        ({"thresholds": (0.5, 1.5, 0.5)}, "Three thresholds between 0 and 1"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(InputError, match=text):
        Mtcnn("cpu", **options)
