"""Times the decode of latents by SDXL's autoencoder at full size: diffusers' own against `LatentDecoder`."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling.vae import LatentDecoder
from ..testing.cases import DTYPES
from ..testing.timing import interleaved
from .rows import numbers, some_of
from .unets import sdxl_vae

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOORS = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}
VARIANTS = ("diffusers", "contiguous", "channels_last", "compiled", "graph")


def _eager(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda latents: vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def stock_decode(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """What diffusers' SDXL pipeline does with latents: float16 weights turn to float32 and back around each call."""

    def decode(latents: Tensor) -> Tensor:
        turn = vae.dtype == torch.float16 and vae.config.force_upcast
        if turn:
            vae.to(torch.float32)
        picture = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        if turn:
            vae.to(torch.float16)
        return picture

    return decode


def captured(decoder: LatentDecoder, latents: Tensor) -> Callable[[], Tensor]:
    """The decode as a CUDA graph that reads these latents."""
    plan, side = decoder.plan(latents.shape), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            decoder.decode(latents, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decoder.decode(latents, plan)

    def play() -> Tensor:
        graph.replay()
        return result

    return play


def _calls(vae: nn.Module, latents: Tensor, dtype: str, wanted: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    """A call per variant, each on weights of its own."""

    def ours(**options: Any) -> LatentDecoder:
        return LatentDecoder(copy.deepcopy(vae), NAMES[dtype], **options)

    stock = copy.deepcopy(vae).to(DTYPES[dtype])
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "diffusers": lambda: partial(stock_decode(stock), latents),
        "contiguous": lambda: partial(ours(channels_last=False), latents),
        "channels_last": lambda: partial(ours(), latents),
        "compiled": lambda: partial(ours(compile=True), latents),
        "graph": lambda: captured(ours(compile="compiled" in wanted), latents),
    }
    return {name: makers[name]() for name in wanted}


def _row(options: argparse.Namespace, vae: nn.Module, truth: Tensor, latents: Tensor, dtype: str) -> dict[str, Any]:
    wanted = tuple(v for v in options.variants if v != "graph" or options.device == "cuda")
    calls = _calls(vae, latents.to(DTYPES[dtype]), dtype, wanted)

    def error(picture: Tensor) -> float:
        return float((picture.float() - truth).abs().max() / truth.abs().max())

    errors = {name: error(call()) for name, call in calls.items()}
    errors["eager"] = error(_eager(copy.deepcopy(vae).to(DTYPES[dtype]))(latents.to(DTYPES[dtype])))
    bound = 2 * errors["eager"] + FLOORS[dtype]
    row: dict[str, Any] = {
        "size": options.size, "batch": len(latents), "dtype": dtype, "threads": torch.get_num_threads(),
        "errors": {name: float(f"{e:.3g}") for name, e in errors.items()}, "rounds": options.rounds,
        "parity": all(e <= bound for e in errors.values()),
    }  # fmt: skip
    if row["parity"]:
        times = interleaved(calls, rounds=options.rounds, warmup=options.warmup, device=options.device)
        row["ms"] = {name: round(t.ms, 2) for name, t in times.items()}
        stock = times.pop("diffusers").ms
        row["diffusers_over"] = {name: round(stock / t.ms, 2) for name, t in times.items()}
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row per batch size and dtype. Errors are those to the decode in float32, relative to its largest value, and may
    be twice those of the plain decode in the same dtype ("eager": diffusers' own turns float16 to float32)."""
    vae = sdxl_vae(torch.float32, options.device)
    rows = []
    for batch in options.batches:
        g = torch.Generator().manual_seed(0)
        side = options.size // 8
        latents = torch.randn(batch, 4, side, side, generator=g).to(options.device) * vae.config.scaling_factor
        truth = stock_decode(vae)(latents)
        rows += [_row(options, vae, truth, latents, dtype) for dtype in options.dtype]
    return {"rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench vae`."""
    parser.add_argument("--size", type=int, default=1024, help="pixels, a multiple of 8")
    parser.add_argument("--batches", type=numbers, default=(1,), help="pictures in a call: a row each")
    dtypes = tuple(DTYPES)
    parser.add_argument("--dtype", type=some_of(dtypes), default=("fp32", "bf16"), help=f"some of {', '.join(dtypes)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--variants", type=some_of(VARIANTS), default=VARIANTS, help=f"some of {', '.join(VARIANTS)}; graph: on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved decodes of each variant")
    parser.add_argument("--warmup", type=int, default=1)
