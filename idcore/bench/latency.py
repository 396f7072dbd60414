"""Times whole pictures: a photo to an identity, then prompts to pictures, by part and by batch size."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import InputError, MissingDependencyError
from ..sampling.vae import DTYPES as VAE_DTYPES
from ..testing.cases import DTYPES
from ..testing.timing import percentile
from .arguments import count, numbers

BASES = ("tiny", "sdxl-random")
PROMPT = "photo, green background"


class Stopwatch:
    """Adds up the seconds spent in some modules and calls since the last `reset`."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        """Seconds; on a GPU once its work is done."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        """Start from zero."""
        self.seconds = {}

    def watch(self, part: str, *modules: nn.Module | None) -> None:
        """Count forwards of these modules (None: no such module) as `part`."""
        for module in modules:
            if module is not None:
                module.register_forward_pre_hook(lambda *_, p=part: self._add(p, -self.now()))
                module.register_forward_hook(lambda *_, p=part: self._add(p, self.now()))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted as `part`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = call(*args, **kwargs)
            self._add(part, self.now() - start)
            return result

        return wrapped

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


class Engine(Protocol):
    """What is timed."""

    def enrol(self) -> dict[str, float] | None:
        """Seconds of the parts from a photo to identity tokens; None where the base has no face encoder."""

    def draw(self, batch: int) -> None:
        """`batch` pictures of the identity."""


class TinyEngine:
    """The embedded model: real photo, real encoders, 64 px pictures."""

    def __init__(self, options: argparse.Namespace, watch: Stopwatch) -> None:
        from ..demo import PHOTO
        from ..encoders.analyzer import default_analyzer
        from ..encoders.images import load_image
        from ..sampling.tiny_pipeline import TinyPipeline

        self._watch, self._steps = watch, options.steps
        self._photo, self._analyzer = load_image(PHOTO), default_analyzer()
        self.pipe = TinyPipeline.from_package()
        watch.watch("encode", self.pipe.model.text)
        watch.watch("sample", self.pipe.unet)
        self._identity = self.pipe.encode(self._photo, self._analyzer) if options.identity else None

    def enrol(self) -> dict[str, float]:
        a, photo, clock = self._analyzer, self._photo, self._watch.now
        start = clock()
        face = a.choose(a.detect(photo))
        found = clock()
        a.embed(photo, face)
        embedded = clock()
        self.pipe.encode(photo, a)
        return {"detect_s": found - start, "embed_s": embedded - found, "photo_to_tokens_s": clock() - embedded}

    def draw(self, batch: int) -> None:
        self.pipe(PROMPT, self._identity, num_images_per_prompt=batch, num_inference_steps=self._steps)


class RandomSDXLEngine:
    """SDXL at full size with random weights: the UNet, both text encoders and the autoencoder."""

    def __init__(self, options: argparse.Namespace, watch: Stopwatch) -> None:
        from ..identity import Identity
        from ..sampling.id_pipeline import IDPipeline
        from .e2e import WIDTH, RandomSystem
        from .unets import sdxl_pipeline

        self._size, self._steps = options.size, options.steps
        pipe = sdxl_pipeline(DTYPES[options.dtype], options.device)
        system = RandomSystem(pipe.unet, options.device)
        self.pipe = IDPipeline(
            pipe, system, runner=options.runner, vae_dtype=options.vae_dtype, vae_compile=options.vae_compile,
            decode_in_graph=options.decode_in_graph,
        )  # fmt: skip
        g = torch.Generator().manual_seed(2)
        tokens = torch.randn(1, options.tokens, WIDTH, generator=g).to(options.device)
        self._identity = Identity(tokens, None, system.name) if options.identity else None
        watch.watch("encode", pipe.text_encoder, pipe.text_encoder_2)
        # Nothing may wait for the GPU while a graph is recorded, so what is in it is timed as a whole.
        if options.runner == "graph":
            self.pipe._run = watch.timed("sample", self.pipe._run)
        else:
            watch.watch("sample", pipe.unet)
        if not options.decode_in_graph:
            self.pipe.decoder.decode = watch.timed("decode", self.pipe.decoder.decode)

    def enrol(self) -> None:
        """PuLID's encoders need published weights; nothing is timed without them."""

    def draw(self, batch: int) -> None:
        self.pipe(
            PROMPT, id_embeds=self._identity, num_images_per_prompt=batch, num_inference_steps=self._steps,
            height=self._size, width=self._size, output_type="pil",
        )  # fmt: skip


def _row(engine: Engine, watch: Stopwatch, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    samples: list[dict[str, float]] = []
    for turn in range(1 + options.rounds):
        watch.reset()
        start = watch.now()
        engine.draw(batch)
        samples.append({**watch.seconds, "total": watch.now() - start})
        print(f"batch {batch} turn {turn}: {samples[-1]['total']:.4f} s", file=sys.stderr, flush=True)
    cold, warm = samples[0]["total"], samples[1:]
    totals = [s["total"] for s in warm]
    parts = {p: statistics.median([s.get(p, 0.0) for s in warm]) for p in ("encode", "sample", "decode")}
    p50 = statistics.median(totals)
    return {
        "base": options.base, "batch": batch, "steps": options.steps, "size": options.size, "dtype": options.dtype,
        "identity": options.identity, "cold_s": round(cold, 5), "p50_s": round(p50, 5),
        "p90_s": round(percentile(totals, 0.9), 5), "images_per_s": round(batch / p50, 3),
        **{f"{p}_s": round(s, 5) for p, s in parts.items()},
        "other_s": round(p50 - sum(parts.values()), 5), "rounds": options.rounds,
    }  # fmt: skip


def _enrolment(engine: Engine, rounds: int) -> dict[str, float] | None:
    runs = [engine.enrol() for _ in range(1 + rounds)]
    if runs[0] is None:
        return None
    return {k: round(statistics.median([r[k] for r in runs[1:]]), 5) for k in runs[0]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One row per batch size. cold_s: the first call of that batch size; p50_s and p90_s: the calls after it.

    encode_s is the text encoders' time, sample_s the UNet's (with a graph, the loop's and what else is recorded),
    decode_s the autoencoder's (the tiny base draws pixels and has none), other_s what is left: schedulers, pictures as
    files hold them, Python.
    """
    if options.base == "tiny":
        if options.device != "cpu":
            raise InputError("bench latency: the tiny base runs on the CPU; take --base sdxl-random on a GPU")
        options.size, options.dtype = 64, "fp32"
    watch = Stopwatch(options.device)
    start = watch.now()
    engine = (TinyEngine if options.base == "tiny" else RandomSDXLEngine)(options, watch)
    load_s = round(watch.now() - start, 3)
    rows = [_row(engine, watch, options, batch) for batch in options.batches]
    if options.plot:
        plot(rows, options.plot)
    return {"load_s": load_s, "enrolment": _enrolment(engine, options.rounds), "rows": rows}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency by part and pictures per second over the batch size, as a picture file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependencyError("bench latency --plot needs matplotlib: pip install 'idcore[bench]'") from e
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(r["batch"]) for r in rows]
    base = [0.0] * len(rows)
    for part in ("encode_s", "sample_s", "decode_s", "other_s"):
        heights = [1e3 * r[part] for r in rows]
        left.bar(names, heights, bottom=base, label=part.removesuffix("_s"))
        base = [b + h for b, h in zip(base, heights, strict=True)]
    left.set(xlabel="pictures in a call", ylabel="ms, median")
    left.legend()
    right.plot(names, [r["images_per_s"] for r in rows], marker="o")
    right.set(xlabel="pictures in a call", ylabel="pictures a second", ylim=(0, None))
    figure.suptitle(f"{rows[0]['base']}, {rows[0]['steps']} steps, {rows[0]['size']} px, {rows[0]['dtype']}")
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench latency`."""

    parser.add_argument("--base", choices=BASES, default="tiny", help="the embedded model, or SDXL of random weights")
    parser.add_argument("--batches", type=numbers, default=(1, 2, 4, 8), help="pictures in a call: a row each")
    parser.add_argument("--steps", type=count, default=4, help="denoising steps of a picture")
    parser.add_argument("--rounds", type=count, default=10, help="warm calls per row")
    parser.add_argument("--size", type=count, default=1024, help="pixels (sdxl-random)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="weights (sdxl-random)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--runner", choices=("eager", "graph"), default="eager", help="graph: one CUDA graph")
    parser.add_argument("--decode-in-graph", action="store_true", help="the decode too (--runner graph)")
    parser.add_argument(
        "--vae-dtype", choices=("auto", *VAE_DTYPES), default="auto", help="of the decode (sdxl-random)"
    )
    parser.add_argument("--vae-compile", action="store_true", help="torch.compile the decode")
    parser.add_argument("--tokens", type=count, default=32, help="identity tokens (sdxl-random)")
    parser.add_argument("--no-identity", dest="identity", action="store_false", help="text only")
    parser.add_argument("--plot", type=Path, default=None, help="write a picture of the rows here")
