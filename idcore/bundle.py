"""Offline bundles: fetched recipes in one tar file, to carry to a machine without a network.

The first member says what follows; each file is checked by SHA-256 on its way in and out. Only files that a known
recipe has are taken, under the recipe's own names: nothing of an archive chooses where it is written.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from idcore.env import home as default_home
from idcore.errors import InputError, WeightsError
from idcore.files import file_hash
from idcore.hub import PARTS, hash_stream, note, problem_of, read_manifest
from idcore.recipes import RECIPES, File, recipe

FORMAT = "idcore-bundle"
HEAD = "idcore-bundle.json"
_MAX_HEAD = 10_000_000


def export_bundle(names: Sequence[str], out: str | os.PathLike, home: str | os.PathLike | None = None) -> Path:
    """Write the named recipes as one tar file (not compressed: weights do not shrink).

    Args:
        names: Recipes that were fetched, whole or converted.
        out: The file to write.
        home: As in `idcore.hub.fetch`.

    Raises:
        InputError: no names, or an unknown one.
        WeightsError: a file is missing or damaged, or `out` cannot be written.
    """
    root, out = Path(home or default_home()), Path(out)
    if not names:
        raise InputError("a bundle needs at least one recipe: idcore fetch pulid-v1.1 --bundle FILE")
    members = [m for name in dict.fromkeys(names) for m in _members(root, name)]
    head = {"format": FORMAT, "version": 1, "licences": {n: recipe(n).licence for n in names}}
    head["files"] = [{k: v for k, v in m.items() if k != "at"} for m in members]
    staged = out.with_name(f".{out.name}.part")
    try:
        with tarfile.open(staged, "w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, HEAD, io.BytesIO(text := json.dumps(head, indent=1).encode()), len(text))
            for m in members:
                with open(m["at"], "rb") as f:
                    _add(tar, f"{m['recipe']}/{m['path']}", f, m["size"])
        os.replace(staged, out)
    except OSError as e:
        raise WeightsError(f"could not write the bundle {out}: {e.strerror or e}; free some space there") from e
    finally:
        staged.unlink(missing_ok=True)
    return out


def _members(root: Path, name: str) -> list[dict[str, Any]]:
    folder, found = root / name, []
    noted = read_manifest(folder)
    for file in recipe(name).files:
        here = [p for p in (file.path, file.converted) if p and (folder / p).is_file()]
        if not here and file.optional:
            continue
        if not here:
            raise WeightsError(f"bundle: {name} is not complete, {file.path} is missing; run `idcore fetch {name}`")
        for path in here:
            at = folder / path
            if path == file.path and (wrong := problem_of(at, file, noted, read=True)):
                raise WeightsError(f"bundle: {at} is damaged: {wrong}; run `idcore fetch {name}`")
            digest = file_hash(at).removeprefix("sha256:")
            found.append({"recipe": name, "path": path, "sha256": digest, "size": at.stat().st_size, "at": at})
    return found


def _add(tar: tarfile.TarFile, name: str, source: Any, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    tar.addfile(info, source)


def import_bundle(
    path: str | os.PathLike, home: str | os.PathLike | None = None, say: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Unpack a bundle into the folder of weights; returns the recipes' names.

    Raises:
        WeightsError: no bundle, a file that no recipe has, a wrong hash, or an archive that ends early. Files that
            passed before are kept, a wrong one is not.
    """
    root = Path(home or default_home())
    names: dict[str, None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            wanted = _head(tar, path)
            while (info := tar.next()) is not None:
                entry = wanted.pop(info.name, None)
                if entry is None or not info.isreg():
                    raise WeightsError(f"{path}: {info.name!r} is not among the files that this bundle names")
                names[entry["recipe"]] = None
                _unpack(tar, info, entry, root, path)
                say(f"{info.name}: {info.size:,} bytes")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise WeightsError(f"{path} cannot be unpacked as a bundle: {e}; copy it again") from e
    if wanted:
        raise WeightsError(f"{path} ends early: {', '.join(list(wanted)[:5])} did not come; copy it again")
    return list(names)


def _head(tar: tarfile.TarFile, path: Any) -> dict[str, dict[str, Any]]:
    first = tar.next()
    if first is None or first.name != HEAD or not first.isreg() or first.size > _MAX_HEAD:
        raise WeightsError(f"{path} is no bundle of `idcore fetch NAME --bundle`: it does not begin with {HEAD}")
    try:
        raw = json.loads(tar.extractfile(first).read())
        files = {f"{e['recipe']}/{e['path']}": dict(e) for e in raw["files"]} if raw["format"] == FORMAT else {}
    except (ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{path}: the bundle's list of files is damaged ({e}); copy it again") from e
    for name, entry in files.items():
        if _known(entry) is None:
            raise WeightsError(
                f"{path}: no recipe of this idcore has {name!r}; update idcore, or fetch the recipe itself"
            )
    return files


def _known(entry: dict[str, Any]) -> File | None:
    r = RECIPES.get(str(entry.get("recipe")))
    return next((f for f in r.files if entry.get("path") in (f.path, f.converted)), None) if r else None


def _unpack(tar: tarfile.TarFile, info: tarfile.TarInfo, entry: dict[str, Any], root: Path, path: Any) -> None:
    file = _known(entry)
    target = root / entry["recipe"] / entry["path"]
    part = root / PARTS / entry["recipe"] / f"{entry['path'].replace('/', '__')}.bundle"
    for folder in (part.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as f:
            digest, size = hash_stream(tar.extractfile(info), f)
        pinned = file.sha256 if entry["path"] == file.path else ""
        for wanted in (pinned, str(entry.get("sha256"))):
            if wanted and digest != wanted:
                raise WeightsError(f"{path}: {info.name} has SHA-256 {digest}, wanted {wanted}; copy the bundle again")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    if entry["path"] == file.path:
        note(root / entry["recipe"], file.path, {"sha256": digest, "size": size, "from": f"bundle {Path(path).name}"})
