"""Times of `id_attention` on a GPU beside what a user would run instead, and beside what the machine allows."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import NoBackendError
from ...ops import id_attention
from ...testing.cases import Case
from ...testing.eager import eager_id_attention
from ...testing.parity import check_parity, poisoned
from ...testing.timing import copy_bandwidth
from .. import ops
from . import calls, graphs, shapes
from .place import Save, few, nothing_saved, place

Call = Callable[[], object]


def _ours(given: dict[str, Any], backend: str) -> Call:
    out = poisoned(given["q"])
    return lambda: id_attention(**given, backend=backend, out=out)


def _flash(given: dict[str, Any]) -> Call:
    """Text attention alone by PyTorch's flash kernel: the floor that identity is measured from."""
    q, k, v = given["q"], given["k_text"], given["v_text"]

    def run() -> object:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def rivals(given: dict[str, Any], compiled: Callable[..., object] | None = None) -> dict[str, Call]:
    """Text-only flash attention, eager PuLID and, if given, its compiled form."""
    found: dict[str, Call] = {"text_only_flash": _flash(given), "eager": lambda: eager_id_attention(**given)}
    if compiled is not None:
        found["compiled"] = lambda: compiled(**given)
    return found


def usable(case: Case) -> dict[str, str | None]:
    """Per backend None where it runs the case rightly, else why not."""
    found: dict[str, str | None] = {}
    for backend in place().backends:
        try:
            parity = check_parity(case, backend, device=place().device)
            found[backend] = None if parity.ok else f"error {parity.error:.3g} above {parity.limit:.3g}"
        except NoBackendError as e:
            found[backend] = str(e)
        except Exception as e:  # of one backend: the other one's times still count
            found[backend] = f"error {type(e).__name__}: {str(e)[-500:]}"
    return found


def row(case: Case, gb_per_s: float, compiled: Callable[..., object] | None) -> dict[str, Any]:
    """One call: microseconds in a graph with a cold cache, with a warm one, and launched from Python."""
    reasons = usable(case)
    report: dict[str, Any] = {
        "op": "id_attention", "case": case.name, "dtype": case.dtype, "merge": case.merge, "batch": case.batch,
        "pass": "fwd", "refused": {b: why for b, why in reasons.items() if why}, "parity": True,
        "floor_us": round(case.bytes / gb_per_s * 1e-3, 2), "mb": round(case.bytes / 1e6, 2),
    }  # fmt: skip
    report["parity"] = not any(why and why.startswith("error") for why in reasons.values())
    running = [backend for backend, why in reasons.items() if why is None]
    if not running:
        return report
    sets = [case.inputs(seed, place().device) for seed in range(graphs.copies_for_cold_cache(case.bytes))]
    groups: dict[str, list[Call]] = {backend: [_ours(given, backend) for given in sets] for backend in running}
    for name in rivals(sets[0], compiled):
        groups[name] = [rivals(given, compiled)[name] for given in sets]
    report["cold"] = graphs.microseconds(groups)
    report["warm"] = graphs.microseconds({name: made[:1] * 20 for name, made in groups.items()})
    report["launched_us"] = graphs.launched_microseconds({name: made[0] for name, made in groups.items()})
    report["ratio"] = {b: _ratios(report["cold"], b, report["floor_us"]) for b in running}
    report["launches"] = {name: _counted(made[0]) for name, made in groups.items()}
    return report


def _counted(call: Call) -> int | str | None:
    """Launches by the profiler, which may not work where everything else does."""
    try:
        return graphs.launches(call)
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"


def _ratios(cold: dict[str, dict[str, float]], backend: str, floor_us: float) -> dict[str, float]:
    ours = cold[backend]["us"]
    found = {name: round(cold[name]["us"] / ours, 2) for name in ("eager", "compiled") if name in cold}
    over = round(ours / cold["text_only_flash"]["us"], 3)
    return {**found, "over_text_only_flash": over, "share_of_copy_bandwidth": round(floor_us / ours, 3)}


def unet(merge: str, batch: int, dtype: str = "bf16") -> dict[str, Any]:
    """All 70 cross-attention layers of SDXL's UNet in one graph: with identity, text only, eager. Milliseconds."""
    layers = []
    for layer, count in shapes.UNET:
        case = layer.with_(dtype=dtype, batch=batch, text_batch=batch, merge=merge, num_zero=8)
        case = case.with_(lq=64) if place().dry else case
        layers += [(case.inputs(seed, place().device), case) for seed in range(count)]
    layers = layers[:2] if place().dry else layers
    reasons = usable(layers[-1][1])
    groups: dict[str, list[Call]] = {
        b: [_ours(given, b) for given, _ in layers] for b, why in reasons.items() if why is None
    }
    groups["text_only_flash"] = [_flash(given) for given, _ in layers]
    groups["eager"] = [lambda g=given: eager_id_attention(**g) for given, _ in layers]
    ms = {name: found["us"] * len(layers) / 1e3 for name, found in graphs.microseconds(groups).items()}
    text = ms.pop("text_only_flash")
    return {
        "merge": merge, "batch": batch, "dtype": dtype, "text_only_ms": round(text, 3),
        "whole_ms": {name: round(x, 3) for name, x in ms.items()},
        "identity_ms": {name: round(x - text, 3) for name, x in ms.items()},
    }  # fmt: skip


def _other_ops(name: str) -> list[dict[str, Any]]:
    """An op forward and backward on Triton against eager, launched from Python, by the CPU benchmark's code."""
    options = shapes.OPTIONS
    if place().dry:
        options = argparse.Namespace(**{**vars(options), "backend": "cpu", "rounds": 2})
    return ops.run(options, (name,))["rows"]


def _decode() -> list[dict[str, Any]]:
    """SDXL's autoencoder at 1024 px, eager and as a graph; nothing where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    vae = importlib.import_module("idcore.bench.vae")
    options = argparse.Namespace(
        size=1024, batches=(1,), dtype=("bf16", "fp16"), device="cuda", rounds=10, warmup=2,
        variants=("diffusers", "ours", "contiguous", "graph"),
    )  # fmt: skip
    return vae.run(options)["rows"]


def _guarded(what: str, make: Callable[[], Any], problems: list[str]) -> Any:
    """What went wrong with one row is reported, and the next one still runs."""
    try:
        return make()
    except Exception as e:
        problems.append(f"{what}: {type(e).__name__}: {str(e)[:500]}")
        print(problems[-1], file=sys.stderr, flush=True)
        return None


class Report:
    """What was timed, what went wrong and what there was no time for; saved after every piece."""

    def __init__(self, save: Save, seconds: float):
        self.save, self.end = save, time.monotonic() + seconds
        self.problems: list[str] = []
        self.found: dict[str, Any] = {"problems": self.problems, "not_run": [], "unet": [], "rows": [], "ops": [],
                                      "decode": []}  # fmt: skip

    def add(self, where: str, what: str, make: Callable[[], Any]) -> None:
        """A row, or a list of rows, to list `where`, if there is time left."""
        if time.monotonic() > self.end:
            self.found["not_run"].append(what)
        else:
            made = _guarded(what, make, self.problems)
            self.found[where] += made if isinstance(made, list) else [made] if made else []
        self.save(self.found)


@torch.no_grad()
def run(save: Save = nothing_saved, seconds: float = 139, cases: Sequence[Case] = shapes.TIMED) -> dict[str, Any]:
    """The whole UNet's layers, all rows, the other ops and the decode, as far as time goes."""
    report = Report(save, seconds)
    report.found["warming_failed"] = calls.warm(("timed", False), ("ops", True), seconds=0.35 * seconds)
    bandwidth = copy_bandwidth(megabytes=8 if place().dry else 1024, device=place().device)
    report.found["copy_gb_per_s"] = round(bandwidth, 1)
    compiled = torch.compile(eager_id_attention, dynamic=False)

    def timed(case: Case) -> dict[str, Any]:
        # Compiling takes half a minute a shape: only where the published comparison is asked for.
        asked = (case.merge, case.dtype, case.batch) == ("ortho_v2", "bf16", 2) and not place().dry
        return row(case, bandwidth, compiled if asked else None)

    for merge, batch in (("ortho_v2", 2), ("add", 1), ("ortho_v2", 1), ("add", 2)):
        report.add("unet", f"unet {merge} B={batch}", lambda m=merge, b=batch: unet(m, b))
    for c in few(cases):
        report.add("rows", f"{c.name} {c.merge} {c.dtype} B={c.batch}", lambda c=c: timed(c))
    for name in tuple(ops.OPS)[: 1 if place().dry else None]:
        report.add("ops", f"op {name}", lambda n=name: _other_ops(n))
    report.add("decode", "decode of latents", (lambda: []) if place().dry else _decode)
    found = report.found
    right = all(r["parity"] for name in ("rows", "ops", "decode") for r in found[name])
    return {"ok": right and not report.problems and not found["not_run"], **found}
