"""Stands for ComfyUI's published interface: what the node pack imports, a model, a UNet that calls patches.

`Host` runs a diffusers UNet whose cross-attentions ask `model_options` as ComfyUI's do, so that the same weights can be
run both ways.
"""

import contextlib
import copy
import sys
import types
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from original_layout import _unet_key

from idcore.attention.sites import find_sites


def place_of(unet, path):
    """("input", 4, 0) of the path of a transformer's attention in a diffusers UNet."""
    with_attention = [hasattr(b, "attentions") for b in unet.up_blocks]
    key = _unet_key(path + ".to_q.weight", unet.config.layers_per_block, with_attention).split(".")
    side = key[0].removesuffix("_block").removesuffix("_blocks")
    block = 0 if side == "middle" else int(key[1])
    return side, block, int(key[key.index("transformer_blocks") + 1])


def original_layout(unet):
    """An object with input_blocks, middle_block and output_blocks, whose transformers have `unet`'s sizes."""
    sides = {"input": {}, "middle": {}, "output": {}}
    for site in find_sites(unet):
        side, block, index = place_of(unet, site.path)
        attn2 = SimpleNamespace(heads=site.heads, dim_head=site.head_dim)
        sides[side].setdefault(block, {})[index] = SimpleNamespace(attn2=attn2)

    def blocks(found):
        made = [[SimpleNamespace()] for _ in range(max(found, default=-1) + 1)]
        for block, transformers in found.items():
            made[block].append(SimpleNamespace(transformer_blocks=[transformers[i] for i in sorted(transformers)]))
        return made

    made = {side: blocks(found) for side, found in sides.items()}
    middle = made["middle"][0] if made["middle"] else []
    return SimpleNamespace(input_blocks=made["input"], middle_block=middle, output_blocks=made["output"])


class Sampling:
    """SDXL's noise levels, in the form of ComfyUI's model_sampling."""

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else 14.6 * (1 - percent) ** 2


class Patcher:
    """ComfyUI's ModelPatcher, as far as packs see it."""

    def __init__(self, layout):
        self.model = SimpleNamespace(diffusion_model=layout)
        self.model_options = {"transformer_options": {}}
        self.loras = []  # (tensors under kohya's names, strength)

    def clone(self):
        other = Patcher(self.model.diffusion_model)
        other.loras = list(self.loras)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def get_model_object(self, name):
        assert name == "model_sampling"
        return Sampling()

    def set_model_attn2_replace(self, patch, block_name, number, transformer_index=None):
        key = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault("attn2", {})[key] = patch


class Host:
    """Runs a diffusers UNet; its cross-attentions look replacements up by place, as ComfyUI's transformers do."""

    def __init__(self, unet):
        self.unet, self.patcher = unet, Patcher(original_layout(unet))

    def run(self, patcher, inputs, parts, sigma=1.0):
        """parts: 0 cond, 1 uncond, for the parts of the batch in order."""
        options = dict(patcher.model_options["transformer_options"])
        replaced = options.pop("patches_replace", {}).get("attn2", {})
        options |= {"cond_or_uncond": list(parts), "sigmas": torch.tensor([sigma] * len(inputs["sample"]))}
        options["original_shape"] = list(inputs["sample"].shape)
        before = self.unet.attn_processors
        processors = dict(before)
        for site in find_sites(self.unet):
            processors[site.name] = _HostAttention(place_of(self.unet, site.path), replaced, options)
        self.unet.set_attn_processor(processors)
        try:
            with torch.inference_mode(), _with_loras(self.unet, patcher.loras):
                return self.unet(**inputs).sample.clone()
        finally:
            self.unet.set_attn_processor(dict(before))


def load_lora_for_models(model, clip, lora, strength_model, strength_clip):
    """ComfyUI's: keys of the original layout under kohya's names, what it does not know is left out with a warning."""
    model = model.clone()
    model.loras.append((lora, strength_model))
    return model, clip


@contextlib.contextmanager
def _with_loras(unet, loras):
    """Weights with the LoRAs in them; names are read by the places of the host's own layers."""
    paths = {}
    for name in unet.attn_processors:
        path = name.removesuffix(".processor")
        side, block, index = place_of(unet, path.replace("attn1", "attn2"))
        head = "middle_block.1" if side == "middle" else f"{side}_blocks.{block}.1"
        original = f"{head}.transformer_blocks.{index}.{path[-5:]}"
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            paths[f"lora_unet_{original}.{part}".replace(".", "_")] = f"{path}.{part}"
    changed = []
    for lora, strength in loras:
        for key in [k for k in lora if k.endswith(".lora_up.weight")]:
            weight = unet.get_submodule(paths[key.split(".")[0]]).weight
            changed.append((weight, weight.data.clone()))
            weight.data += strength * lora[key] @ lora[key.replace("lora_up", "lora_down")]
    try:
        yield
    finally:
        for weight, before in reversed(changed):
            weight.data.copy_(before)


class _HostAttention:
    def __init__(self, place, replaced, options):
        self.place, self.options = place, options
        self.patch = replaced.get(place, replaced.get(place[:2]))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if self.patch is None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        options = self.options | {"block": self.place[:2], "block_index": self.place[2], "n_heads": attn.heads}
        options["dim_head"] = q.shape[-1] // attn.heads
        return attn.to_out[1](attn.to_out[0](self.patch(q, k, v, options)))


def optimized_attention(q, k, v, heads, mask=None, attn_precision=None):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# -- modules that the pack imports ------------------------------------------------------------------------------------


class _Slot:
    def __init__(self, id=None, **settings):
        self.id, self.settings = id, settings


def _io_type(io_type):
    kinds = {n: type(n, (_Slot,), {"io_type": io_type}) for n in ("Input", "Output")}
    return type(io_type, (), kinds | {"io_type": io_type})


class Schema:
    def __init__(self, node_id, display_name=None, category="sd", inputs=(), outputs=(), description="", **flags):
        assert set(flags) <= {"hidden", "is_output_node", "is_deprecated", "is_experimental", "not_idempotent"}, flags
        self.node_id, self.inputs, self.outputs = node_id, list(inputs), list(outputs)
        names = [i.id for i in self.inputs]
        assert len(set(names)) == len(names) and node_id and description


class NodeOutput:
    def __init__(self, *result, ui=None):
        self.result = result


class ComfyExtension:
    async def get_node_list(self):
        raise NotImplementedError


def install(monkeypatch, folder):
    """Put the stubs where `import` finds them; model and output files are in `folder`."""
    names = {"Model": "MODEL", "Image": "IMAGE", "Mask": "MASK", "Float": "FLOAT", "Boolean": "BOOLEAN"}
    names |= {"String": "STRING", "Combo": "COMBO", "Int": "INT", "Conditioning": "CONDITIONING"}
    io = SimpleNamespace(
        Schema=Schema, NodeOutput=NodeOutput, ComfyNode=type("ComfyNode", (), {}), Custom=_io_type,
        **{name: _io_type(kind) for name, kind in names.items()},
    )  # fmt: skip
    folders = {}
    paths = types.ModuleType("folder_paths")
    paths.models_dir = str(folder / "models")
    paths.add_model_folder_path = lambda name, path: folders.__setitem__(name, path)
    paths.get_filename_list = lambda name: sorted(p.name for p in (folder / "models" / name).glob("*"))
    paths.get_full_path = lambda name, file: (
        str(folder / "models" / name / file) if (folder / "models" / name / file).is_file() else None
    )
    paths.get_output_directory = lambda: str(folder / "output")
    for name in ("comfy", "comfy.sd", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention", "comfy_api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["comfy"].sd = sys.modules["comfy.sd"]
    sys.modules["comfy.sd"].load_lora_for_models = load_lora_for_models
    sys.modules["comfy.ldm.modules.attention"].optimized_attention = optimized_attention
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, ComfyExtension
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    return folders
