"""Nodes for what adapters bring besides: IP-Adapter-FaceID's LoRA, text and picture of InstantID's ControlNet."""

from __future__ import annotations

from typing import Any

import comfy.sd
import numpy as np
import torch
from comfy_api.latest import io

from idcore.attention.original_unet import attention_paths, original_sites
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.identity_net import keypoint_picture
from idcore.systems.lora import kohya_state

from .common import CATEGORY, Person, System, photos_of


class ApplyLora(io.ComfyNode):
    """The LoRA part of an IP-Adapter-FaceID file on a model, once, whatever the number of people."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="IdcoreApplyLora",
            display_name="Apply FaceID LoRA",
            category=CATEGORY,
            description="IP-Adapter-FaceID was trained together with this LoRA. Apply it once, before the identities.",
            inputs=[
                io.Model.Input("model"),
                System.Input("system"),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.05),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, system: Any, strength: float) -> Any:
        tensors = getattr(system, "lora_tensors", None)
        if not tensors:
            raise InputError(
                f"{system.name}: these weights have no LoRA part; it belongs to IP-Adapter-FaceID (not its portrait "
                "files). Take this node out"
            )
        unet = model.model.diffusion_model
        widths = [w for site in original_sites(unet).values() for w in (site.hidden, site.hidden)]
        state = kohya_state(tensors, attention_paths(unet), widths)
        return io.NodeOutput(comfy.sd.load_lora_for_models(model, None, state, strength, 0.0)[0])


class IdentityToControlNet(io.ComfyNode):
    """Lets InstantID's ControlNet read the identity in place of the text."""

    @classmethod
    def define_schema(cls) -> Any:
        both = [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]
        return io.Schema(
            node_id="IdcoreIdentityToControlNet",
            display_name="Identity to ControlNet",
            category=CATEGORY,
            description="InstantID's IdentityNet reads the identity. Put both conditionings through this node, then "
            "through ComfyUI's Apply ControlNet with IdentityNet and the keypoints. Every ControlNet on them reads it.",
            inputs=[*both, Person.Input("identity")],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, identity: Identity) -> Any:
        identity.require_system("instantid")
        if len(identity) != 1:
            raise InputError(f"IdentityNet reads one person, this identity has {len(identity)} rows; give one of them")
        silent = torch.zeros_like(identity.tokens) if identity.uncond_tokens is None else identity.uncond_tokens
        return io.NodeOutput(_read_by_controlnets(positive, identity.tokens), _read_by_controlnets(negative, silent))


class Keypoints(io.ComfyNode):
    """The picture that IdentityNet reads, of the face in a photo."""

    @classmethod
    def define_schema(cls) -> Any:
        side = {"min": 64, "max": 16384, "step": 8}
        return io.Schema(
            node_id="IdcoreKeypoints",
            display_name="Face keypoints",
            category=CATEGORY,
            description="Five points of the face in a photo, fitted into the size of the picture that is to be made.",
            inputs=[
                System.Input("system", tooltip="loaded for photos: its face models find the points"),
                io.Image.Input("image"),
                io.Int.Input("width", default=1024, **side),
                io.Int.Input("height", default=1024, **side),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, system: Any, image: Any, width: int, height: int) -> Any:
        chain = getattr(system, "preprocess", None)
        if not hasattr(chain, "points"):
            raise InputError(
                f'{system.name}: no face models are loaded; switch "for_photos" on in "Load identity system", with an '
                "InstantID or FaceID file"
            )
        pictures = []
        for photo in photos_of(image):
            size, wanted = np.array(photo.shape[1::-1]), np.array((width, height))
            scale = (wanted / size).min()  # one for both sides: faces keep their shape
            points = chain.points(photo) * scale + (wanted - size * scale) / 2
            pictures.append(np.asarray(keypoint_picture(points, width, height)))
        return io.NodeOutput(torch.from_numpy(np.stack(pictures)).float() / 255)


def _read_by_controlnets(conditioning: Any, tokens: Any) -> list[Any]:
    """Conditionings whose ControlNets read these tokens: ComfyUI's own key for another text than the model's."""
    return [[text, {**more, "cross_attn_controlnet": tokens}] for text, more in conditioning]
