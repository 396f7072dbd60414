"""Names of LoRA layers: kohya's underscores and SDXL's original block names to the module paths of diffusers, and back.

kohya writes a module's path with underscores. For SD 1.5 and 2.1 it is the path in diffusers' UNet, for SDXL the one in
the original UNet (`input_blocks.4.1...`). Both forms are read for any model.
"""

from __future__ import annotations

import re

from .errors import WeightsError

KOHYA = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
PER_BLOCK = 2  # resnets in a down block of Stable Diffusion, all versions; up blocks have one more
# Words of module names that hold underscores themselves.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "input_blocks", "output_blocks", "middle_block",
    "time_emb_proj", "time_embedding", "add_embedding", "time_embed", "label_emb", "conv_shortcut", "conv_in",
    "conv_out", "conv_norm_out", "linear_1", "linear_2", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out",
    "in_layers", "out_layers", "emb_layers", "skip_connection", "text_model", "text_projection", "self_attn",
    "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2",
)  # fmt: skip
_TOKEN = re.compile("|".join([*(rf"{w}(?=_|$)" for w in sorted(_WORDS, key=len, reverse=True)), "[^_]+"]))
# Modules beside the blocks: original, diffusers.
_BESIDE = {
    "input_blocks.0.0": "conv_in", "out.2": "conv_out", "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_RESNET = {
    "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip


def from_kohya(name: str) -> tuple[str, str]:
    """ "lora_unet_..._to_q" to (component, module path of diffusers).

    Raises WeightsError for a name of another network or with parts that no Stable Diffusion has.
    """
    head = next((h for h in sorted(KOHYA, key=len, reverse=True) if name.startswith(f"{h}_")), None)
    if head is None:
        raise WeightsError(
            f"LoRA layer {name!r} is of no UNet or CLIP text encoder ({', '.join(KOHYA)}); FLUX, SD 3 and other "
            "models are not read here"
        )
    path = ".".join(_TOKEN.findall(name.removeprefix(f"{head}_")))
    return KOHYA[head], path if KOHYA[head] != "unet" else to_diffusers(path)


def to_kohya(component: str, path: str, *, sdxl: bool) -> str:
    """(component, module path of diffusers) to kohya's name."""
    if component == "unet":
        return f"lora_unet_{(to_original(path) if sdxl else path).replace('.', '_')}"
    heads = {"text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    return f"{heads[component]}_{path.replace('.', '_')}"


def to_diffusers(path: str) -> str:
    """A module of the original UNet in diffusers' words; paths of diffusers come back as they are."""
    if path in _BESIDE:
        return _BESIDE[path]
    if not path.startswith(("input_blocks.", "middle_block.", "output_blocks.")):
        return path
    side, *rest = path.split(".")
    i, j = int(rest[0]), int(rest[1]) if side != "middle_block" else 0
    tail = ".".join(rest[1 if side == "middle_block" else 2 :])
    if side == "middle_block":
        where, tail = ("mid_block.attentions.0", tail) if i == 1 else (f"mid_block.resnets.{i // 2}", _resnet(tail))
        return f"{where}.{tail}"
    per = PER_BLOCK + 1
    block, layer = (divmod(i - 1, per)) if side == "input_blocks" else divmod(i, per)
    base = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
    if tail == "op":
        return f"{base}.downsamplers.0.conv"
    if tail == "conv":
        return f"{base}.upsamplers.0.conv"
    if j == 1:
        return f"{base}.attentions.{layer}.{tail}"
    return f"{base}.resnets.{layer}.{_resnet(tail)}"


def _resnet(tail: str) -> str:
    if tail not in _RESNET:
        raise WeightsError(f"LoRA: {tail!r} is no layer of a residual block; wanted one of {', '.join(_RESNET)}")
    return _RESNET[tail]


def to_original(path: str) -> str:
    """A module of diffusers' UNet in the words of the original one (SDXL's, where up blocks with a resampler have
    attention).

    Raises WeightsError for a path that is none of a Stable Diffusion UNet.
    """
    beside = {v: k for k, v in _BESIDE.items()}
    if path in beside:
        return beside[path]
    resnet = {v: k for k, v in _RESNET.items()}
    if m := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d)\.(.+)", path):
        kind, n, tail = m.groups()
        return f"middle_block.1.{tail}" if kind == "attentions" else f"middle_block.{2 * int(n)}.{resnet[tail]}"
    m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)\.(\d)\.(.+)", path)
    if not m or (m[3] == "resnets" and m[5] not in resnet):
        raise WeightsError(
            f"LoRA: {path!r} has no name in the original UNet; wanted a layer of a Stable Diffusion UNet"
        )
    side, block, kind, layer, tail = m[1], int(m[2]), m[3], int(m[4]), m[5]
    first = block * (PER_BLOCK + 1) + (side == "down")
    base = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{base}.{first + PER_BLOCK}.0.op"
    if kind == "upsamplers":
        return f"{base}.{first + PER_BLOCK}.2.conv"
    return f"{base}.{first + layer}.{'1.' + tail if kind == 'attentions' else '0.' + resnet[tail]}"
