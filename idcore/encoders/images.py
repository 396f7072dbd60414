"""One door for pictures: whatever comes in, an upright 8-bit RGB PIL image of bounded size goes out."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from idcore.errors import InputError

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

FORMATS = ("JPEG", "PNG", "WEBP")
# Our choice: about twice what a full-frame camera gives, and 300 MB decoded.
MAX_PIXELS = 100_000_000
# How other common formats begin, so that an error can name what came.
_SIGNATURES = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\x00\x00\x01\x00", "an ICO"),
    (b"8BPS", "a Photoshop file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
)
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIF"}
_ADVICE = f"Save it as one of {', '.join(FORMATS)}."


def _kind(head: bytes) -> str:
    """What the first bytes of a file say that it is."""
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video or HEIF-like file")
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    marks = (
        ("JPEG", head[:3] == b"\xff\xd8\xff"),
        ("PNG", head[:4] == b"\x89PNG"),
        ("WEBP", head[8:12] == b"WEBP"),
    )
    for name, fits in marks:
        if fits:
            return f"a {name} whose header is damaged"
    return "not a picture that is known here"


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels ({width}x{height}). Give a picture of at least 1x1.")
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are decoded "
            "here. Scale it down (in Python, for a file that you trust: raise max_pixels)."
        )


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a folder; wanted one picture. Name a file in it.")
    if not path.exists():
        raise InputError(f"There is no file {path}. Check the path (the working folder is {Path.cwd()}).")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Decodes ``data``; the header alone is read before the pixel cap has been checked."""
    try:
        with warnings.catch_warnings():
            # PIL's own alarm about large pictures is replaced by the cap here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size, name, max_pixels)
            image.load()
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} has more pixels than PIL decodes ({error}); at most {max_pixels:,} are decoded here "
            "(max_pixels). Scale it down first."
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is {_kind(data[:32])}; wanted {' or '.join(FORMATS)}. {_ADVICE}") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise InputError(
            f"{name} is damaged or cut off and cannot be decoded ({error}). Get the file again or save it anew."
        ) from error
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(
            f"A numpy picture must be uint8 RGB [H,W,3] with values 0..255, got {array.dtype} "
            f"{list(array.shape)}. Floats in [0,1]: (x * 255).round().astype('uint8'); grey: stack it three "
            "times; BGR: x[..., ::-1]; channels first: x.transpose(1, 2, 0)."
        )
    _check_size(array.shape[1], array.shape[0], "The array", array.size)
    return Image.fromarray(np.ascontiguousarray(array))


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey to 8-bit grey; PIL's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"{name} has mode {image.mode} with values {values.min():g}..{values.max():g}; wanted 8 or 16 bits "
            "per channel. Scale it to 0..255 and convert it to RGB first."
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _deep_to_grey(image, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def load_image(
    source: ImageLike,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """An upright RGB picture (PIL, 8 bits per channel) from a path, file content, PIL image or array.

    Files may be JPEG, PNG or WEBP. EXIF rotation is applied; transparent parts show ``background`` (white, our
    choice); grey, palette, CMYK and 16-bit pictures become 8-bit RGB; of an animation the first frame is taken.
    The number of pixels is checked before anything is decoded.

    Args:
        source: path, ``bytes`` of a file, PIL image, or uint8 RGB array [H,W,3].
        max_pixels: most pixels (width times height) that a file or PIL image may have.
        background: colour (R, G, B; 0..255) behind transparent parts.

    Raises:
        InputError: missing file, folder, other format, damaged file, too many pixels, other kind of object.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        image, name = source, "The PIL image"
        _check_size(*image.size, name, max_pixels)
    elif isinstance(source, bytes):
        name = "The picture"
        image = _open(source, name, max_pixels)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        name = str(path)
        image = _open(_read_file(path), name, max_pixels)
    else:
        raise InputError(
            f"A picture must be a path, bytes, a PIL image or a uint8 RGB array [H,W,3], got "
            f"{type(source).__name__}. For a torch tensor [3,H,W] in [0,1]: "
            "(x * 255).round().byte().permute(1, 2, 0).cpu().numpy()."
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(image), name, background)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise InputError(f"{name} cannot be converted to RGB ({error}). Save it anew. {_ADVICE}") from error
