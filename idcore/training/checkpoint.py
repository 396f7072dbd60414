"""Checkpoint folders: written aside, hashed, renamed in one step, checked; older ones go only after that.

    OUT/checkpoints/step-00000500/
        *.safetensors    tensors by name
        state.json       everything else
        manifest.json    size and SHA-256 of each file above; written last

A folder without a manifest that fits is damaged, whatever it is called, and is passed over with a message.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files
from ..errors import IdcoreError, InputError, WeightsError

FORMAT = 1
_MANIFEST, _STATE, _ASIDE = "manifest.json", "state.json", ".aside-"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked, its step, and its `state.json`."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of NAME.safetensors on the CPU, in memory of their own; {} if there is no such file."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return {}
        tensors, _ = files.read_safetensors(path, what="checkpoint", check_finite=False)
        return {k: v.clone() for k, v in tensors.items()}


def save(
    parent: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `parent/step-…` and remove all but the newest `keep` checkpoints.

    Args:
        tensors: by file name (without suffix), then by key.
        state: what JSON holds; `step` and `format` are added.

    Raises:
        IdcoreError: the folder cannot be written or the disk is full. What stood there before still does.
    """
    final = parent / f"step-{step:08d}"
    staging = parent / f"{_ASIDE}{final.name}.{secrets.token_hex(4)}"
    try:
        if not (final.exists() and damage(final) is None):
            _write(staging, step, tensors, state)
            if final.exists():  # a damaged one of this step
                os.replace(final, parent / f"{_ASIDE}{final.name}.{secrets.token_hex(4)}.damaged")
            os.replace(staging, final)
            _flush(parent)
        why = damage(final)
        if why is not None:
            raise IdcoreError(f"{final.name} did not reach the disk whole: {why}")
    except (OSError, IdcoreError) as e:
        shutil.rmtree(staging, ignore_errors=True)
        raise IdcoreError(_why_not_saved(parent, step, e)) from e
    prune(parent, step, keep)
    return final


def _write(staging: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    staging.mkdir(parents=True)
    for name, values in tensors.items():
        if not values:  # an optimiser before its first step
            continue
        files.write_safetensors(staging / f"{name}.safetensors", values)
    _write_json(staging / _STATE, {"format": FORMAT, "step": step, **state})
    entries = {
        p.name: {"bytes": p.stat().st_size, "sha256": files.file_hash(p).removeprefix("sha256:")}
        for p in sorted(staging.iterdir())
    }
    _write_json(staging / _MANIFEST, {"format": FORMAT, "files": entries})
    _flush(staging)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())


def _flush(folder: Path) -> None:
    """Names in a folder reach the disk only when the folder itself is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why_not_saved(parent: Path, step: int, cause: Exception) -> str:
    try:
        left = f"{shutil.disk_usage(parent).free / 2**20:.1f} MiB are free there"
    except OSError:
        left = "the folder cannot be read"
    last = next((f.name for f in folders(parent) if damage(f) is None), None)
    kept = f"the last good checkpoint, {last}, is intact" if last else "there is no earlier checkpoint"
    reason = f"{cause.strerror or cause}" if isinstance(cause, OSError) else str(cause)
    return (
        f"the checkpoint of step {step} was not saved in {parent}: {reason} ({left}); {kept}. "
        "Free some space or make the folder writable, then go on with --resume"
    )


def folders(parent: Path) -> list[Path]:
    """Folders named as checkpoints, newest first."""
    try:
        found = [p for p in parent.iterdir() if p.name.startswith("step-") and p.name[5:].isdigit() and p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise WeightsError(f"checkpoints in {parent} cannot be read: {e.strerror or e}") from e
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file has the size and the SHA-256 of the manifest."""
    try:
        text = (folder / _MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, UnicodeDecodeError) as e:
        return f"{_MANIFEST} cannot be read ({e})"
    try:
        manifest = json.loads(text)
        entries = {str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            return f"{_MANIFEST} is of format {manifest['format']}, this version reads {FORMAT}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is damaged"
    if _STATE not in entries or any("/" in name or "\\" in name for name in entries):
        return f"{_MANIFEST} is damaged"
    for name, (size, sha) in entries.items():
        why = _file_damage(folder / name, size, sha)
        if why:
            return f"{name} {why}"
    return None


def _file_damage(path: Path, size: int, sha: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes, the manifest says {size:,}"
        if files.file_hash(path) != f"sha256:{sha}":
            return "is not what was written: its SHA-256 differs from the manifest's"
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read ({e.strerror or e})"
    return None


def newest(parent: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest checkpoint that is whole; `say` gets a line for every damaged one that is passed over.

    Raises:
        WeightsError: there are checkpoints, and all of them are damaged.
    """
    bad = []
    for folder in folders(parent):
        why = damage(folder)
        if why is None:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            return Checkpoint(folder, int(state["step"]), state)
        bad.append(f"{folder.name}: {why}")
        say(f"passing over a damaged checkpoint, {bad[-1]}")
    if bad:
        raise WeightsError(f"no whole checkpoint in {parent}: {'; '.join(bad)}. Start anew in another folder")
    return None


def require_none(parent: Path) -> None:
    """Raise InputError where a run has saved already."""
    there = folders(parent)
    if there:
        raise InputError(
            f"{parent.parent} holds a run already ({there[0].name}); add --resume to go on with it, or choose another "
            "--out"
        )


def prune(parent: Path, step: int, keep: int) -> None:
    """Remove what a killed save left, and all but the newest `keep` checkpoints up to `step`, which is whole.

    Later ones are damaged, or the run would have gone on from them; they do not count, and go when it gets there.
    """
    for folder in [f for f in folders(parent) if int(f.name[5:]) <= step][keep:]:
        aside = parent / f"{_ASIDE}{folder.name}.{secrets.token_hex(4)}"
        try:
            os.replace(folder, aside)  # so that a half removed folder is none of the checkpoints
        except OSError:
            continue
    clean(parent)


def clean(parent: Path) -> None:
    """Remove what a killed save left behind."""
    for folder in parent.glob(f"{_ASIDE}*"):
        shutil.rmtree(folder, ignore_errors=True)
