"""What a file is, before anything opens it: safetensors, torch pickle, or one of the usual mishaps."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from idcore.errors import WeightsError

_MAX_HEADER = 100_000_000  # the format's own limit for the JSON header


def sniff(path: str | Path) -> str:
    """"safetensors", "torch pickle", or words for what it is instead.

    Raises:
        WeightsError: the file is missing, is a folder, or cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except IsADirectoryError as e:
        raise WeightsError(f"{path} is a folder; wanted a weights file in it") from e
    except FileNotFoundError as e:
        raise WeightsError(f"{path} does not exist; wanted a weights file") from e
    except OSError as e:
        raise WeightsError(f"{path} cannot be read: {e}") from e
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (the file itself was not fetched: `git lfs pull`)"
    if len(head) >= 9 and head[4:9] == b"\0\0\0\0{":  # first: the length's low bytes may look like a pickle's
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "torch pickle"
    if head.lstrip()[:1] == b"<":
        return "an HTML page (a download link that answered with a web page)"
    return "of an unknown kind"


def check_container(path: str | Path, what: str) -> tuple[dict[str, dict], dict[str, str]]:
    """Check that a file is a whole safetensors file.

    Returns:
        The header's entries by key ({"dtype", "shape", "data_offsets"}), and the metadata.

    Raises:
        WeightsError: it is not; the message says what it is, or how many bytes are missing.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "torch pickle":
        raise WeightsError(f"{what}: {path} is a torch pickle, which can carry code; it is not opened here. "
                           f"Convert it once: idcore.weights.convert_pickle({str(path)!r}, 'out.safetensors')")
    if kind != "safetensors":
        raise WeightsError(f"{what}: wanted a safetensors file, {path} is {kind}")
    size = path.stat().st_size
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise WeightsError(f"{what}: {path} is truncated or no safetensors file: its header should take "
                               f"{length:,} bytes, the file has {size:,}; fetch it again")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{what}: the header of {path} is damaged ({e}); fetch the file again") from e
    if 8 + length + end != size:
        raise WeightsError(f"{what}: {path} is truncated or damaged: its header speaks of {8 + length + end:,} "
                           f"bytes, the file has {size:,}; fetch it again")
    return header, metadata
