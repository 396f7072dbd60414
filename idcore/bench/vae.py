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
from .arguments import count, numbers, some_of
from .unets import sdxl_vae

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOORS = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}
PARITY_SIZE = 64  # pixels
VARIANTS = ("diffusers", "ours", "contiguous", "channels_last", "compiled", "graph")


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
        "channels_last": lambda: partial(ours(channels_last=True), latents),
        "ours": lambda: partial(ours(), latents),
        "compiled": lambda: partial(ours(compile=True), latents),
        "graph": lambda: captured(ours(compile="compiled" in wanted), latents),
    }
    return {name: makers[name]() for name in wanted}


def _errors(vae: nn.Module, dtype: str, wanted: tuple[str, ...], device: str) -> dict[str, float]:
    """Each variant's largest error on a small picture against float64 on the same rounded weights and latents, relative
    to the largest value. "eager": the plain decode in this dtype (diffusers' own turns float16 to float32)."""
    latents = _latents(vae, 1, PARITY_SIZE, device).to(DTYPES[dtype])
    rounded = copy.deepcopy(vae).to(DTYPES[dtype])
    eager = _plain(rounded, latents)
    truth = _plain(copy.deepcopy(rounded).double(), latents.double())
    pictures = {"eager": eager, **{name: call() for name, call in _calls(vae, latents, dtype, wanted).items()}}
    return {n: float(f"{float((p - truth).abs().max() / truth.abs().max()):.3g}") for n, p in pictures.items()}


def _plain(vae: nn.Module, latents: Tensor) -> Tensor:
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def _latents(vae: nn.Module, batch: int, size: int, device: str) -> Tensor:
    shape = (batch, 4, size // 8, size // 8)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * vae.config.scaling_factor).to(device)


def _row(options: argparse.Namespace, vae: nn.Module, batch: int, dtype: str) -> dict[str, Any]:
    wanted = tuple(v for v in options.variants if v != "graph" or options.device == "cuda")
    errors = _errors(vae, dtype, wanted, options.device)
    row: dict[str, Any] = {
        "size": options.size, "batch": batch, "dtype": dtype, "threads": torch.get_num_threads(),
        "errors": errors, "rounds": options.rounds,
        "parity": all(e <= 2 * errors["eager"] + FLOORS[dtype] for e in errors.values()),
    }  # fmt: skip
    if row["parity"]:
        calls = _calls(vae, _latents(vae, batch, options.size, options.device).to(DTYPES[dtype]), dtype, wanted)
        times = interleaved(calls, rounds=options.rounds, warmup=options.warmup, device=options.device)
        row["ms"] = {name: round(t.ms, 2) for name, t in times.items()}
        stock = times.pop("diffusers").ms
        row["diffusers_over"] = {name: round(stock / t.ms, 2) for name, t in times.items()}
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row per batch size and dtype; no time where a variant is wrong by the parity rule."""
    vae = sdxl_vae(torch.float32, options.device)
    # Each compiled variant decodes one size; a second size must not make it compile for any size.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        return {"rows": [_row(options, vae, batch, dtype) for batch in options.batches for dtype in options.dtype]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench vae`."""
    parser.add_argument("--size", type=count, default=1024, help="pixels, a multiple of 8")
    parser.add_argument("--batches", type=numbers, default=(1,), help="pictures in a call: a row each")
    dtypes = tuple(DTYPES)
    parser.add_argument("--dtype", type=some_of(dtypes), default=("fp32", "bf16"), help=f"some of {', '.join(dtypes)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument(
        "--variants",
        type=some_of(VARIANTS),
        default=("diffusers", "ours", "compiled", "graph"),
        help=f"some of {', '.join(VARIANTS)}; graph: on a GPU",
    )
    parser.add_argument("--rounds", type=count, default=5, help="interleaved decodes of each variant")
    parser.add_argument("--warmup", type=int, default=1, help="untimed turns before")
