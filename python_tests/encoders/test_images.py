"""load_image: every kind of picture comes out upright RGB, every bad input says what to do."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from idcore.encoders.images import load_image
from idcore.errors import InputError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=32, height=24):
    rows, cols = np.mgrid[0:height, 0:width]
    pixels = np.stack([cols * 255 // (width - 1), rows * 255 // (height - 1), (cols + rows) * 4 % 256], 2)
    return Image.fromarray(pixels.astype(np.uint8))


def png(width, height, depth, colour, rows):
    """A PNG of any bit depth written by hand; ``rows`` are the raw bytes of each row."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_path_bytes_pil_and_array_give_the_same(tmp_path):
    image = gradient()
    path = tmp_path / "a photo.png"
    image.save(path)
    wanted = np.asarray(image)
    for source in (path, str(path), path.read_bytes(), image, wanted):
        got = load_image(source)
        assert got.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats(kind):
    got = np.asarray(load_image(encode(gradient(), kind, quality=95)), int)
    assert np.abs(got - np.asarray(gradient(), int)).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = gradient(64, 48)
    # How a camera would store the picture so that this orientation turns it upright.
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = load_image(encode(stored, "PNG", exif=exif))
    assert got.size == upright.size
    np.testing.assert_array_equal(np.asarray(got), np.asarray(upright))


def test_modes_become_rgb():
    base = gradient()
    grey = np.asarray(base.convert("L"))
    np.testing.assert_array_equal(np.asarray(load_image(encode(base.convert("L")))), np.stack([grey] * 3, 2))
    palette = base.quantize(16)
    np.testing.assert_array_equal(np.asarray(load_image(encode(palette))), np.asarray(palette.convert("RGB")))
    assert set(np.unique(np.asarray(load_image(encode(base.convert("1")))))) == {0, 255}
    cmyk = np.asarray(load_image(encode(base.convert("CMYK"), "JPEG", quality=95)), int)
    assert np.abs(cmyk - np.asarray(base, int)).mean() < 8
    for mode in ("HSV", "YCbCr", "LAB", "RGBX"):
        source = base.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), (200, 128, 128))
        assert load_image(source).mode == "RGB"


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (4, 2), (*RED, 0))
    image.putpixel((1, 1), (*RED, 255))
    got = load_image(encode(image))
    assert got.getpixel((0, 0)) == (255, 255, 255) and got.getpixel((1, 1)) == RED
    assert load_image(image, background=GREEN).getpixel((0, 0)) == GREEN
    half = load_image(Image.new("RGBA", (1, 1), (255, 255, 255, 128)), background=(0, 0, 0))
    assert abs(half.getpixel((0, 0))[0] - 128) <= 1
    grey = Image.new("LA", (2, 2), (0, 0))
    assert load_image(grey).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("La", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    got = load_image(encode(palette, transparency=0))
    assert got.getpixel((0, 0)) == (255, 255, 255) and got.getpixel((1, 0)) == BLUE


def test_sixteen_bits_are_scaled_not_clipped():
    values = [0, 128, 257 * 100, 40000, 65535]
    wanted = [0, 0, 100, 156, 255]
    data = png(5, 1, 16, 0, [struct.pack(">5H", *values)])
    assert [pixel[0] for pixel in np.asarray(load_image(data))[0]] == wanted
    deep = Image.fromarray(np.array([values], np.uint16))
    assert [pixel[1] for pixel in np.asarray(load_image(deep))[0]] == wanted
    integers = Image.fromarray(np.array([values], np.int32))
    assert [pixel[2] for pixel in np.asarray(load_image(integers))[0]] == wanted
    colour = png(2, 1, 16, 2, [struct.pack(">6H", 65535, 0, 25700, 0, 65535, 0)])
    assert np.abs(np.asarray(load_image(colour), int) - [[[255, 0, 100], [0, 255, 0]]]).max() <= 1
    alpha = png(1, 1, 16, 6, [struct.pack(">4H", 0, 0, 0, 0)])
    assert load_image(alpha).getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(data).getpixel((3, 3)) == RED


def test_smallest_picture():
    assert load_image(encode(Image.new("RGB", (1, 1), BLUE))).getpixel((0, 0)) == BLUE


def test_pixel_cap_comes_before_decoding():
    # 3.6 G pixels are announced and no data follows: decoding would fail in another way, or fill the memory.
    with pytest.raises(InputError, match="pixels"):
        load_image(png(60000, 60000, 8, 2, []))
    with pytest.raises(InputError, match=r"12000x9000 = 108,000,000 pixels; at most 100,000,000.*max_pixels"):
        load_image(png(12000, 9000, 8, 2, []))
    with pytest.raises(InputError, match=r"32x24 = 768 pixels; at most 700"):
        load_image(encode(gradient()), max_pixels=700)
    with pytest.raises(InputError, match="at most 700"):
        load_image(gradient(), max_pixels=700)


@pytest.mark.parametrize("kind, name", [("GIF", "a GIF"), ("BMP", "a BMP"), ("TIFF", "a TIFF")])
def test_other_formats_are_named(tmp_path, kind, name):
    path = tmp_path / "photo.jpg"  # the name does not decide
    path.write_bytes(encode(gradient(), kind))
    with pytest.raises(InputError, match=rf"photo.jpg is {name}; wanted JPEG or PNG or WEBP. Save it as"):
        load_image(path)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "an empty file"),
        (b"hello, this is text", "not a picture"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "an AVIF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"%PDF-1.7", "a PDF"),
        (b"\xff\xd8\xff" + bytes(20), "a JPEG whose header is damaged"),
        (b"\x89PNG\r\n\x1a\n", "header is damaged|damaged or cut off"),
    ],
)
def test_what_is_no_picture_is_named(data, text):
    with pytest.raises(InputError, match=text):
        load_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_off_files(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encode(noise, kind)
    with pytest.raises(InputError, match="damaged"):
        load_image(data[: len(data) // 2])


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*nobody.png.*Check the path.*working folder"):
        load_image(tmp_path / "nobody.png")
    with pytest.raises(InputError, match=r"is a folder; wanted one picture"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_wrong_arrays(array):
    with pytest.raises(InputError, match=r"uint8 RGB \[H,W,3\].*got (float32|uint8) \["):
        load_image(array)


def test_wrong_objects():
    with pytest.raises(InputError, match=r"got NoneType"):
        load_image(None)
    with pytest.raises(InputError, match=r"no pixels \(0x4\)"):
        load_image(np.zeros((4, 0, 3), np.uint8))
    with pytest.raises(InputError, match=r"mode F with values 0..3e\+06"):
        load_image(Image.fromarray(np.array([[0, 3e6]], np.float32)))
    import torch

    with pytest.raises(InputError, match=r"got Tensor. For a torch tensor"):
        load_image(torch.zeros(3, 4, 4))


def test_array_views_are_read_right():
    pixels = np.asarray(gradient())
    np.testing.assert_array_equal(np.asarray(load_image(pixels[:, ::-1])), pixels[:, ::-1])
    flipped = ImageOps.mirror(gradient())
    np.testing.assert_array_equal(np.asarray(load_image(flipped)), pixels[:, ::-1])


def test_shipped_photo():
    import idcore

    path = Path(idcore.__file__).parent / "assets" / "photos" / "astronaut.png"
    assert load_image(path).size == (512, 512)


def test_phone_pictures_with_a_second_picture_inside():
    image = gradient(64, 48)
    data = encode(image, "MPO", save_all=True, append_images=[image.resize((8, 8))])
    assert load_image(data).size == (64, 48)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's own remarks on broken EXIF blocks
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_give_another_error(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    clean = encode(gradient(), kind, exif=exif)
    refused = 0
    for _ in range(300):
        data = bytearray(clean)
        for at in rng.integers(0, min(len(data), 200), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        try:
            assert load_image(bytes(data), max_pixels=10**6).mode == "RGB"
        except InputError as error:
            refused += 1
            assert str(error).startswith("The picture")
    assert 30 < refused <= 300
