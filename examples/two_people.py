"""Two people in one picture, each in a region of its own, in one pass.

    python examples/two_people.py --base SDXL_FOLDER --weights pulid_v1.safetensors --id a.safetensors b.safetensors

Without arguments it uses a tiny random SDXL pipeline, so that it runs anywhere (its pictures are noise).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import idcore


def halves(height: int, width: int) -> list[torch.Tensor]:
    """Masks [height, width] of the left and the right half, with a gap in the middle that belongs to nobody."""
    left = torch.zeros(height, width)
    left[:, : int(0.48 * width)] = 1
    return [left, left.flip(1)]


def load(args: argparse.Namespace):
    if args.base is None:
        from idcore.testing.tiny_models import TinySystem, tiny_pipeline

        stock = tiny_pipeline("sdxl")
        system = TinySystem(stock.unet)
        return idcore.IDPipeline(stock, system), [system.identity(0), system.identity(1)]
    system = idcore.PuLID.from_weights(args.weights)
    pipe = idcore.IDPipeline.from_pretrained(args.base, system, dtype=torch.float16, device=args.device)
    return pipe, [idcore.Identity.load(path) for path in args.id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder with SDXL or SDXL-Lightning in diffusers' layout")
    parser.add_argument("--weights", help="pulid_v1.safetensors")
    parser.add_argument("--id", nargs=2, help="two identities, left and right")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="a woman and a man side by side in a garden, soft light")
    parser.add_argument("--out", type=Path, default=Path("two_people.png"))
    args = parser.parse_args()
    if args.base is not None and None in (args.weights, args.id):
        parser.error("--base needs --weights and --id")
    pipe, people = load(args)
    height, width = (16, 16) if args.base is None else (1024, 1024)

    def draw(**how):
        generator = torch.Generator().manual_seed(0)
        return pipe(args.prompt, height=height, width=width, generator=generator, **how).images[0]

    together = draw(id_embeds=people, id_masks=halves(height, width), id_scale=[0.8, 0.8])
    together.save(args.out)
    alone = draw(id_embeds=people[0], id_masks=halves(height, width)[0], id_scale=0.8)
    print(f"{args.out}; changed by the second person: {together != alone}")


if __name__ == "__main__":
    main()
