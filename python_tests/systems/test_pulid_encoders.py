"""IDEncoder, IDFormer and the EVA02-CLIP tower against slow float64 versions; keys and counts as published."""

import pulid_naive as naive
import pytest
import torch

from idcore.encoders.eva_clip import EvaClipConfig, EvaClipVisual, rope_tables
from idcore.encoders.face_parsing import BiSeNet
from idcore.errors import InputError, WeightsError
from idcore.systems.pulid import SDXL_LAYERS, PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.weights import write_safetensors

TINY = dict(id_dim=12, vit_dim=10, width=16, output_dim=14, queries=6, heads=4)
MLP = [f"{i}.{p}" for i in (0, 1, 3, 4, 6) for p in ("weight", "bias")]


def noisy(module, scale=0.3):
    """Random values everywhere: norms and biases too, so that a swapped or dropped one is seen."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * scale)
    return module.eval()


def features(b, n, t=7, c=TINY):
    id_cond = torch.randn(b, n, c["id_dim"])
    return id_cond, [torch.randn(b, n, t, c["vit_dim"]) for _ in range(5)]


def naive_tokens(encoder, id_cond, hidden, b, **kw):
    w = naive.f64(encoder.state_dict())
    conds = list(id_cond[b].double())
    hiddens = [[h[b, j].double() for h in hidden] for j in range(id_cond.shape[1])]
    if encoder.config.version == "v1":
        return naive.id_encoder(w, conds, hiddens, encoder.config.output_dim, **kw)
    return naive.id_former(w, conds, hiddens, encoder.config.heads)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
@pytest.mark.parametrize("b,n", [(1, 1), (3, 1), (1, 4), (2, 3), (3, 2)])
@torch.no_grad()
def test_tokens_equal_the_naive_ones_for_every_person_and_number_of_photos(version, b, n):
    encoder = noisy(EncoderConfig(version, **TINY).build())
    id_cond, hidden = features(b, n)
    got32 = encoder(id_cond, hidden)
    got64 = encoder.double()(id_cond.double(), [h.double() for h in hidden])
    assert got32.shape[1] == (10 + 5 * (n - 1) if version == "v1" else TINY["queries"])
    for row in range(b):
        want = naive_tokens(encoder, id_cond, hidden, row)
        torch.testing.assert_close(got64[row], want, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(got32[row].double(), want, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_id_mix_takes_all_tokens_of_further_photos():
    encoder = noisy(EncoderConfig("v1", **TINY).build()).double()
    id_cond, hidden = (x.double() if torch.is_tensor(x) else [h.double() for h in x] for x in features(2, 3))
    mixed = encoder(id_cond, hidden, id_mix=True)
    assert mixed.shape[1] == 30
    for row in range(2):
        torch.testing.assert_close(mixed[row], naive_tokens(encoder, id_cond, hidden, row, id_mix=True))
    plain = encoder(id_cond, hidden)
    assert torch.equal(plain, mixed[:, [*range(10), *range(10, 15), *range(20, 25)]])


@pytest.mark.parametrize("version", ["v1", "v1.1"])
@torch.no_grad()
def test_people_and_photos_are_not_mixed_up(version):
    """Two people with two photos each differ from one with four, and from each other's photos."""
    encoder = noisy(EncoderConfig(version, **TINY).build()).double()
    id_cond, hidden = (x.double() if torch.is_tensor(x) else [h.double() for h in x] for x in features(2, 2))
    both = encoder(id_cond, hidden)
    alone = encoder(id_cond[1:], [h[1:] for h in hidden])
    torch.testing.assert_close(both[1:], alone)
    other = id_cond.clone()
    other[0] += 1
    assert torch.equal(encoder(other, hidden)[1], both[1])
    assert not torch.allclose(encoder(other, hidden)[0], both[0])


@pytest.mark.parametrize("change,text", [
    (dict(id_cond=torch.zeros(2, 12)), r"id_cond must be \[B, n, 12\].*got \[2, 12\]"),
    (dict(id_cond=torch.zeros(1, 1, 13)), r"got \[1, 1, 13\]"),
    (dict(hidden=[torch.zeros(1, 1, 7, 10)] * 4), r"wanted 5 hidden states.*got 4"),
    (dict(hidden=[torch.zeros(1, 2, 7, 10)] * 5), r"hidden state 0 must be \[B, n, T, 10\] with B=1, n=1"),
    (dict(hidden=[torch.zeros(1, 1, 1, 10)] * 5), r"T >= 2"),
])  # fmt: skip
def test_features_that_do_not_fit_are_named(change, text):
    id_cond, hidden = features(1, 1)
    for version in ("v1", "v1.1"):
        with pytest.raises(InputError, match=text):
            EncoderConfig(version, **TINY).build()(**{"id_cond": id_cond, "hidden": hidden, **change})


def test_id_mix_is_refused_by_v11():
    with pytest.raises(InputError, match="option of v1 only"):
        EncoderConfig("v1.1", **TINY).build()(*features(1, 2), id_mix=True)


def published_keys(version):
    """Key list from the published layout, written out here."""
    if version == "v1":
        keys = [f"id_adapter.body.{m}" for m in MLP]
        keys += [f"id_adapter.{name}_{i}.{m}" for name in ("mapping", "mapping_patch") for i in range(5) for m in MLP]
    else:
        keys = ["id_adapter.latents", "id_adapter.proj_out"] + [f"id_adapter.id_embedding_mapping.{m}" for m in MLP]
        keys += [f"id_adapter.mapping_{i}.{m}" for i in range(5) for m in MLP]
        for i in range(10):
            layer = f"id_adapter.layers.{i}"
            keys += [f"{layer}.0.{norm}.{p}" for norm in ("norm1", "norm2") for p in ("weight", "bias")]
            keys += [f"{layer}.0.{name}.weight" for name in ("to_q", "to_kv", "to_out")]
            keys += [f"{layer}.1.0.weight", f"{layer}.1.0.bias", f"{layer}.1.1.weight", f"{layer}.1.3.weight"]
    sites = [f"id_adapter_attn_layers.{i}.id_to_{x}.weight" for i in range(1, 140, 2) for x in "kv"]
    return keys + sites


@pytest.mark.parametrize("version,encoder,total,tensors", [
    ("v1", 54_886_400, 395_673_600, 250),
    ("v1.1", 151_398_400, 492_185_600, 312),
])  # fmt: skip
def test_full_size_has_the_published_keys_shapes_and_counts(version, encoder, total, tensors):
    with torch.device("meta"):
        system = PuLID(PuLIDConfig(EncoderConfig(version)))
    state = system.state_dict()
    assert sorted(state) == sorted(published_keys(version)) and len(state) == tensors
    assert sum(p.numel() for p in system.id_adapter.parameters()) == encoder
    assert sum(p.numel() for p in system.parameters()) == total
    assert state["id_adapter_attn_layers.1.id_to_k.weight"].shape == (640, 2048)
    assert state["id_adapter_attn_layers.9.id_to_v.weight"].shape == (1280, 2048)
    if version == "v1":
        assert state["id_adapter.body.6.weight"].shape == (10240, 1024)
        assert state["id_adapter.mapping_patch_4.6.weight"].shape == (2048, 1024)
    else:
        assert state["id_adapter.latents"].shape == (1, 32, 1024)
        assert state["id_adapter.layers.9.0.to_kv.weight"].shape == (2048, 1024)
        assert state["id_adapter.id_embedding_mapping.6.weight"].shape == (5120, 1024)


def test_sdxl_layers_follow_the_published_table():
    widths = dict(SDXL_LAYERS)
    assert list(widths) == list(range(1, 140, 2))
    narrow = {1, 3, 5, 7, 109, 111, 113, 115, 117, 119}
    assert all(c == (640 if i in narrow else 1280) for i, c in widths.items())


# -- EVA02-CLIP tower -----------------------------------------------------------------------------------------

TINY_EVA = EvaClipConfig(
    image_size=12, patch_size=4, width=16, depth=4, heads=2, mlp_dim=10, embed_dim=6, rope_grid=2, taps=(1, 2, 3)
)


@torch.no_grad()
def test_tower_equals_the_naive_one():
    tower = noisy(EvaClipVisual(TINY_EVA))
    image = torch.randn(2, 3, 12, 12)
    w = naive.f64(tower.state_dict())
    got, taps = tower(image)
    tower.double()
    tower.rope_cos, tower.rope_sin = naive.eva_rope(8, 3, 2)
    got64, taps64 = tower(image.double())
    for row in range(2):
        want, want_taps = naive.eva_tower(w, image[row].double(), TINY_EVA)
        torch.testing.assert_close(got64[row], want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-4)
        assert len(taps) == len(want_taps) == 3
        for a, b, c in zip(taps, taps64, want_taps):
            torch.testing.assert_close(b[row], c, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(a[row].double(), c, rtol=1e-4, atol=1e-4)


def test_rope_of_the_full_tower_and_positions_by_hand():
    cos, sin = rope_tables(EvaClipConfig())
    assert cos.shape == sin.shape == (576, 64)
    want_cos, want_sin = naive.eva_rope(64, 24, 16)
    torch.testing.assert_close(cos.double(), want_cos, rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), want_sin, rtol=0, atol=1e-7)
    angle = torch.tensor(7 / 24 * 16, dtype=torch.float64)  # row 7, column 0, fastest pair
    torch.testing.assert_close(cos[7 * 24, :2].double(), angle.cos().expand(2), rtol=0, atol=1e-7)
    assert torch.equal(cos[7 * 24, 32:], torch.ones(32))  # column 0 does not turn


def published_eva_keys(depth=24):
    keys = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    keys += [f"{m}.{p}" for m in ("norm", "head") for p in ("weight", "bias")]
    for i in range(depth):
        b = f"blocks.{i}"
        keys += [f"{b}.{m}.{p}" for m in ("norm1", "norm2", "attn.inner_attn_ln", "attn.proj", "mlp.w1", "mlp.w2",
                                          "mlp.w3", "mlp.ffn_ln") for p in ("weight", "bias")]  # fmt: skip
        keys += [f"{b}.attn.{m}" for m in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_bias", "v_bias")]
    return keys


def test_full_tower_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        tower = EvaClipVisual()
    state = tower.state_dict()
    assert sorted(state) == sorted(published_eva_keys())
    assert len(state) + 2 == 514  # 562 visual.* tensors in the file: 25 pairs of rotary tables, 24 of them copies
    assert state["pos_embed"].shape == (1, 577, 1024) and state["head.weight"].shape == (768, 1024)
    assert state["blocks.23.mlp.w1.weight"].shape == (2730, 1024)
    assert state["patch_embed.proj.weight"].shape == (1024, 3, 14, 14)


def eva_file(tmp_path, change=None):
    tower = noisy(EvaClipVisual(TINY_EVA))
    cos, sin = rope_tables(TINY_EVA)
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    state |= {"visual.rope.freqs_cos": cos.half(), "visual.rope.freqs_sin": sin.half()}
    state |= {f"visual.blocks.{i}.attn.rope.freqs_{n}": t for i in range(4) for n, t in (("cos", cos), ("sin", sin))}
    state |= {"text.token_embedding.weight": torch.randn(5, 4), "logit_scale": torch.tensor(1.0)}
    if change:
        change(state)
    return tower, state, write_safetensors(tmp_path / "eva.safetensors", state)


def test_tower_reads_its_published_layout_and_leaves_the_text_tower(tmp_path):
    tower, _, path = eva_file(tmp_path)
    loaded = EvaClipVisual.from_weights(path, config=TINY_EVA)
    image = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        (a, taps_a), (b, taps_b) = tower(image), loaded(image)
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(taps_a, taps_b))
    assert loaded.weights_hash.startswith("sha256:") and not any(p.requires_grad for p in loaded.parameters())


def test_tower_comes_out_of_a_pickle_through_conversion_only(tmp_path):
    from idcore.weights import convert_pickle

    tower, state, _ = eva_file(tmp_path)
    torch.save(state, tmp_path / "eva.pt")
    with pytest.raises(WeightsError, match="torch pickle.*convert_pickle"):
        EvaClipVisual.from_weights(tmp_path / "eva.pt", config=TINY_EVA)
    info = convert_pickle(tmp_path / "eva.pt", tmp_path / "out.safetensors")
    assert info.layout == "eva_clip" and "left out 10 tensors" in info.note
    loaded = EvaClipVisual.from_weights(tmp_path / "out.safetensors", config=TINY_EVA)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in tower.state_dict().items())


@pytest.mark.parametrize("change,text", [
    (lambda s: s.pop("visual.blocks.2.attn.q_bias"), r"1 missing: blocks\.2\.attn\.q_bias"),
    (lambda s: s.update({"visual.extra": torch.zeros(1)}), r"1 unexpected: extra"),
    (lambda s: s.update({"visual.rope.freqs_cos": torch.zeros(9, 8)}), r"rope\.freqs_cos .*another resolution"),
    (lambda s: s.update({"visual.head.bias": torch.full((6,), float("nan"))}), r"NaN or infinity: visual\.head\.bias"),
    (lambda s: s.pop("visual.blocks.0.attn.inner_attn_ln.weight"), "not an EVA02-CLIP file"),
])  # fmt: skip
def test_tower_files_that_do_not_fit_are_named(tmp_path, change, text):
    _, _, path = eva_file(tmp_path, change)
    with pytest.raises(WeightsError, match=text):
        EvaClipVisual.from_weights(path, config=TINY_EVA)


def test_tower_names_a_wrong_image_size():
    with pytest.raises(InputError, match=r"pixels must be \[N, 3, 12, 12\], got \[1, 3, 16, 16\]"):
        EvaClipVisual(TINY_EVA)(torch.zeros(1, 3, 16, 16))


# -- face parsing ---------------------------------------------------------------------------------------------


def published_parsing_keys():
    def bn(name):
        return [f"{name}.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    def conv_bn(name):
        return [f"{name}.conv.weight", *bn(f"{name}.bn")]

    keys = ["cp.resnet.conv1.weight", *bn("cp.resnet.bn1")]
    for layer in range(1, 5):
        for block in range(2):
            name = f"cp.resnet.layer{layer}.{block}"
            keys += [f"{name}.conv1.weight", *bn(f"{name}.bn1"), f"{name}.conv2.weight", *bn(f"{name}.bn2")]
            if layer > 1 and block == 0:
                keys += [f"{name}.downsample.0.weight", *bn(f"{name}.downsample.1")]
    for arm in ("cp.arm16", "cp.arm32"):
        keys += [*conv_bn(f"{arm}.conv"), f"{arm}.conv_atten.weight", *bn(f"{arm}.bn_atten")]
    for name in ("cp.conv_head32", "cp.conv_head16", "cp.conv_avg", "ffm.convblk"):
        keys += conv_bn(name)
    keys += ["ffm.conv1.weight", "ffm.conv2.weight"]
    for out in ("conv_out", "conv_out16", "conv_out32"):
        keys += [*conv_bn(f"{out}.conv"), f"{out}.conv_out.weight"]
    return keys


def test_parsing_network_has_the_published_keys_and_size():
    net = BiSeNet()
    assert sorted(net.state_dict()) == sorted(published_parsing_keys())
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert 0 < 53_289_463 - size < 64_000  # the published file, less its zip and pickle records


@torch.no_grad()
def test_parsing_network_equals_the_naive_one():
    net = noisy(BiSeNet(), 0.02)
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer) * 0.3)
    for name, p in net.named_parameters():
        if "bn" in name and name.endswith("weight"):
            p.mul_(2.5)  # else random weights fade from layer to layer
    image = torch.randn(2, 3, 64, 96)
    w = naive.f64(net.state_dict())
    got, got64 = net(image), net.double()(image.double())
    for row in range(2):
        want = naive.bisenet(w, image[row].double())
        assert want.shape == (19, 64, 96) and want.std() > 0.01
        torch.testing.assert_close(got64[row], want, rtol=1e-7, atol=1e-8 * float(want.abs().max()))
        torch.testing.assert_close(got[row].double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_parsing_network_reads_its_file_and_gives_a_class_per_pixel(tmp_path):
    net = noisy(BiSeNet(), 0.02)
    path = write_safetensors(tmp_path / "parsing.safetensors", net.state_dict())
    loaded = BiSeNet.from_weights(path)
    image = torch.rand(1, 3, 64, 96)
    labels = loaded.labels(image)
    assert labels.shape == (1, 64, 96) and 0 <= int(labels.min()) and int(labels.max()) < 19
    assert torch.equal(labels, net.labels(image))
    with pytest.raises(InputError, match=r"multiples of 32, got \[1, 3, 60, 96\]"):
        loaded.labels(torch.rand(1, 3, 60, 96))
    state = dict(net.state_dict())
    state.pop("ffm.conv1.weight")
    with pytest.raises(WeightsError, match=r"wanted 191 tensors, got 190; 1 missing: ffm\.conv1\.weight"):
        BiSeNet.from_weights(write_safetensors(tmp_path / "bad.safetensors", state))
