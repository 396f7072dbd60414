"""FaceID, its Plus forms, its LoRA part, InstantID: published layouts, plain float64 forms, diffusers' own loader."""

import face_adapter_naive as naive
import pytest
import torch
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore import weights
from idcore.encoders.face_features import FaceFeatures
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.systems.base import System
from idcore.systems.face_adapter import FaceAdapterConfig
from idcore.systems.face_projectors import ProjectorConfig
from idcore.systems.faceid import FaceID
from idcore.systems.instantid import InstantID
from idcore.systems.layers import SD15_LAYERS, SDXL_LAYERS
from idcore.testing.tiny_models import tiny_inputs, tiny_pipeline, tiny_unet

KINDS = [("faceid", None), ("faceid-plus", "plus"), ("faceid-plus", "plusv2"), ("instantid", None)]
NAMES = {"plus": "x-plus_sdxl", "plusv2": "x-plusv2_sdxl", None: "x"}


@pytest.fixture(scope="module")
def unet():
    return tiny_unet("sdxl")


def save(system, tmp_path, variant=None, lora=None):
    """As published (a nested pickle), then through `convert`."""
    torch.save(naive.published(system, lora), tmp_path / "published.bin")
    out = tmp_path / f"{NAMES[variant]}.safetensors"
    info = weights.convert(tmp_path / "published.bin", out, unpickle=True)
    assert info.layout == "ip_adapter" and weights.describe(out).layout == "ip_adapter"
    return out


def load(kind, path, **options):
    return InstantID.from_weights(path, **options) if kind == "instantid" else FaceID.from_weights(path, **options)


def features(n=2, b=2, clip=True):
    g = torch.Generator().manual_seed(8)
    e = torch.randn(b, n, naive.ID, generator=g)
    if not clip:
        return FaceFeatures(e)
    return FaceFeatures(
        e, torch.randn(b, n, 5, naive.CLIP, generator=g), None, torch.randn(1, 1, 5, naive.CLIP, generator=g)
    )


@pytest.mark.parametrize("kind,variant", KINDS)
def test_tokens_equal_the_plain_form_through_the_published_file(unet, tmp_path, kind, variant):
    made = naive.make(kind, unet, variant)
    system = load(kind, save(made, tmp_path, variant), dtype=torch.float64)
    assert isinstance(system, System) and system.state_dict().keys() == made.state_dict().keys()
    f, t = features(), made.state_dict()
    identity = system.encode(f)
    shortcut = 1.0 if variant == "plusv2" else None
    want = naive.tokens(kind, t, f.embeds, f.clip, shortcut)
    assert identity.tokens.shape == ((2, 16, 64) if kind == "instantid" else (2, 8, 64))
    torch.testing.assert_close(identity.tokens.double(), want, rtol=2e-6, atol=2e-6)
    blank = naive.tokens(kind, t, torch.zeros_like(f.embeds), f.uncond_clip.expand_as(f.clip), shortcut)
    torch.testing.assert_close(identity.uncond_tokens.double(), blank[:1], rtol=2e-6, atol=2e-6)
    assert identity.system == {"plus": "faceid-plus", "plusv2": "faceid-plusv2"}.get(variant, kind)


def test_the_shortcut_scale_counts_in_plusv2_alone(unet, tmp_path):
    path = save(naive.make("faceid-plus", unet, "plusv2"), tmp_path, "plusv2")
    f = features()
    strong, weak = (FaceID.from_weights(path, shortcut_scale=s).encode(f).tokens for s in (2.0, 0.0))
    mlp = naive.tokens("faceid", naive.make("faceid-plus", unet, "plusv2").state_dict(), f.embeds)
    torch.testing.assert_close(weak.double(), mlp, rtol=1e-4, atol=1e-4)
    assert (strong - weak).abs().max() > 0.1


def diffusers_result(kind, variant, system, lora, f, inputs):
    """The same UNet with diffusers' own IP-Adapter loader and processors, float64."""
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    pipe.load_ip_adapter([naive.published(system, lora)], subfolder="", weight_name=None, image_encoder_folder=None)
    pipe.unet.to(torch.float64)
    pipe.set_ip_adapter_scale(0.7)
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    embeds = f.embeds.double()[:, :, None]  # [B, adapters' images, 1, D]
    if kind == "faceid-plus":
        projection.clip_embeds, projection.shortcut = f.clip[:, :1].double(), variant == "plusv2"
    inputs = dict(inputs, added_cond_kwargs=dict(inputs["added_cond_kwargs"], image_embeds=[embeds]))
    return pipe.unet(**inputs).sample


def double(inputs):
    if isinstance(inputs, dict):
        return {k: double(v) for k, v in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("kind,variant", KINDS)
def test_a_whole_unet_equals_diffusers_own_ip_adapter(tmp_path, kind, variant):
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    made, lora = naive.make(kind, pipe.unet, variant), None
    if kind == "instantid":
        made.image_proj.config = made.config.projector
    else:
        lora = naive.lora_part(pipe.unet)
    system = load(kind, save(made, tmp_path, variant, lora), dtype=torch.float64)
    f, inputs = features(n=1), double(tiny_inputs("sdxl"))
    with torch.no_grad():
        plain = pipe.unet(**inputs).sample
        want = diffusers_result(kind, variant, made, lora, f, inputs)
        handle = system.lora(pipe) if lora else None
        with idcore.attach(pipe.unet, system, system.encode(f), id_scale=0.7):
            got = pipe.unet(**inputs).sample
        if handle:
            handle.remove()
        assert torch.equal(pipe.unet(**inputs).sample, plain)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float((want - plain).abs().max()))


def test_the_lora_part_joins_other_loras_and_leaves_them(unet, tmp_path):
    from peft import LoraConfig

    unet = tiny_unet("sdxl")
    torch.manual_seed(11)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), adapter_name="style")
    learned = [n for n, p in unet.named_parameters() if p.requires_grad]
    system = FaceID.from_weights(save(naive.make("faceid", unet), tmp_path, lora=naive.lora_part(unet)))
    inputs = tiny_inputs("sdxl")
    with torch.no_grad():
        styled = unet(**inputs).sample
        with system.lora(unet, 0.0) as handle:
            assert torch.equal(unet(**inputs).sample, styled)
            handle.scale(1.0)
            assert not torch.allclose(unet(**inputs).sample, styled, atol=1e-4)
            assert [n for n, p in unet.named_parameters() if p.requires_grad] == learned
            with pytest.raises(InputError, match="has an adapter 'faceid' already"):
                system.lora(unet)
        assert torch.equal(unet(**inputs).sample, styled)
        with system.lora(unet, 0.0):
            assert torch.equal(unet(**inputs).sample, styled)
    with pytest.raises(InputError, match="scale must be a finite number"):
        system.lora(unet, float("nan"))


def test_save_keeps_everything_and_says_which_plus(unet, tmp_path):
    first = FaceID.from_weights(
        save(naive.make("faceid-plus", unet, "plusv2"), tmp_path, "plusv2", naive.lora_part(unet))
    )
    again = FaceID.from_weights(first.save(tmp_path / "mine.safetensors"))
    assert again.variant == "plusv2" and again.config == first.config
    assert again.lora_tensors.keys() == first.lora_tensors.keys() and again.weights_hash() == first.weights_hash()
    assert torch.equal(again.encode(features()).tokens, first.encode(features()).tokens)


PUBLISHED = [  # what the publishers' files weigh (bytes), bytes a number, numbers of the LoRA part
    ("faceid", ProjectorConfig("faceid", 2048, 16), 749_822_515, 2, False),
    ("faceid-plus", ProjectorConfig("faceid-plus", 2048), 1_487_555_181, 2, True),
]


@pytest.mark.parametrize("kind,projector,size,width,lora", PUBLISHED)
def test_published_sizes_account_for_the_published_files(kind, projector, size, width, lora):
    with torch.device("meta"):
        system = FaceID(FaceAdapterConfig(projector, SDXL_LAYERS), "plusv2" if kind == "faceid-plus" else "faceid")
    numbers = sum(p.numel() for p in system.parameters())
    tensors = len(system.state_dict())
    if lora:  # rank 128 on q, k, v, out of 70 self- and 70 cross-attentions
        for _, c in SDXL_LAYERS:
            numbers += 128 * (2 * c * 4) + 128 * (2 * (2 * c) + 2 * (2048 + c))
        tensors += 140 * 8
    over = size - numbers * width  # names and pickle records
    assert 0 < over < 400 * tensors


def test_base_models_layers():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sd15 = UNet2DConditionModel(cross_attention_dim=768)
    projector = ProjectorConfig("faceid", 768)
    assert FaceAdapterConfig.for_unet(sd15, projector).layers == SD15_LAYERS
    with torch.device("meta"):
        system = FaceID(FaceAdapterConfig(projector, SD15_LAYERS))
    assert len(system.sites(sd15)) == 16
    with pytest.raises(InputError, match="FaceID: the weights are for a UNet with 16 cross-attention layers.*SD 1.5"):
        system.sites(tiny_unet("sdxl"))


def test_instantid_takes_several_photos_as_context(unet, tmp_path):
    system = load("instantid", save(naive.make("instantid", unet), tmp_path))
    one, three = (system.encode(torch.randn(n, naive.ID)) for n in (1, 3))
    assert one.tokens.shape == three.tokens.shape == (1, 16, 64) and not torch.equal(one.tokens, three.tokens)


def test_identities_go_through_files_and_mix(unet, tmp_path):
    system = load("faceid", save(naive.make("faceid", unet), tmp_path))
    a, b = (system.encode(torch.randn(naive.ID)) for _ in range(2))
    a.save(tmp_path / "a.safetensors")
    assert torch.equal(Identity.load(tmp_path / "a.safetensors").tokens, a.tokens)
    mixed = Identity.mix([a, b], [3, 1])
    torch.testing.assert_close(mixed.tokens, 0.75 * a.tokens + 0.25 * b.tokens)


@pytest.mark.parametrize("make,error,text", [
    (lambda s: s.encode("me.jpg"), InputError, "photos need preprocess=FacePreprocess"),
    (lambda s: s.encode(torch.randn(1, 1, 1, 12)), InputError, r"embeddings must be \[D\], \[n, D\] or \[B, n, D\]"),
    (lambda s: s.encode(torch.randn(7)), InputError, "wanted embeddings of 12 numbers, got 7"),
    (lambda s: FaceFeatures(torch.randn(1, 2, 3), torch.randn(1, 1, 5, 4)), InputError, "clip must be"),
    (lambda s: FaceFeatures(torch.randn(1, 2, 3), uncond_embeds=torch.randn(1, 1, 3)), InputError, "uncond_embeds"),
    (lambda s: s.lora(tiny_unet("sdxl")), WeightsError, "have no LoRA part"),
    (lambda s: s.project(s.sites(tiny_unet("sdxl"))[0], torch.randn(1, 4, 3)), InputError, r"tokens must be \[Bi, L"),
    (lambda s: FaceID(s.config, "plus"), InputError, "variant must be one of faceid, plus, plusv2 and fit"),
    (lambda s: ProjectorConfig("full"), InputError, "kind must be one of"),
])  # fmt: skip
def test_refusals(unet, make, error, text):
    with pytest.raises(error, match=text):
        make(naive.make("faceid", unet))


def test_wrong_files_are_named(unet, tmp_path):
    faceid = save(naive.make("faceid", unet), tmp_path)
    with pytest.raises(WeightsError, match="InstantID: wanted weights of the kind 'resampler'.*holds an IP-Adapter Fa"):
        InstantID.from_weights(faceid)
    with pytest.raises(WeightsError, match="is a torch pickle.*idcore convert .* --unpickle"):
        FaceID.from_weights(tmp_path / "published.bin")
    plus = save(naive.make("faceid-plus", unet, "plus"), tmp_path)
    with pytest.raises(InputError, match="Plus or PlusV2, which have the same keys; say which"):
        FaceID.from_weights(plus)
    with pytest.raises(InputError, match="also read image tokens"):
        FaceID.from_weights(plus, "plus").encode(torch.randn(naive.ID))
    tensors = dict(naive.make("faceid", unet).state_dict())
    tensors.pop("ip_adapter.3.to_v_ip.weight")
    weights.write_safetensors(tmp_path / "short.safetensors", tensors)
    with pytest.raises(WeightsError, match="1 missing: ip_adapter.3.to_v_ip.weight"):
        FaceID.from_weights(tmp_path / "short.safetensors")
    image = {"image_proj.proj.weight": torch.randn(8, 4), "ip_adapter.1.to_k_ip.weight": torch.randn(4, 2)}
    weights.write_safetensors(tmp_path / "image.safetensors", image)
    with pytest.raises(WeightsError, match="an IP-Adapter for whole images"):
        FaceID.from_weights(tmp_path / "image.safetensors")


def test_ip_adapter_plus_is_not_taken_for_instantid(unet, tmp_path):
    system = naive.make("instantid", unet)
    t = {k: v for k, v in system.state_dict().items()} | {"image_proj.proj_in.weight": torch.randn(naive.INNER, 1280)}
    weights.write_safetensors(tmp_path / "plus.safetensors", t)
    with pytest.raises(WeightsError, match="reads vectors of 1280 numbers, image tokens: it is an IP-Adapter Plus"):
        InstantID.from_weights(tmp_path / "plus.safetensors")


def test_lora_of_another_base_model_is_refused(unet, tmp_path):
    system = FaceID.from_weights(save(naive.make("faceid", unet), tmp_path, lora=naive.lora_part(unet)))
    with pytest.raises(InputError, match=r"tensors do not fit this UNet"):
        system.lora(tiny_unet("sd"))


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unet_dtype", [torch.float32, torch.bfloat16])
def test_weights_and_pipelines_of_different_precision(unet, tmp_path, weights_dtype, unet_dtype):
    path = save(naive.make("faceid", unet), tmp_path, lora=naive.lora_part(unet))
    f, inputs = features(n=1), tiny_inputs("sdxl")
    results = []
    for of_weights, of_unet in ((torch.float32, torch.float32), (weights_dtype, unet_dtype)):
        system, model = FaceID.from_weights(path, dtype=of_weights), tiny_unet("sdxl").to(of_unet)
        cast = {k: v.to(of_unet) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        cast["added_cond_kwargs"] = {k: v.to(of_unet) for k, v in inputs["added_cond_kwargs"].items()}
        with torch.no_grad(), system.lora(model), idcore.attach(model, system, system.encode(f)):
            results.append(model(**cast).sample.float())
    assert (results[0] - results[1]).abs().max() < 0.03 * results[0].abs().max()
