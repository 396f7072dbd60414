"""A diffusers SDXL pipeline as one dictionary in the original layout of single-file checkpoints."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_layout(unet):
    """The UNet's weights under the original keys, without a prefix."""
    layers = unet.config.layers_per_block
    with_attention = [hasattr(b, "attentions") for b in unet.up_blocks]
    return {_unet_key(k, layers, with_attention): v for k, v in unet.state_dict().items()}


def _unet_key(key, layers, with_attention):
    for theirs, original in TOP.items():
        if key.startswith(theirs + "."):
            return original + key[len(theirs) :]
    kind, *rest = key.split(".")
    if kind == "mid_block":
        part, j, *inner = rest
        place = 1 if part == "attentions" else 2 * int(j)
        return f"middle_block.{place}." + _inner(part, inner)
    i, part, j, *inner = rest
    i, j = int(i), int(j)
    if kind == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.op." + inner[-1]
        return f"input_blocks.{(layers + 1) * i + j + 1}.{int(part == 'attentions')}." + _inner(part, inner)
    if part == "upsamplers":
        return f"output_blocks.{(layers + 1) * i + layers}.{1 + with_attention[i]}.conv." + inner[-1]
    return f"output_blocks.{(layers + 1) * i + j}.{int(part == 'attentions')}." + _inner(part, inner)


def _inner(part, inner):
    return ".".join([RESNET[inner[0]], *inner[1:]] if part == "resnets" else inner)


def vae_layout(vae):
    out, blocks = {}, len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        k = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", key)
        k = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", k)
        k = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block.", k)
        k = re.sub(
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample.", k
        )
        k = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", k)
        k = k.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        k = k.replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in k:
            for theirs, original in {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "proj_out",
            }.items():
                k = k.replace(theirs, original)
            if value.dim() == 2:
                value = value[:, :, None, None]
        out["first_stage_model." + k] = value
    return out


def clip_layout(encoder):
    names = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in encoder.state_dict().items()}
    return {f"conditioner.embedders.0.transformer.{k}": v for k, v in names.items()}


def open_clip_layout(encoder):
    prefix = "conditioner.embedders.1.model."
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for i in range(encoder.config.num_hidden_layers):
        layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for theirs, original in inner.items():
                out[f"{block}{original}.{kind}"] = state[f"{layer}{theirs}.{kind}"]
            parts = [state[f"{layer}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return {prefix + k: v for k, v in out.items()}


def sdxl_layout(pipe):
    """Everything of a pipeline in one dictionary."""
    unet = {f"model.diffusion_model.{k}": v for k, v in unet_layout(pipe.unet).items()}
    return unet | vae_layout(pipe.vae) | clip_layout(pipe.text_encoder) | open_clip_layout(pipe.text_encoder_2)
