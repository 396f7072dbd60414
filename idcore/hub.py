"""`idcore fetch`: published weights into one folder, by pinned commit and SHA-256, resumable.

    $IDCORE_HOME/
      pulid-v1.1/pulid_v1.1.safetensors
      pulid-v1.1/manifest.json          what came: commit, SHA-256, size of each file
      .parts/                           downloads that have not ended yet

A file gets its name when its hash has been checked, never before. Where a commit is not pinned, the newest is resolved
once and all is taken from that one; where no hash is pinned, the hub's own (large files) is checked and noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from idcore.env import home as default_home
from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.files import file_hash, sniff
from idcore.recipes import File, Recipe, recipe
from idcore.transport import HubTransport, Remote, Transport

MANIFEST = "manifest.json"
PARTS = ".parts"


def fetch(
    name: str,
    *,
    home: str | os.PathLike | None = None,
    accept_licence: bool = False,
    convert: bool = False,
    transport: Transport | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Download a recipe's files; what is there and right is not downloaded again.

    Args:
        name: See `idcore.recipes.RECIPES`.
        home: Folder; by default $IDCORE_HOME, else ~/.cache/idcore.
        accept_licence: Needed for recipes with non-commercial terms.
        convert: Also make safetensors of torch pickles (read with `weights_only`: none of their code runs).
        transport: Where files come from.
        say: Called with a line of progress.

    Returns:
        The recipe's folder.

    Raises:
        InputError: unknown name, or terms not accepted.
        WeightsError: a file could not be had, or is another than the pinned one; what was right before stays.
    """
    root, r = Path(home or default_home()), recipe(name)
    transport = transport or HubTransport()
    if not accept_licence:
        require_accepted(name)
    say(f"{name}: {r.what}; licence: {r.licence}")
    commits: dict[str, str] = {}
    with _alone(root, name):
        for file in r.files:
            _one(root, r, file, transport, commits, say)
            if convert:
                convert_file(root / name, file, say)
    return root / name


@contextlib.contextmanager
def _alone(root: Path, name: str) -> Iterator[None]:
    """One process at a time fetches a recipe: two would append to one file."""
    from filelock import FileLock, Timeout

    try:
        (root / PARTS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / PARTS / f"{name}.lock", timeout=1)
        lock.acquire()
    except Timeout as e:
        raise WeightsError(f"{name} is being fetched by another process into {root}; wait for it") from e
    except OSError as e:
        raise WeightsError(f"cannot write into {root}: {e.strerror or e}; set IDCORE_HOME to another folder") from e
    try:
        yield
    finally:
        lock.release()


def require_accepted(name: str) -> None:
    """Raise InputError where a recipe's terms have to be accepted first."""
    if recipe(name).restricted:
        raise InputError(
            f"{name}: {recipe(name).licence}. Read the publishers' terms; if they allow your use, fetch with "
            "--accept-licence"
        )


def _one(
    root: Path, r: Recipe, file: File, transport: Transport, commits: dict[str, str], say: Callable[[str], None]
) -> None:
    target, noted = root / r.name / file.path, read_manifest(root / r.name)
    if target.is_file() and not problem_of(target, file, noted):
        say(f"  {file.path}: here")
        return
    part = root / PARTS / r.name / file.path.replace("/", "__")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.repo and not file.revision:
            if file.repo not in commits:
                commits[file.repo] = transport.commit(file.repo)
            file = replace(file, revision=commits[file.repo])
        remote = transport.look(file)
        part = part.with_name(f"{part.name}.{(file.sha256 or remote.sha256 or file.revision)[:12]}")
        _check_space(part, remote)
        say(f"  {file.path}: from {file.origin}" + (f", {remote.size / 1e6:.0f} MB" if remote.size else ""))
        transport.get(remote, part)
    except IdcoreError:
        raise
    except Exception as e:  # transports raise many kinds; each means that this file could not be had
        raise WeightsError(_why_not_fetched(r, file, part, e)) from e
    digest = _checked(part, file, remote)
    size = part.stat().st_size
    os.replace(part, target)
    note(root / r.name, file.path, {"sha256": digest, "size": size, "from": file.origin, "commit": file.revision})


def _check_space(part: Path, remote: Remote) -> None:
    if remote.size is None:
        return
    wanted = remote.size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(part.parent).free
    if wanted > free:
        raise WeightsError(
            f"{part.name}: {wanted / 1e6:.0f} MB are still to come, {free / 1e6:.0f} MB are free in {part.parent}; "
            "free some space or set IDCORE_HOME to another disk"
        )


def _checked(part: Path, file: File, remote: Remote) -> str:
    """The hash of what came, once it is known to be what was wanted; a wrong file is thrown away."""
    digest = file_hash(part).removeprefix("sha256:")
    git = _git_hash(part) if remote.git else ""
    for who, got, wanted in (
        ("pinned SHA-256", digest, file.sha256),
        ("hub's SHA-256", digest, remote.sha256),
        ("hub's git hash", git, remote.git),
    ):
        if wanted and got != wanted:
            size = part.stat().st_size
            part.unlink()
            raise WeightsError(
                f"{file.path} from {file.origin}: the {who} is {wanted}, what came ({size:,} bytes) has {got}; it was "
                "thrown away. Fetch again; if it stays so, the publisher changed the file"
            )
    return digest


def _git_hash(path: Path) -> str:
    h = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    h.update(path.read_bytes())
    return h.hexdigest()


def _why_not_fetched(r: Recipe, file: File, part: Path, e: Exception) -> str:
    kept = f"; {part.stat().st_size:,} bytes are kept and the next fetch goes on from there" if part.exists() else ""
    first = str(e).strip().splitlines()[0] if str(e).strip() else ""
    return (
        f"{r.name}: {file.path} could not be fetched from {file.origin} ({type(e).__name__}: {first}){kept}. Check the "
        "network, HF_ENDPOINT, HF_HUB_OFFLINE and, for gated repositories, `hf auth login`; without a network import "
        "a bundle: idcore fetch --from-bundle FILE"
    )


# -- what is here -----------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What was noted of a recipe's files when they came; empty where nothing was, or the note is damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {k: v for k, v in files.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note(folder: Path, path: str, entry: dict[str, Any]) -> None:
    """Add a file to the manifest, all or nothing."""
    files = {**read_manifest(folder), path: entry}
    staged = folder / f".{MANIFEST}.part"
    staged.write_text(json.dumps({"format": "idcore-weights", "files": files}, indent=1) + "\n")
    os.replace(staged, folder / MANIFEST)


def problem_of(path: Path, file: File, noted: dict[str, dict[str, Any]], *, read: bool = False) -> str:
    """What is wrong with a file that is here, or "".

    Args:
        path: The file.
        file: What it should be.
        noted: The manifest.
        read: Hash the file; otherwise its size is compared, and its hash only where nothing was noted.
    """
    entry = noted.get(file.path, {})
    wanted = file.sha256 or entry.get("sha256", "")
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    if entry and entry.get("size") != size:
        return f"it has {size:,} bytes, {entry.get('size'):,} came when it was fetched"
    if not wanted or entry.get("sha256") == wanted and not read:
        return ""
    digest = file_hash(path).removeprefix("sha256:")
    return "" if digest == wanted else f"its SHA-256 is {digest[:16]}..., wanted {wanted[:16]}..."


def convert_file(folder: Path, file: File, say: Callable[[str], None] = lambda text: None) -> None:
    """Make the safetensors file of a pickle that is here, unless there is one.

    Raises:
        WeightsError: as `idcore.weights.convert`.
    """
    from idcore.weights import convert

    source = folder / file.path
    if not file.converted or (folder / file.converted).is_file() or not source.is_file():
        return
    if sniff(source) != "torch pickle":
        raise WeightsError(f"{source}: wanted a torch pickle to convert, it is {sniff(source)}; fetch it again")
    say(f"  {file.converted}: {convert(source, folder / file.converted, unpickle=True)}")


def usable(name: str, path: str, home: str | os.PathLike | None = None) -> Path | None:
    """The file of a recipe that idcore can read, where it is here: the converted one of a pickle; else None.

    Args:
        name: Of the recipe.
        path: Of the file in it, as published.
        home: As in :func:`fetch`.
    """
    r = recipe(name)
    file = next((f for f in r.files if f.path == path), None)
    if file is None:
        raise InputError(f"{name} has no file {path!r}; it has {', '.join(f.path for f in r.files)}")
    found = Path(home or default_home()) / name / (file.converted or file.path)
    return found if found.is_file() else None


def hash_stream(source: Any, out: Any, blocks: int = 1 << 20) -> tuple[str, int]:
    """Copy a stream; SHA-256 and size of what went through."""
    h, size = hashlib.sha256(), 0
    while block := source.read(blocks):
        h.update(block)
        out.write(block)
        size += len(block)
    return h.hexdigest(), size
