"""Times of `id_attention` on a GPU beside what a user would run instead, and beside what the machine allows."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Collection, Sequence
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
from .steps import PATIENCE, Steps

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
    report["not_captured"] = sorted(groups.keys() - report["cold"].keys())
    running = [backend for backend in running if backend in report["cold"]]
    groups = {name: made for name, made in groups.items() if name in report["cold"]}
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


def _ratios(cold: dict[str, dict[str, float]], backend: str, floor_us: float) -> dict[str, float | None]:
    ours, text = cold[backend]["us"], cold.get("text_only_flash")
    found = {name: round(cold[name]["us"] / ours, 2) for name in ("eager", "compiled") if name in cold}
    over = round(ours / text["us"], 3) if text else None
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
    text = ms.pop("text_only_flash", None)
    return {
        "merge": merge, "batch": batch, "dtype": dtype, "text_only_ms": text and round(text, 3),
        "whole_ms": {name: round(x, 3) for name, x in ms.items()},
        "identity_ms": {name: round(x - text, 3) for name, x in ms.items()} if text else {},
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


class Report:
    """What was timed, what went wrong and what there was no time for; saved before every piece."""

    def __init__(self, save: Save, seconds: float, past: Collection[str] = ()):
        self.end = time.monotonic() + seconds
        self.problems: list[str] = []
        self.found: dict[str, Any] = {"problems": self.problems, "not_run": [], "unet": [], "rows": [], "ops": [],
                                      "decode": []}  # fmt: skip
        self.steps = Steps(save, self.found, past)

    def add(self, where: str, what: str, make: Callable[[], Any], patience: float = PATIENCE) -> None:
        """A row, or a list of rows, to list `where`, if there is time left."""
        if time.monotonic() > self.end:
            self.found["not_run"] += [what] if what not in self.steps.past else []
        elif self.steps.begin(what, patience):
            made = self.steps.guarded(make, lambda said: self._problem(f"{what}: {said}"))
            self.found[where] += made if isinstance(made, list) else [made] if made else []

    def _problem(self, what: str) -> None:
        self.problems.append(what)
        print(what, file=sys.stderr, flush=True)


def _prepare(report: Report, seconds: float) -> float:
    """Fills Triton's cache; bytes a second of a copy, in GB."""
    if report.steps.begin("warming", seconds):
        report.found["warming_failed"] = calls.warm(("timed", False), ("ops", True), seconds=0.35 * seconds)
    bandwidth = copy_bandwidth(megabytes=8 if place().dry else 1024, device=place().device)
    report.found["copy_gb_per_s"] = round(bandwidth, 1)
    return bandwidth


@torch.no_grad()
def run(
    save: Save = nothing_saved, seconds: float = 139, cases: Sequence[Case] = shapes.TIMED, past: Collection[str] = ()
) -> dict[str, Any]:
    """The whole UNet's layers, all rows, the other ops and the decode, as far as time goes."""
    report = Report(save, seconds, past)
    bandwidth = _prepare(report, seconds)
    compiled = torch.compile(eager_id_attention, dynamic=False)
    for merge, batch in (("ortho_v2", 2), ("add", 1), ("ortho_v2", 1), ("add", 2)):
        report.add("unet", f"unet {merge} B={batch}", lambda m=merge, b=batch: unet(m, b))
    for c in few(cases):
        # Compiling takes half a minute a shape: only where the published comparison is asked for.
        asked = (c.merge, c.dtype, c.batch) == ("ortho_v2", "bf16", 2) and not place().dry
        made = functools.partial(row, c, bandwidth, compiled if asked else None)
        report.add("rows", f"{c.name} {c.merge} {c.dtype} B={c.batch}", made, PATIENCE * (3 if asked else 1))
    for name in tuple(ops.OPS)[: 1 if place().dry else None]:
        report.add("ops", f"op {name}", lambda n=name: _other_ops(n), 2 * PATIENCE)
    report.add("decode", "decode of latents", (lambda: []) if place().dry else _decode, 2 * PATIENCE)
    report.steps.end()
    found = report.found
    right = all(r["parity"] for name in ("rows", "ops", "decode") for r in found[name])
    return {"ok": right and not report.problems and not found["not_run"], **found}
