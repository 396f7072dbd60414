"""PuLID's encoders and vision tower written slowly, in float64, with loops: the truth of the tests.

Written from the paper and the published layout, not from the modules under test. Weights are a plain dict of
float64 tensors under the published names.
"""

import math

import torch


def f64(state):
    return {k: v.detach().double() for k, v in state.items()}


def linear(w, name, x):
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(w, name, x, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


def mlp(w, name, x):
    x = leaky(layer_norm(w, f"{name}.1", linear(w, f"{name}.0", x)))
    x = leaky(layer_norm(w, f"{name}.4", linear(w, f"{name}.3", x)))
    return linear(w, f"{name}.6", x)


def softmax_rows(logits):
    out = torch.empty_like(logits)
    for i, row in enumerate(logits):
        e = torch.exp(row - row.max())
        out[i] = e / e.sum()
    return out


def id_encoder_one(w, id_cond, hidden, width):
    """One photo: id_cond [1280], hidden five of [T, C] -> [10, E]."""
    tokens = list(mlp(w, "body", id_cond).reshape(5, width))
    for i, h in enumerate(hidden):
        patches = [mlp(w, f"mapping_patch_{i}", row) for row in h[1:]]
        tokens.append(mlp(w, f"mapping_{i}", h[0]) + sum(patches) / len(patches))
    return torch.stack(tokens)


def id_encoder(w, id_conds, hiddens, width, id_mix=False):
    """Several photos of one person: list of [1280], list of five of [T, C] each."""
    first, *rest = [id_encoder_one(w, c, h, width) for c, h in zip(id_conds, hiddens)]
    return torch.cat([first] + [t if id_mix else t[:5] for t in rest])


def perceiver_attention(w, name, context, latents, heads):
    latents = layer_norm(w, f"{name}.norm2", latents)
    both = torch.cat([layer_norm(w, f"{name}.norm1", context), latents])
    q = linear(w, f"{name}.to_q", latents)
    kv = linear(w, f"{name}.to_kv", both)
    inner = q.shape[1]
    d = inner // heads
    out = torch.empty_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        k, v = kv[:, :inner][:, part], kv[:, inner:][:, part]
        quarter = d**-0.25
        out[:, part] = softmax_rows((q[:, part] * quarter) @ (k * quarter).T) @ v
    return linear(w, f"{name}.to_out", out)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def id_former(w, id_conds, hiddens, heads, layers_per_scale=2):
    """n photos of one person: list of [1280], list of five of [T, C] each -> [queries, E]."""
    width = w["latents"].shape[-1]
    queries = w["latents"][0]
    identity = torch.cat([mlp(w, "id_embedding_mapping", c).reshape(5, width) for c in id_conds])
    latents = torch.cat([queries, identity])
    for i in range(5):
        seen = torch.cat([mlp(w, f"mapping_{i}", h[i]) for h in hiddens])
        context = torch.cat([identity, seen])
        for j in range(layers_per_scale):
            name = f"layers.{i * layers_per_scale + j}"
            latents = latents + perceiver_attention(w, f"{name}.0", context, latents, heads)
            x = layer_norm(w, f"{name}.1.0", latents)
            latents = latents + linear(w, f"{name}.1.3", gelu(linear(w, f"{name}.1.1", x)))
    return latents[: len(queries)] @ w["proj_out"]


def eva_rope(head_dim, grid, rope_grid):
    """cos and sin [grid*grid][head_dim]: first half rows, second half columns, pairs of neighbours."""
    half = head_dim // 2
    cos, sin = torch.zeros(grid * grid, head_dim).double(), torch.zeros(grid * grid, head_dim).double()
    for row in range(grid):
        for column in range(grid):
            for axis, place in enumerate((row, column)):
                for pair in range(half // 2):
                    angle = place / grid * rope_grid / 10000 ** (2 * pair / half)
                    for c in (axis * half + 2 * pair, axis * half + 2 * pair + 1):
                        cos[row * grid + column, c] = math.cos(angle)
                        sin[row * grid + column, c] = math.sin(angle)
    return cos, sin


def eva_rotate(x, cos, sin):
    """x [T, D]; the first row is CLS."""
    out = x.clone()
    for t in range(1, len(x)):
        for c in range(0, x.shape[1], 2):
            a, b = x[t, c], x[t, c + 1]
            out[t, c] = a * cos[t - 1, c] - b * sin[t - 1, c]
            out[t, c + 1] = b * cos[t - 1, c + 1] + a * sin[t - 1, c + 1]
    return out


def eva_attention(w, name, x, heads, cos, sin):
    q = x @ w[f"{name}.q_proj.weight"].T + w[f"{name}.q_bias"]
    k = x @ w[f"{name}.k_proj.weight"].T
    v = x @ w[f"{name}.v_proj.weight"].T + w[f"{name}.v_bias"]
    d = q.shape[1] // heads
    out = torch.empty_like(q)
    for h in range(heads):
        p = slice(h * d, (h + 1) * d)
        logits = eva_rotate(q[:, p], cos, sin) @ eva_rotate(k[:, p], cos, sin).T / math.sqrt(d)
        out[:, p] = softmax_rows(logits) @ v[:, p]
    return linear(w, f"{name}.proj", layer_norm(w, f"{name}.inner_attn_ln", out, 1e-6))


def eva_tower(w, image, config):
    """image [3, S, S] -> (embedding, five taps [T, C])."""
    g, p = config.grid, config.patch_size
    kernel = w["patch_embed.proj.weight"].reshape(config.width, -1)
    rows = [w["cls_token"][0, 0]]
    for y in range(g):
        for x in range(g):
            patch = image[:, y * p : (y + 1) * p, x * p : (x + 1) * p].reshape(-1)
            rows.append(kernel @ patch + w["patch_embed.proj.bias"])
    x = torch.stack(rows) + w["pos_embed"][0]
    cos, sin = eva_rope(config.width // config.heads, g, config.rope_grid)
    taps = []
    for i in range(config.depth):
        if i in config.taps:
            taps.append(x)
        name = f"blocks.{i}"
        x = x + eva_attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x, 1e-6), config.heads, cos, sin)
        y = layer_norm(w, f"{name}.norm2", x, 1e-6)
        gate = linear(w, f"{name}.mlp.w1", y)
        y = gate / (1 + torch.exp(-gate)) * linear(w, f"{name}.mlp.w2", y)
        x = x + linear(w, f"{name}.mlp.w3", layer_norm(w, f"{name}.mlp.ffn_ln", y, 1e-6))
    return linear(w, "head", layer_norm(w, "norm", x, 1e-6)[0]), taps


def conv(w, name, x, stride=1, padding=1):
    """Convolution [C, H, W] as one product per output row, no library convolution."""
    kernel = w[f"{name}.weight"]
    out_c, in_c, size, _ = kernel.shape
    x = torch.nn.functional.pad(x, (padding,) * 4)
    h, wd = (x.shape[1] - size) // stride + 1, (x.shape[2] - size) // stride + 1
    out = torch.zeros(out_c, h, wd, dtype=x.dtype)
    for dy in range(size):
        for dx in range(size):
            part = x[:, dy : dy + (h - 1) * stride + 1 : stride, dx : dx + (wd - 1) * stride + 1 : stride]
            out += (kernel[:, :, dy, dx] @ part.reshape(in_c, -1)).reshape(out_c, h, wd)
    return out


def batch_norm(w, name, x):
    scale = w[f"{name}.weight"] / torch.sqrt(w[f"{name}.running_var"] + 1e-5)
    return (x - w[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


def relu(x):
    return x.clamp(min=0)


def conv_bn_relu(w, name, x, padding=1):
    return relu(batch_norm(w, f"{name}.bn", conv(w, f"{name}.conv", x, 1, padding)))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def upscale(x):
    """Nearest, twice as large."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


def residual(w, name, x, stride):
    short = x
    if f"{name}.downsample.0.weight" in w:
        short = batch_norm(w, f"{name}.downsample.1", conv(w, f"{name}.downsample.0", x, stride, 0))
    y = relu(batch_norm(w, f"{name}.bn1", conv(w, f"{name}.conv1", x, stride)))
    return relu(short + batch_norm(w, f"{name}.bn2", conv(w, f"{name}.conv2", y)))


def refine(w, name, x):
    x = conv_bn_relu(w, f"{name}.conv", x)
    weight = conv(w, f"{name}.conv_atten", x.mean((1, 2))[:, None, None], 1, 0)
    return x * sigmoid(batch_norm(w, f"{name}.bn_atten", weight))


def bisenet(w, image):
    """[3, H, W] normalised -> logits [classes, H, W] (first output; corners aligned)."""
    x = relu(batch_norm(w, "cp.resnet.bn1", conv(w, "cp.resnet.conv1", image, 2, 3)))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=float("-inf"))
    shifts = [padded[:, i : i + x.shape[1] : 2, j : j + x.shape[2] : 2] for i in range(3) for j in range(3)]
    x = torch.stack(shifts).amax(0)
    maps = []
    for layer in range(1, 5):
        for block in range(2):
            x = residual(w, f"cp.resnet.layer{layer}.{block}", x, 2 if layer > 1 and block == 0 else 1)
        maps.append(x)
    _, f8, f16, f32 = maps
    mean = conv_bn_relu(w, "cp.conv_avg", f32.mean((1, 2))[:, None, None], 0)
    coarse = conv_bn_relu(w, "cp.conv_head32", upscale(refine(w, "cp.arm32", f32) + mean))
    fine = conv_bn_relu(w, "cp.conv_head16", upscale(refine(w, "cp.arm16", f16) + coarse))
    x = conv_bn_relu(w, "ffm.convblk", torch.cat([f8, fine]), 0)
    weight = conv(w, "ffm.conv2", relu(conv(w, "ffm.conv1", x.mean((1, 2))[:, None, None], 1, 0)), 1, 0)
    x = x + x * sigmoid(weight)
    x = conv(w, "conv_out.conv_out", conv_bn_relu(w, "conv_out.conv", x), 1, 0)
    return stretch(stretch(x, image.shape[1], 1), image.shape[2], 2)


def stretch(x, size, axis):
    """Linear along one axis, first and last samples in place."""
    x = x.movedim(axis, 0)
    out = []
    for i in range(size):
        at = i * (len(x) - 1) / (size - 1)
        low = min(int(at), len(x) - 2)
        out.append(x[low] * (1 - (at - low)) + x[low + 1] * (at - low))
    return torch.stack(out).movedim(0, axis)
