"""Plain float64 forms of the face adapters' projectors and random files in their published layouts."""

import torch

from idcore.systems.face_adapter import FaceAdapterConfig
from idcore.systems.face_projectors import ProjectorConfig
from idcore.systems.faceid import FaceID
from idcore.systems.instantid import InstantID

ID, CLIP, INNER, RANK = 12, 20, 128, 3


def layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * w + b


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def perceiver(t, head, latents, context):
    """[M, W] latents and [N, F] context of one sample, the published keys under `head`."""

    def lin(name, x):
        out = x @ t[f"{head}{name}.weight"].T
        return out + t[f"{head}{name}.bias"] if f"{head}{name}.bias" in t else out

    context, depth = lin("proj_in", context), 0
    while f"{head}layers.{depth}.0.to_q.weight" in t:
        p = f"layers.{depth}"
        c = layer_norm(context, t[f"{head}{p}.0.norm1.weight"], t[f"{head}{p}.0.norm1.bias"])
        m = layer_norm(latents, t[f"{head}{p}.0.norm2.weight"], t[f"{head}{p}.0.norm2.bias"])
        q, kv = lin(f"{p}.0.to_q", m), lin(f"{p}.0.to_kv", torch.cat([c, m]))
        k, v = kv[:, : q.shape[1]], kv[:, q.shape[1] :]
        parts = []
        for h in range(0, q.shape[1], 64):
            s = slice(h, h + 64)
            parts.append(torch.softmax(q[:, s] @ k[:, s].T / 8, -1) @ v[:, s])
        latents = latents + lin(f"{p}.0.to_out", torch.cat(parts, 1))
        x = layer_norm(latents, t[f"{head}{p}.1.0.weight"], t[f"{head}{p}.1.0.bias"])
        latents = latents + gelu(x @ t[f"{head}{p}.1.1.weight"].T) @ t[f"{head}{p}.1.3.weight"].T
        depth += 1
    return layer_norm(lin("proj_out", latents), t[f"{head}norm_out.weight"], t[f"{head}norm_out.bias"])


def face_mlp(t, e):
    """Tokens [T, E] of one embedding [D]."""
    x = gelu(e @ t["image_proj.proj.0.weight"].T + t["image_proj.proj.0.bias"])
    x = x @ t["image_proj.proj.2.weight"].T + t["image_proj.proj.2.bias"]
    return layer_norm(x.view(-1, t["image_proj.norm.weight"].shape[0]), t["image_proj.norm.weight"],
                      t["image_proj.norm.bias"])  # fmt: skip


def tokens(kind, t, embeds, clip=None, shortcut=None):
    """Tokens [B, L, E] of embeds [B, n, D] and clip [B, n, T, W]."""
    t = {k: v.double() for k, v in t.items()}
    rows = []
    for b in range(embeds.shape[0]):
        e = embeds[b].double()
        if kind == "instantid":
            rows.append(perceiver(t, "image_proj.", t["image_proj.latents"][0], e))
            continue
        parts = []
        for j in range(e.shape[0]):
            x = face_mlp(t, e[j])
            if kind == "faceid-plus":
                answer = perceiver(t, "image_proj.perceiver_resampler.", x, clip[b, j].double())
                x = answer if shortcut is None else x + shortcut * answer
            parts.append(x)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def make(kind, unet, variant=None, width=64):
    """A system with random weights for this UNet; embeddings of 12 numbers, image tokens of 20."""
    projector = ProjectorConfig(kind, width, 16 if kind == "instantid" else 4, ID, clip_dim=CLIP, inner=INNER, depth=4)
    config = FaceAdapterConfig.for_unet(unet, projector)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        system = InstantID(config) if kind == "instantid" else FaceID(config, variant or "faceid")
        for p in system.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return system.eval().requires_grad_(False)


def lora_part(unet, width=64):
    """`{index}.to_{q,k,v,out}_lora.{down,up}.weight` of every layer, self-attention included, at rank 3."""
    g, out = torch.Generator().manual_seed(4), {}
    for i, name in enumerate(unet.attn_processors):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        hidden = attn.to_q.weight.shape[0]
        text = width if attn.is_cross_attention else hidden
        for part, size in (("q", hidden), ("k", text), ("v", text), ("out", hidden)):
            out[f"{i}.to_{part}_lora.down.weight"] = torch.randn(RANK, size, generator=g) * 0.2
            out[f"{i}.to_{part}_lora.up.weight"] = torch.randn(hidden, RANK, generator=g) * 0.2
    return out


def published(system, lora=None):
    """The nested dictionary that the publishers pickle."""
    nested = {"image_proj": {}, "ip_adapter": dict(lora or {})}
    for key, t in system.state_dict().items():
        head, _, rest = key.partition(".")
        nested[head][rest] = t
    return nested
