"""An identity beside a ControlNet: the ControlNet gives the pose, the identity the face, from the second step on.

    python examples/controlnet.py --base SDXL_FOLDER --controlnet CONTROLNET_FOLDER --control pose.png \
        --weights pulid_v1.safetensors --id me.safetensors

Without arguments it uses tiny random models, so that it runs anywhere (its pictures are noise).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import torch

import idcore


def tiny():
    """A tiny SDXL pipeline with a ControlNet, random weights."""
    from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

    unet = tiny_unet("sdxl")
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    embedding = type(net.controlnet_cond_embedding)
    net.controlnet_cond_embedding = embedding(unet.config.block_out_channels[0], block_out_channels=(8, 16))
    cls = diffusers.StableDiffusionXLControlNetPipeline
    pipe = tiny_pipeline("sdxl", cls=cls, unet=unet, controlnet=net.requires_grad_(False))
    system = TinySystem(unet)
    return pipe, system, system.identity(), torch.rand(1, 3, 16, 16)


def load(args: argparse.Namespace):
    if args.base is None:
        return tiny()
    from PIL import Image

    from idcore.sampling.sdxl import few_step_scheduler

    net = diffusers.ControlNetModel.from_pretrained(args.controlnet, torch_dtype=torch.float16, local_files_only=True)
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        args.base, controlnet=net, torch_dtype=torch.float16, local_files_only=True
    )
    pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    system = idcore.PuLID.from_weights(args.weights)
    return pipe.to(args.device), system, idcore.Identity.load(args.id), Image.open(args.control).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder with SDXL or SDXL-Lightning in diffusers' layout")
    parser.add_argument("--controlnet", help="folder of an SDXL ControlNet")
    parser.add_argument("--control", help="the ControlNet's picture: a pose, edges, depth")
    parser.add_argument("--weights", help="pulid_v1.safetensors")
    parser.add_argument("--id", help="an identity, made once by `idcore encode`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="portrait, color, cinematic")
    parser.add_argument("--out", type=Path, default=Path("controlnet.png"))
    args = parser.parse_args()
    if args.base is not None and None in (args.controlnet, args.control, args.weights, args.id):
        parser.error("--base needs --controlnet, --control, --weights and --id")
    pipe, system, me, control = load(args)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(args.prompt, image=control, num_inference_steps=4, guidance_scale=1.2, generator=generator).images[
            0
        ]

    before = draw()
    # The layout is settled in the first step: the identity comes in after it and changes the picture less.
    with idcore.attach(pipe, system, me, id_scale=0.8, id_guidance_start=0.25):
        picture = draw()
    picture.save(args.out)
    print(f"{args.out}; changed while attached: {picture != before}")


if __name__ == "__main__":
    main()
