"""The face ViT against a plain float64 computation; timm's names, sizes from the weights, resized positions."""

import math

import pytest
import torch
from safetensors.torch import save_file

from idcore.encoders.face_vit import FaceViT, FaceViTConfig, resized_positions
from idcore.errors import InputError, WeightsError

SMALL = dict(image_size=12, patch_size=4, width=64, depth=3, heads=1, mlp_dim=24, id_dim=5)


def timm_state(seed=0, depth=3, width=64, grid=3, patch=4, mlp=24, head=5):
    """Random tensors under the names that timm's VisionTransformer gives its own."""
    g = torch.Generator().manual_seed(seed)

    def t(*shape):
        return torch.randn(*shape, generator=g) * 0.1

    state = {"cls_token": t(1, 1, width), "pos_embed": t(1, grid * grid + 1, width)}
    state |= {"patch_embed.proj.weight": t(width, 3, patch, patch), "patch_embed.proj.bias": t(width)}
    for i in range(depth):
        b = f"blocks.{i}."
        for name, rows, columns in (("attn.qkv", 3 * width, width), ("attn.proj", width, width),
                                    ("mlp.fc1", mlp, width), ("mlp.fc2", width, mlp)):  # fmt: skip
            state |= {f"{b}{name}.weight": t(rows, columns), f"{b}{name}.bias": t(rows)}
        for name in ("norm1", "norm2"):
            state |= {f"{b}{name}.weight": 1 + t(width), f"{b}{name}.bias": t(width)}
    state |= {"norm.weight": 1 + t(width), "norm.bias": t(width)}
    if head:
        state |= {"head.weight": t(head, width), "head.bias": t(head)}
    return state


def naive(state, pixels, heads):
    """Class tokens after every block, and the head on the normalised last one; loops in float64."""
    s = {k: v.double() for k, v in state.items()}
    x = pixels.double()
    patch, width = s["patch_embed.proj.weight"].shape[-1], s["cls_token"].shape[-1]
    cells = []
    for r in range(0, x.shape[2], patch):
        for c in range(0, x.shape[3], patch):
            piece = x[:, :, r : r + patch, c : c + patch].flatten(1)
            cells.append(piece @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"])
    x = torch.stack([s["cls_token"][:, 0].expand(len(x), -1), *cells], 1) + s["pos_embed"]

    def norm(v, name):
        centred = v - v.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]
        )

    def linear(v, name):
        return v @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    taps, d, i = [], width // heads, 0
    while f"blocks.{i}.norm1.weight" in s:
        b = f"blocks.{i}."
        q, k, v = linear(norm(x, b + "norm1"), b + "attn.qkv").split(width, -1)
        mixed = torch.cat(
            [
                (q[..., h : h + d] @ k[..., h : h + d].transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v[..., h : h + d]
                for h in range(0, width, d)
            ],
            -1,
        )
        x = x + linear(mixed, b + "attn.proj")
        inner = linear(norm(x, b + "norm2"), b + "mlp.fc1")
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), b + "mlp.fc2")
        taps.append(x[:, 0])
        i += 1
    last = norm(x[:, 0], "norm")
    return taps, linear(last, "head") if "head.weight" in s else last


@pytest.mark.parametrize("prefix", ["", "model."])
def test_equals_the_plain_computation_with_sizes_from_the_file(tmp_path, prefix):
    state = timm_state()
    save_file({prefix + k: v for k, v in state.items()} | ({"other": torch.ones(2)} if prefix else {}), tmp_path / "v")
    vit = FaceViT.from_weights(tmp_path / "v")
    assert vit.config == FaceViTConfig(**SMALL) and set(vit.state_dict()) == set(state)
    pixels = torch.randn(2, 3, 12, 12)
    taps, identity = naive(state, pixels, heads=1)
    got, seen = vit(pixels, (3, 1))
    assert torch.allclose(got.double(), identity, atol=1e-5)
    for a, b in zip(seen, (taps[2], taps[0])):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_heads_by_argument_no_head_and_another_resolution(tmp_path):
    state = timm_state(width=48, head=0)
    save_file(state, tmp_path / "v")
    with pytest.raises(WeightsError, match="width 48 is no multiple of 64"):
        FaceViT.from_weights(tmp_path / "v")
    vit = FaceViT.from_weights(tmp_path / "v", heads=3, image_size=20)
    assert vit.config.grid == 5 and vit.config.id_width == 48
    pixels = torch.randn(1, 3, 20, 20)
    grown = state | {"pos_embed": resized_positions(state["pos_embed"], 5)}
    assert torch.allclose(vit(pixels)[0].double(), naive(grown, pixels, 3)[1], atol=1e-5)
    classifier = timm_state(head=7)
    assert FaceViT.from_tensors(classifier, "x", head="none").config.id_dim == 0


def test_positions_keep_the_class_token_and_a_smooth_field():
    rows = torch.arange(6.0).repeat_interleave(6)
    table = torch.cat([torch.full((1, 1, 1), 9.0), rows[None, :, None]], 1)
    small = resized_positions(table, 3)
    assert small[0, 0] == 9 and small.shape == (1, 10, 1)
    assert torch.allclose(small[0, 1:, 0].view(3, 3)[1], torch.full((3,), 2.5), atol=1e-4), (
        "the middle stays the middle"
    )
    assert torch.allclose(resized_positions(table, 6), table, atol=1e-5)
    with pytest.raises(InputError, match="no square grid"):
        resized_positions(torch.zeros(1, 8, 1), 2)


def test_gradients_reach_every_weight():
    vit = FaceViT(FaceViTConfig(**SMALL))
    identity, taps = vit(torch.randn(2, 3, 12, 12), (1, 2, 3))
    (identity.square().mean() + sum(t.square().mean() for t in taps)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vit.parameters())


def test_sizes_of_the_presets():
    with torch.device("meta"):
        base = sum(p.numel() for p in FaceViT(FaceViTConfig(id_dim=1000)).parameters())
        small = sum(p.numel() for p in FaceViT(FaceViTConfig.small()).parameters())
    assert base == 86_567_656, "timm's vit_base_patch16_224"
    assert small == 2_820_032


def test_errors_say_what_was_wanted(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "v")
    with pytest.raises(WeightsError, match="no ViT in timm's key names: wanted patch_embed.proj.weight"):
        FaceViT.from_weights(tmp_path / "v")
    with pytest.raises(WeightsError, match="1 unexpected: blocks.0.ls1.gamma"):
        FaceViT.from_tensors(timm_state() | {"blocks.0.ls1.gamma": torch.ones(64)}, "x")
    with pytest.raises(InputError, match='head must be "auto" or "none"'):
        FaceViT.from_tensors(timm_state(), "x", head="some")
    with pytest.raises(InputError, match="image_size a multiple of patch_size"):
        FaceViTConfig(image_size=30, patch_size=16)
    vit = FaceViT(FaceViTConfig(**SMALL))
    with pytest.raises(InputError, match=r"pixels must be \[N, 3, 12, 12\], got \[1, 3, 8, 8\]"):
        vit(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="different blocks of 1 to 3"):
        vit(torch.zeros(1, 3, 12, 12), (0,))
