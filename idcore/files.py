"""Safetensors in and out: what a file is before anything opens it, whole reads, all-or-nothing writes, key checks.

The public door is `idcore.weights`, which has all of this and the published layouts.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from idcore.errors import WeightsError

_MAX_HEADER = 100_000_000  # the format's own limit for the JSON header


def sniff(path: str | Path) -> str:
    """ "safetensors", "torch pickle", or words for what it is instead.

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
        raise WeightsError(
            f"{what}: {path} is a torch pickle, which can carry code; it is not opened here. "
            f"Convert it once: idcore.weights.convert_pickle({str(path)!r}, 'out.safetensors')"
        )
    if kind != "safetensors":
        raise WeightsError(f"{what}: wanted a safetensors file, {path} is {kind}")
    size = path.stat().st_size
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise WeightsError(
                f"{what}: {path} is truncated or no safetensors file: its header should take "
                f"{length:,} bytes, the file has {size:,}; fetch it again"
            )
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{what}: the header of {path} is damaged ({e}); fetch the file again") from e
    if 8 + length + end != size:
        raise WeightsError(
            f"{what}: {path} is truncated or damaged: its header speaks of {8 + length + end:,} "
            f"bytes, the file has {size:,}; fetch it again"
        )
    return header, metadata


def read_safetensors(
    path: str | os.PathLike, *, what: str = "weights", check_finite: bool = True, keep: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file to CPU tensors in the file's dtypes.

    Args:
        path: The file.
        what: Named in errors ("PuLID weights").
        check_finite: Refuse a tensor with NaN or infinity, naming it.
        keep: Read only the keys that begin so.

    Returns:
        Tensors by key, and the file's metadata (strings). The tensors may lie in the mapped file, unaligned:
        copy what is to be computed with, or the last bit depends on where in the file a tensor stood.

    Raises:
        WeightsError: missing, empty, truncated, not safetensors, or not finite.
    """
    path = Path(path)
    check_container(path, what)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys() if k.startswith(keep)}  # noqa: SIM118
            metadata = dict(f.metadata() or {})
    except (SafetensorError, OSError) as e:
        raise WeightsError(f"{what}: {path} is not a readable safetensors file ({e}); fetch it again") from e
    if check_finite:
        require_finite(tensors, f"{what} {path}")
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write all or nothing: a staging file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        WeightsError: the folder is missing or read-only, or the disk is full. What stood at ``path`` before
            is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        staging.touch()
        usual = staging.stat().st_mode & 0o777  # the library may write for the owner alone
        save_file(_separate(tensors), str(staging), metadata=dict(metadata or {}))
        staging.chmod(usual)
        with open(staging, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(staging, path)
    except (OSError, SafetensorError) as e:
        raise WeightsError(_why_not_written(path, tensors, e)) from e
    finally:
        try:
            staging.unlink(missing_ok=True)
        except OSError:  # no folder to clean, or one that cannot be written: nothing was left there
            pass
    return path


def replace_text(path: str | os.PathLike, text: str) -> Path:
    """Write a text file all or nothing: a staging file beside it, flushed to disk, then renamed over it.

    Raises:
        WeightsError: the folder is missing or read-only, or the disk is full; what stood there is still there.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(staging, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(staging, path)
    except OSError as e:
        raise WeightsError(_why_not_written(path, {}, e, len(text))) from e
    finally:
        try:
            staging.unlink(missing_ok=True)
        except OSError:
            pass
    return path


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with its own memory (safetensors refuses shared storage)."""
    seen: set[int] = set()
    out = {}
    for key, t in tensors.items():
        t = t.detach().contiguous()
        where = t.untyped_storage().data_ptr()
        out[key] = t.clone() if where in seen else t
        seen.add(where)
    return out


def _why_not_written(path: Path, tensors: Mapping[str, Tensor], cause: Exception, size: int = 0) -> str:
    need = (size + sum(t.numel() * t.element_size() for t in tensors.values())) / 2**20
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free there"
    except OSError:
        free = f"the folder {path.parent} does not exist or cannot be read"
    return (
        f"could not write {path}: {cause}; wanted a writable folder with {need:.1f} MiB free, "
        f"found {free}. Nothing that stood at this path was touched"
    )


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise WeightsError naming the floating tensors that hold NaN or infinity (first 5 and the count)."""
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise WeightsError(
            f"{what}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity: {first_few(bad)}; "
            "the file is damaged or its training diverged: fetch it again"
        )


def require_keys(found: Mapping[str, Tensor], wanted: Mapping[str, Iterable[int]], what: str) -> None:
    """Raise WeightsError unless ``found`` has exactly the wanted keys and shapes.

    The message names the first 5 and the count of missing, unexpected and wrong-shaped keys.
    """
    shapes = {k: tuple(s) for k, s in wanted.items()}
    missing = [k for k in shapes if k not in found]
    extra = [k for k in found if k not in shapes]
    wrong = [
        f"{k} (wanted {list(shapes[k])}, got {list(t.shape)})"
        for k, t in found.items()
        if k in shapes and tuple(t.shape) != shapes[k]
    ]
    named = (("missing", missing), ("unexpected", extra), ("of the wrong shape", wrong))
    parts = [f"{len(keys)} {label}: {first_few(keys)}" for label, keys in named if keys]
    if parts:
        raise WeightsError(
            f"{what}: wanted {len(shapes)} tensors, got {len(found)}; "
            + "; ".join(parts)
            + ". Is it the right file and version? `idcore.weights.describe(path)` tells"
        )


def first_few(names: list[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """ "sha256:..." over names, dtypes, shapes and bytes, whatever the order of the keys."""
    h = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().cpu().contiguous()
        h.update(f"{key} {t.dtype} {list(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{h.hexdigest()}"


def file_hash(path: str | os.PathLike) -> str:
    """ "sha256:..." of a whole file."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return f"sha256:{h.hexdigest()}"
