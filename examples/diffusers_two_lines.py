"""An identity on diffusers' own pipeline: two lines more than without.

    python examples/diffusers_two_lines.py --base SDXL_FOLDER --weights pulid_v1.safetensors --id me.safetensors

Without arguments it uses a tiny random SDXL pipeline, so that it runs anywhere (its pictures are noise).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import idcore


def load(args: argparse.Namespace):
    if args.base is None:
        from idcore.testing.tiny_models import TinySystem, tiny_pipeline

        pipe = tiny_pipeline("sdxl")
        system = TinySystem(pipe.unet)
        return pipe, system, system.identity()
    from diffusers import StableDiffusionXLPipeline

    from idcore.sampling.sdxl import few_step_scheduler

    pipe = StableDiffusionXLPipeline.from_pretrained(args.base, torch_dtype=torch.float16, local_files_only=True)
    pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    return pipe.to(args.device), idcore.PuLID.from_weights(args.weights), idcore.Identity.load(args.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder with SDXL or SDXL-Lightning in diffusers' layout")
    parser.add_argument("--weights", help="pulid_v1.safetensors")
    parser.add_argument("--id", help="an identity, made once by `idcore encode`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="portrait, oil on canvas")
    parser.add_argument("--out", type=Path, default=Path("two_lines.png"))
    args = parser.parse_args()
    if args.base is not None and None in (args.weights, args.id):
        parser.error("--base needs --weights and --id")
    pipe, system, me = load(args)
    size = {"height": 16, "width": 16} if args.base is None else {}

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(args.prompt, num_inference_steps=4, guidance_scale=1.2, generator=generator, **size).images[0]

    before = draw()
    with idcore.attach(pipe, system, me, id_scale=0.8):
        picture = draw()
    after = draw()
    picture.save(args.out)
    print(f"{args.out}; changed while attached: {picture != before}  as before afterwards: {after == before}")


if __name__ == "__main__":
    main()
