"""Nodes: load a system, encode, load and save identities, apply them to a model (several in a row), take them off."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import folder_paths
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import ComfyExtension, io

from idcore.attention.original_unet import Applied, apply_to, original_sites, without_ours
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.recipes import RECIPES
from idcore.systems.layers import fitting_sites
from idcore.systems.loading import SYSTEMS, load_system
from idcore.workflows import chosen_files

from .adapters import ApplyLora, IdentityToControlNet, Keypoints
from .common import CATEGORY, Person, System, photos_of

FOLDER = "idcore"  # under ComfyUI's models
FILE, NONE = "a file", "none"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def _files(*endings: str) -> list[str]:
    return [f for f in folder_paths.get_filename_list(FOLDER) if f.endswith(endings)]


def _path(name: str | None) -> Path | None:
    if name in (None, NONE):
        return None
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise InputError(f"there is no file {name} in ComfyUI's models/{FOLDER} any more; choose another one")
    return Path(found)


class LoadSystem(io.ComfyNode):
    """An identity system with what it needs to read photos."""

    @classmethod
    def define_schema(cls) -> Any:
        recipes = [r for r in RECIPES if r.startswith(SYSTEMS)]
        optional = {"optional": True, "default": NONE}
        return io.Schema(
            node_id="IdcoreLoadSystem",
            display_name="Load identity system",
            category=CATEGORY,
            description=f"PuLID, IP-Adapter-FaceID or InstantID: a recipe that `idcore fetch` brought, or a file in "
            f"models/{FOLDER}.",
            inputs=[
                io.Combo.Input("source", options=[*recipes, FILE], tooltip='a fetched recipe, or "a file"'),
                io.Combo.Input("weights", options=[NONE, *_files(".safetensors")], **optional),
                io.Combo.Input("vision", options=[NONE, *_files(".safetensors", ".pt")], **optional),
                io.Combo.Input("parsing", options=[NONE, *_files(".safetensors", ".pth")], **optional),
                io.Boolean.Input("for_photos", default=True, tooltip="off: saved identities only, no face models"),
            ],
            outputs=[System.Output(display_name="system")],
        )

    @classmethod
    def execute(
        cls, source: str, for_photos: bool, weights: str = NONE, vision: str = NONE, parsing: str = NONE
    ) -> Any:
        files = {"weights": _path(weights), "vision": _path(vision), "parsing": _path(parsing)}
        name = "auto" if source == FILE else source
        return io.NodeOutput(load_system(**chosen_files(name, files, for_photos=for_photos), for_photos=for_photos))


class EncodeIdentity(io.ComfyNode):
    """Photos of one person to an identity."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="IdcoreEncodeIdentity",
            display_name="Encode identity",
            category=CATEGORY,
            description="A photo, or a batch of photos of the same person.",
            inputs=[System.Input("system"), io.Image.Input("image")],
            outputs=[Person.Output(display_name="identity")],
        )

    @classmethod
    def execute(cls, system: Any, image: Any) -> Any:
        return io.NodeOutput(system.encode(photos_of(image)))


class LoadIdentity(io.ComfyNode):
    """An identity from a file."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="IdcoreLoadIdentity",
            display_name="Load identity",
            category=CATEGORY,
            description=f"A file of `idcore encode` in models/{FOLDER}.",
            inputs=[io.Combo.Input("file", options=_files(".safetensors") or [NONE])],
            outputs=[Person.Output(display_name="identity")],
        )

    @classmethod
    def execute(cls, file: str) -> Any:
        path = _path(file)
        if path is None:
            raise InputError(f"no identity was chosen; put one into ComfyUI's models/{FOLDER} (`idcore encode`)")
        return io.NodeOutput(Identity.load(path))


class SaveIdentity(io.ComfyNode):
    """An identity to a file in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="IdcoreSaveIdentity",
            display_name="Save identity",
            category=CATEGORY,
            description="Into the output folder. It describes a person's face: treat it as personal data.",
            inputs=[Person.Input("identity"), io.String.Input("name", default="me")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity: Identity, name: str) -> Any:
        if not re.fullmatch(r"[\w][\w .-]{0,80}", name):
            raise InputError(f"name must be letters, digits, spaces, dots and dashes, no path; got {name!r:.100}")
        folder = Path(folder_paths.get_output_directory())
        taken = {p.name for p in folder.glob("*.safetensors")}
        number = next(i for i in range(1, len(taken) + 2) if f"{name}_{i:05d}.safetensors" not in taken)
        identity.save(folder / f"{name}_{number:05d}.safetensors")
        return io.NodeOutput()


class ApplyIdentity(io.ComfyNode):
    """An identity on a model; one after the other for several people."""

    @classmethod
    def define_schema(cls) -> Any:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return io.Schema(
            node_id="IdcoreApplyIdentity",
            display_name="Apply identity",
            category=CATEGORY,
            description="For several people in one picture chain this node, each with a mask of its own.",
            inputs=[
                io.Model.Input("model"),
                System.Input("system"),
                Person.Input("identity"),
                io.Float.Input("weight", default=0.8, min=0.0, max=5.0, step=0.05),
                io.Float.Input("start_at", default=0.0, **share, tooltip="share of the noise schedule"),
                io.Float.Input("end_at", default=1.0, **share),
                io.Mask.Input("mask", optional=True, tooltip="where this person acts; stretched over the picture"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        system: Any,
        identity: Identity,
        weight: float,
        start_at: float,
        end_at: float,
        mask: Any = None,
    ) -> Any:
        if not 0 <= start_at < end_at <= 1:
            raise InputError(f"start_at and end_at must be 0 <= start_at < end_at <= 1, got {start_at} and {end_at}")
        sites = original_sites(model.model.diffusion_model)
        if hasattr(system, "kv_weights"):
            layers = [(i, k.shape[0]) for i, (k, _) in system.kv_weights().items()]
            fitting_sites(system.name, layers, list(sites.values()))
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        sigmas = (float("inf") if start_at == 0 else to_sigma(start_at), 0.0 if end_at == 1 else to_sigma(end_at))
        applied = Applied.of(
            system,
            identity,
            list(sites.values()),
            id_scale=weight,
            id_mask=None if mask is None else mask,
            sigmas=sigmas,
        )
        changed = model.clone()
        for place, patch in apply_to(_replaced(changed), sites, applied, host_attention).items():
            changed.set_model_attn2_replace(patch, *place)
        return io.NodeOutput(changed)


class RemoveIdentities(io.ComfyNode):
    """The model as it was, and the identities' keys and values out of memory."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="IdcoreRemoveIdentities",
            display_name="Unload identities",
            category=CATEGORY,
            description="Takes all identities off a model and frees their keys and values.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any) -> Any:
        changed = model.clone()
        replaced = _replaced(changed)
        for patch in replaced.values():
            getattr(patch, "forget", lambda: None)()
        left = without_ours(replaced)
        if len(left) != len(replaced) or any(left[k] is not replaced[k] for k in left):
            options = changed.model_options["transformer_options"]
            kept = {k: v for k, v in options.get("patches_replace", {}).items() if k != "attn2"}
            rest = {k: v for k, v in options.items() if k != "patches_replace"}
            kept = kept | ({"attn2": left} if left else {})
            rest = rest | ({"patches_replace": kept} if kept else {})
            changed.model_options = changed.model_options | {"transformer_options": rest}
        return io.NodeOutput(changed)


def host_attention(q: Any, k: Any, v: Any, options: dict[str, Any], mask: Any = None) -> Any:
    """ComfyUI's own attention, for passes in which no identity acts."""
    return optimized_attention(q, k, v, options["n_heads"], mask=mask, attn_precision=options.get("attn_precision"))


def _replaced(model: Any) -> dict[Any, Any]:
    return model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})


class IdcoreExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files = [LoadSystem, EncodeIdentity, LoadIdentity, SaveIdentity]
        return [*files, ApplyLora, ApplyIdentity, IdentityToControlNet, Keypoints, RemoveIdentities]
