"""The one place that makes ONNX Runtime sessions: provider named and checked, model files checked.

ONNX Runtime lists providers that cannot run on the machine, and when one fails it goes on with the CPU after a
line in its log. Here the provider that a session really got is read back: ``providers="auto"`` says which it
is and why, anything else that was asked for and is not there is an error.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from idcore.errors import InputError, MissingDependencyError, NoBackendError, WeightsError

log = logging.getLogger("idcore.encoders")

Providers = str | Sequence[str]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SHORT = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
# Distributions that all install the one import name "onnxruntime" and overwrite each other's files.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_GPU_BUILD = "pip uninstall -y onnxruntime && pip install 'idcore[gpu]', or use providers='cpu'."
ASSETS = Path(__file__).resolve().parent.parent / "assets" / "faces"
_checked: dict[tuple[str, int, int], str] = {}
_lock = threading.Lock()


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module; ``MissingDependencyError`` with what to install where it does not import."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"The face encoders need ONNX Runtime, which does not import ({error}). Install one of the two: "
            "pip install 'idcore[cpu]' (any machine) or pip install 'idcore[gpu]' (NVIDIA GPU). Not both."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise MissingDependencyError(
            "onnxruntime is there only as an empty folder, which is what uninstalling one of two ONNX Runtimes "
            "leaves. Repair it: pip install --force-reinstall --no-deps onnxruntime (or onnxruntime-gpu)."
        )
    return onnxruntime


def installed_runtimes() -> dict[str, str]:
    """The installed distributions (name -> version) that put files into the package ``onnxruntime``.

    An empty stand-in distribution (which only satisfies a requirement) is not counted.
    """
    found = {}
    for name in _RUNTIMES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        files = distribution.files
        if files is None or any(file.parts[0] == "onnxruntime" for file in files):
            found[name] = distribution.version
    return found


def runtime_problems() -> list[str]:
    """What is wrong with the installed ONNX Runtimes, in words; empty where nothing is."""
    found = installed_runtimes()
    if len(found) < 2:
        return []
    names = " and ".join(f"{name} {version}" for name, version in found.items())
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else next(iter(found))
    return [
        f"{names} are installed side by side and overwrite each other's files, so which providers work is "
        f"chance. Keep one: pip uninstall -y {' '.join(found)} && pip install --no-deps {keep}=={found[keep]}."
    ]


def available_providers() -> list[str]:
    """What this ONNX Runtime was built with. It says nothing of what runs on this machine."""
    return list(import_onnxruntime().get_available_providers())


def _wanted(providers: Providers) -> list[str]:
    names = [providers] if isinstance(providers, str) else list(providers)
    full = [_SHORT.get(str(name).lower(), name) for name in names]
    bad = [name for name in full if not (isinstance(name, str) and name.endswith("ExecutionProvider"))]
    if bad or not full:
        raise InputError(
            f"Unknown ONNX Runtime providers {providers!r}: wanted 'auto', one of {', '.join(_SHORT)}, or a list "
            "of names that end in ExecutionProvider."
        )
    return full


def has_nvidia_driver() -> bool:
    """Whether the NVIDIA driver's library can be opened; nothing is initialised by that."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _hint(provider: str, available: Sequence[str]) -> str:
    """Why ``provider`` does not run here, as far as can be told, and what to do."""
    if provider != CUDA:
        return "Install the onnxruntime build that has it, or use providers='auto'."
    problems = " ".join(runtime_problems())
    if CUDA not in available:
        advice = "This onnxruntime has no CUDA in it."
        return f"{advice} {problems or _GPU_BUILD}"
    if not has_nvidia_driver():
        return f"There is no NVIDIA driver on this machine. Use providers='cpu'. {problems}".strip()
    return (
        "The driver is there, so the CUDA and cuDNN libraries are missing or of another major version than this "
        "onnxruntime was built for (onnxruntime-gpu 1.31: CUDA 13, cuDNN 9): pip install "
        f"'onnxruntime-gpu[cuda,cudnn]', or use providers='cpu'. {problems}"
    ).strip()


def default_threads() -> int:
    """Threads of a session by default: the usable cores, at most 4 (our choice: the networks are small)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, usable))


class OnnxModel:
    """An ONNX Runtime session whose provider is known. Calls from several threads are safe.

    Attributes:
        path: the model file.
        provider: the provider that the session really runs on, such as "CPUExecutionProvider".
        reason: why this provider, in words.
        inputs: input names in order; ``shapes``: their shapes (None or a name where a size is free).
        outputs: output names in order.
    """

    def __init__(self, path: str | Path, providers: Providers = "auto", threads: int | None = None):
        """Loads ``path`` on ``providers``: "auto", "cpu", "cuda" or a list of provider names.

        "auto" takes CUDA where it really runs and else the CPU, and ``reason`` says which and why. Any other
        wish is met or refused. ``threads``: threads within an operator, by default ``default_threads()``.

        Raises:
            MissingDependencyError: onnxruntime does not import.
            NoBackendError: the first provider that was asked for is not what the session runs on.
            WeightsError: the file is missing or no ONNX model.
            InputError: ``providers`` or ``threads`` make no sense.
        """
        self.path = Path(path)
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1 (or None for the default), got {threads}.")
        runtime = import_onnxruntime()
        if not self.path.is_file():
            raise WeightsError(f"No model file at {self.path}. Check the path or reinstall idcore.")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads would eat the cores that torch needs between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session, self.reason = self._start(runtime, options, providers)
        self.provider: str = self.session.get_providers()[0]
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.shapes = [tuple(item.shape) for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]
        log.info("%s runs on %s: %s", self.path.name, self.provider, self.reason)

    def _load(self, runtime: ModuleType, options: object, names: list[str]):
        if CUDA in names and hasattr(runtime, "preload_dlls"):
            # Finds the CUDA and cuDNN libraries that torch or the nvidia-* wheels brought.
            runtime.preload_dlls()
        try:
            return runtime.InferenceSession(str(self.path), options, providers=names)
        except Exception as error:  # onnxruntime raises its own classes, which share no base below Exception
            if names == [CPU]:
                raise WeightsError(f"{self.path} cannot be loaded as an ONNX model: {error}") from error
            raise NoBackendError(
                f"ONNX Runtime could not load {self.path.name} on {names[0]}: {error}. "
                f"{_hint(names[0], available_providers())}"
            ) from error

    def _start(self, runtime: ModuleType, options: object, providers: Providers):
        available = list(runtime.get_available_providers())
        if providers == "auto":
            if CUDA not in available or not has_nvidia_driver():
                # Trying would only fill the terminal with the runtime's own messages.
                return self._load(runtime, options, [CPU]), _hint(CUDA, available)
            try:
                session = self._load(runtime, options, [CUDA, CPU])
            except NoBackendError as error:
                return self._load(runtime, options, [CPU]), str(error)
            if session.get_providers()[0] == CUDA:
                return session, "CUDA is there and started"
            return session, f"CUDA did not start. {_hint(CUDA, available)}"
        names = _wanted(providers)
        if names[0] not in available:
            raise NoBackendError(
                f"{names[0]} was asked for but this onnxruntime has only {', '.join(available)}. "
                f"{_hint(names[0], available)}"
            )
        if names[0] == CUDA and not has_nvidia_driver():
            raise NoBackendError(f"{CUDA} was asked for but cannot run. {_hint(CUDA, available)}")
        session = self._load(runtime, options, names)
        active = session.get_providers()
        if active[0] != names[0]:
            raise NoBackendError(
                f"{names[0]} was asked for but {self.path.name} would run on {', '.join(active)}. "
                f"{_hint(names[0], available)}"
            )
        return session, "asked for"

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """The named outputs (all by default) for ``feeds`` (input name -> array)."""
        return self.session.run(None if outputs is None else list(outputs), dict(feeds))


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as hex; remembered per path, size and time of change."""
    path = Path(path)
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    with _lock:
        if key in _checked:
            return _checked[key]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    with _lock:
        return _checked.setdefault(key, digest.hexdigest())


def check_file(path: str | Path, sha256: str) -> Path:
    """``path`` where the file is there and has this SHA-256; ``WeightsError`` where not."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No model file at {path}. It comes with the package: reinstall idcore.")
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise WeightsError(f"{path} is a Git LFS pointer, not the model. Run git lfs pull.")
    found = sha256_of(path)
    if found != sha256.lower():
        raise WeightsError(
            f"{path} is not the file that was meant: SHA-256 {found}, wanted {sha256.lower()}. It was changed or "
            "damaged; reinstall idcore, or get the file again."
        )
    return path


def asset(name: str, folder: Path = ASSETS) -> Path:
    """The path of a shipped face model, checked against SHA256SUMS.json."""
    entry = json.loads((folder / "SHA256SUMS.json").read_text(encoding="utf-8")).get(name)
    if entry is None:
        raise InputError(f"No shipped face model is called {name!r}; see SHA256SUMS.json in {folder}.")
    return check_file(folder / name, entry["sha256"])
