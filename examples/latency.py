"""How long a picture takes: cold and warm, percentiles, and where the time goes.

    python examples/latency.py --base SDXL_FOLDER --weights pulid_v1.safetensors --id me.safetensors --runner graph

Prints one JSON object. Without arguments it times a tiny random SDXL pipeline on the CPU, which shows the overhead of
Python and of the libraries, not the speed of a model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

import idcore


def clock(device: torch.device) -> float:
    """Seconds, after all work that was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Parts:
    """Time spent in the text encoders, the UNet's loop and the autoencoder of an `IDPipeline`."""

    def __init__(self, pipe: idcore.IDPipeline) -> None:
        self.seconds: dict[str, float] = {}
        self.pipe = pipe
        pipe.pipe.encode_prompt = self._timed("encode", pipe.pipe.encode_prompt)
        pipe._run = self._timed("sample", pipe._run)
        pipe.decoder._decode = self._timed("decode", pipe.decoder._decode)

    def _timed(self, name: str, fn: Callable) -> Callable:
        def run(*args, **kwargs):
            start = clock(self.pipe.device)
            result = fn(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self.pipe.device) - start
            return result

        return run


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 90th percentile, least."""
    ordered = sorted(seconds)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {"p50": 1e3 * statistics.median(ordered), "p90": 1e3 * p90, "least": 1e3 * ordered[0]}


def load(args: argparse.Namespace):
    if args.base is None:
        from idcore.testing.tiny_models import TinySystem, tiny_pipeline

        stock = tiny_pipeline("sdxl")
        system = TinySystem(stock.unet)
        return idcore.IDPipeline(stock, system, sampler=args.sampler), system.identity(), {"height": 16, "width": 16}
    system = idcore.PuLID.from_weights(args.weights)
    pipe = idcore.IDPipeline.from_pretrained(
        args.base, system, dtype=getattr(torch, args.dtype), device=args.device, sampler=args.sampler,
        runner=args.runner, compile=args.compile, vae_dtype=args.vae_dtype, unet_weights=args.unet,
    )  # fmt: skip
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe, idcore.Identity.load(args.id), {"height": args.size, "width": args.size}


def measure(pipe: idcore.IDPipeline, me, size: dict[str, int], args: argparse.Namespace) -> dict:
    parts = Parts(pipe)

    def once(seed: int) -> float:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(args.batch)]
        start = clock(pipe.device)
        pipe(args.prompt, id_embeds=me, num_images_per_prompt=args.batch, generator=generators, output_type="pt",
             num_inference_steps=args.steps, guidance_scale=args.guidance, **size)  # fmt: skip
        return clock(pipe.device) - start

    cold = once(0)
    once(1)
    parts.seconds.clear()
    warm = [once(2 + i) for i in range(args.repeat)]
    split = {name: 1e3 * s / args.repeat for name, s in parts.seconds.items()}
    best = summary(warm)
    return {"cold_ms": 1e3 * cold, "warm_ms": best, "parts_ms": split, "pictures_per_s": 1e3 * args.batch / best["p50"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder with SDXL in diffusers' layout")
    parser.add_argument("--unet", help="one file with a few-step UNet, e.g. sdxl_lightning_4step_unet.safetensors")
    parser.add_argument("--weights", help="pulid_v1.safetensors")
    parser.add_argument("--id", help="an identity, made once by `idcore encode`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--vae-dtype", default="bfloat16")
    parser.add_argument("--sampler", default="lightning")
    parser.add_argument("--runner", default="eager", choices=("eager", "graph"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--prompt", default="portrait, color, cinematic")
    args = parser.parse_args()
    if args.base is not None and None in (args.weights, args.id):
        parser.error("--base needs --weights and --id")
    start = time.perf_counter()
    pipe, me, size = load(args)
    device = pipe.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    report = {
        "machine": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in vars(args).items() if v is not None},
        "load_s": time.perf_counter() - start,
        **measure(pipe, me, size, args),
    }
    if device.type == "cuda":
        report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
