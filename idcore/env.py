"""`idcore env` / `python -m idcore.env`: what is built and what is usable here, with the reason where not.

Every probe is guarded on its own: a failure becomes a value of the report, never an exception.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy", "torch", "diffusers", "transformers", "safetensors", "pillow", "onnxruntime", "onnxruntime-gpu",
    "triton", "insightface", "accelerate", "peft",
)  # fmt: skip


def home() -> Path:
    """Folder of downloaded or converted weights: $IDCORE_HOME, else ~/.cache/idcore. Nothing is created."""
    return Path(os.environ.get("IDCORE_HOME") or Path.home() / ".cache" / "idcore")


def _guard(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as e:  # a report must survive any broken package
        return f"failed: {type(e).__name__}: {e}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _gpu() -> tuple[str | None, str | None]:
    import torch

    if not torch.cuda.is_available():
        return None, None
    driver = torch._C._cuda_getDriverVersion()
    return torch.cuda.get_device_name(), f"{driver // 1000}.{driver % 1000 // 10}"


def build_info() -> dict[str, Any]:
    """What the compiled module holds: isa, cuda_archs, ...; with "error" where it does not load."""
    import torch  # noqa: F401  (first, so that one OpenMP runtime serves both)

    try:
        module = importlib.import_module("idcore._C")
    except ImportError as e:
        return {"isa": [], "cuda_archs": [], "error": f"{e}; reinstall idcore (pip install .) to build it"}
    return dict(module.build_info())


def machine() -> dict[str, Any]:
    """The machine line of every figure: cpu, cores, isa, gpu, driver, torch, triton, commit."""
    gpu = _guard(_gpu)
    built = _guard(build_info)
    return {
        "cpu": _guard(_cpu_name),
        "cores": os.cpu_count(),
        "isa": built.get("isa_chosen") if isinstance(built, dict) else built,
        "gpu": gpu[0] if isinstance(gpu, tuple) else gpu,
        "driver": gpu[1] if isinstance(gpu, tuple) else None,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "commit": _guard(_commit),
    }


def command_line() -> str:
    """The command that is running, as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = Path(sys.argv[0]).name.removesuffix(".exe")
    head = f"python -m {spec.name.removesuffix('.__main__')}" if spec else script
    return " ".join([head, *sys.argv[1:]])


def _backends() -> dict[str, dict[str, Any]]:
    import torch

    from .backends.call import Call
    from .ops import dispatch

    report = {}
    for name in dispatch.ORDER:
        device = "cuda" if name in ("cuda", "triton") else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        typical = Call(device, dtype, 2, 10, 4096, 77, 64, (32,), "ortho_v2", False, False, False, False, True)
        reasons = _guard(lambda n=name, c=typical: dispatch.why_not(n, c))
        reasons = reasons if isinstance(reasons, list) else [reasons]
        if device == "cuda" and not torch.cuda.is_available() and not reasons:
            reasons = ["no CUDA device here"]
        report[name] = {"usable": not reasons, "why_not": reasons}
    return report


def _providers() -> list[str]:
    from .encoders.onnx_runtime import available_providers

    return available_providers()


def _face_models() -> dict[str, str]:
    """The provider that really runs the embedded face models, and why that one."""
    from .encoders.analyzer import default_analyzer

    analyzer = default_analyzer()
    return {"provider": analyzer.provider, "reason": analyzer.reason}


def _weights() -> dict[str, str]:
    assets = Path(__file__).resolve().parent / "assets"
    found = {}
    for path in sorted([*assets.rglob("*.onnx"), *assets.rglob("*.safetensors")]):
        found[f"embedded/{path.relative_to(assets)}"] = f"{path.stat().st_size / 1e6:.1f} MB"
    for path in sorted(home().rglob("*.safetensors")) if home().exists() else []:
        found[str(path)] = f"{path.stat().st_size / 1e6:.1f} MB"
    return found or {"none": f"looked in the package and in {home()}"}


def report() -> dict[str, Any]:
    """Everything `idcore env --json` prints."""
    from . import __version__

    return {
        "machine": _guard(machine),
        "command": command_line(),
        "idcore": __version__,
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in PACKAGES},
        "backends": _guard(_backends),
        "providers": _guard(_providers),
        "face_models": _guard(_face_models),
        "weights": _guard(_weights),
        "home": str(home()),
        "build": _guard(build_info),
        "advice": advice(),
    }


def advice() -> list[str]:
    """What to mend, in words."""
    from .encoders.onnx_runtime import runtime_problems

    found = _guard(runtime_problems)
    return found if isinstance(found, list) else [found]


def as_text(r: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"idcore {r['idcore']}, Python {r['python']}", ""]
    lines += [f"  {k:10} {v}" for k, v in r["machine"].items()] if isinstance(r["machine"], dict) else [r["machine"]]
    lines += ["", "backends of id_attention"]
    for name, b in r["backends"].items() if isinstance(r["backends"], dict) else ():
        lines.append(f"  {name:10} {'usable' if b['usable'] else 'no: ' + '; '.join(b['why_not'])}")
    lines += ["", "build"]
    lines += [f"  {k:14} {', '.join(v) if isinstance(v, list) else v}" for k, v in r["build"].items()]
    lines += [
        "",
        f"ONNX Runtime providers  {r['providers']}",
        f"face models run on      {r['face_models']}",
        "",
        "weights",
    ]
    lines += [f"  {k}: {v}" for k, v in r["weights"].items()] if isinstance(r["weights"], dict) else [r["weights"]]
    lines += ["", "packages"]
    lines += [f"  {k:16} {v or 'not installed'}" for k, v in r["packages"].items()]
    lines += ["", *(f"! {a}" for a in r["advice"])] if r["advice"] else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m idcore.env`."""
    parser = argparse.ArgumentParser(prog="python -m idcore.env", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    r = report()
    print(json.dumps(r, indent=1) if args.json else as_text(r))
    return 0


if __name__ == "__main__":
    from .errors import told

    sys.exit(told(main))
