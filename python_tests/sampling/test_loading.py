"""Folders, single files, UNets of few-step models, 8 bit, offloading, compiling."""

import shutil

import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from original_layout import sdxl_layout, unet_layout
from safetensors.torch import save_file

import idcore
from idcore.errors import InputError, MissingDependencyError, WeightsError
from idcore.sampling.loading import load_unet_weights, place, quantize
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet


def two_widths():
    """A tiny SDXL pipeline whose text encoders differ in width, as the real ones do."""
    from transformers import CLIPTextModelWithProjection

    pipe = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", cross_attention_dim=32 + 48))
    config = type(pipe.text_encoder_2.config).from_dict(
        pipe.text_encoder_2.config.to_dict() | {"hidden_size": 48, "num_attention_heads": 4}
    )
    pipe.text_encoder_2 = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "sdxl"
    torch.manual_seed(0)
    two_widths().save_pretrained(path)
    return path


def picture(pipe, **more):
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", generator=generator, num_inference_steps=2, output_type="latent", **more).images


def saved(tensors, path):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return path


def test_a_folder(folder, recwarn):
    pipe = idcore.IDPipeline.from_pretrained(folder)
    assert pipe.unet.dtype == torch.float32 and picture(pipe).shape == (1, 4, 8, 8)
    half = idcore.IDPipeline.from_pretrained(folder, dtype=torch.bfloat16, sampler="karras-2m")
    assert half.unet.dtype == half.decoder.dtype == torch.bfloat16 and half.scheduler.config.use_karras_sigmas
    safe = idcore.IDPipeline.from_pretrained(folder, dtype=torch.float16, vae_dtype="float32")
    assert safe.unet.dtype == torch.float16 and safe.decoder.dtype == torch.float32
    assert safe("a dog", num_inference_steps=1).images[0].size == (16, 16)
    assert not [w for w in recwarn if "torch_dtype" in str(w.message)], "diffusers renamed its argument"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
def test_a_unet_in_one_file(folder, tmp_path, original, prefix):
    other = tiny_unet("sdxl", seed=9, cross_attention_dim=32 + 48)
    state = unet_layout(other) if original else other.state_dict()
    file = saved({prefix + k: v.half() for k, v in state.items()}, tmp_path / "lightning.safetensors")
    pipe = idcore.IDPipeline.from_pretrained(folder, unet_weights=file)
    got = pipe.unet.state_dict()
    assert all(torch.equal(got[k], v.half().float()) for k, v in other.state_dict().items())


def test_a_whole_checkpoint_in_one_file(folder, tmp_path):
    base = idcore.IDPipeline.from_pretrained(folder)
    file = saved(sdxl_layout(base.pipe), tmp_path / "checkpoint.safetensors")
    config = tmp_path / "config"
    shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = idcore.IDPipeline.from_single_file(file, config)
    assert torch.equal(picture(pipe, guidance_scale=2.0), picture(base, guidance_scale=2.0))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(pipe.decoder(x), base.decoder(x), atol=1e-5)
    # The UNet alone out of the whole checkpoint
    unet = tiny_unet("sdxl", seed=3, cross_attention_dim=32 + 48)
    load_unet_weights(unet, file)
    assert all(torch.equal(v, base.unet.state_dict()[k]) for k, v in unet.state_dict().items())


def test_files_that_are_not_there_or_do_not_fit(folder, tmp_path):
    with pytest.raises(WeightsError, match="has no model_index.json; wanted a folder with an SDXL pipeline"):
        idcore.IDPipeline.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="to download it give local_files_only=False"):
        idcore.IDPipeline.from_pretrained("idcore-tests/no-such-model")
    with pytest.raises(WeightsError, match="no such file; wanted an SDXL checkpoint"):
        idcore.IDPipeline.from_single_file(tmp_path / "no.safetensors", folder)
    other = saved({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not load as an SDXL checkpoint with the configuration of"):
        idcore.IDPipeline.from_single_file(other, folder)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="does not load as an SDXL pipeline"):
        idcore.IDPipeline.from_pretrained(broken)


def test_unets_that_do_not_fit_change_nothing(tmp_path):
    unet = tiny_unet("sdxl")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    wider = tiny_unet("sdxl", block_out_channels=(32, 32)).state_dict()
    fewer = {k: v for i, (k, v) in enumerate(before.items()) if i}
    for state, text in [(wider, "UNet"), (fewer, "UNet"), (unet_layout(tiny_unet("sdxl", layers_per_block=1)), "UNet")]:
        file = saved(state, tmp_path / "unet.safetensors")
        with pytest.raises(WeightsError, match=text):
            load_unet_weights(unet, file)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_a_pipeline_that_is_offloaded_layer_by_layer(folder):
    accelerate = pytest.importorskip("accelerate")
    system = TinySystem(tiny_unet("sdxl", cross_attention_dim=32 + 48), options=AttentionOptions("ortho_v2", 4, 3))
    plain = idcore.IDPipeline.from_pretrained(folder, system)
    pipe = idcore.IDPipeline.from_pretrained(folder, system)
    for part in (pipe.pipe.text_encoder, pipe.pipe.text_encoder_2, pipe.unet, pipe.pipe.vae):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    pipe = idcore.IDPipeline(pipe.pipe, system)
    how = dict(id_embeds=system.identity(), guidance_scale=2.0)
    assert torch.equal(picture(pipe, **how), picture(plain, **how))
    assert pipe("a dog", num_inference_steps=1).images[0].size == (16, 16)


def test_offloading_needs_an_accelerator():
    pipe = tiny_pipeline("sdxl")
    with pytest.raises(InputError, match="offload must be None or one of model, sequential, got 'disk'"):
        place(pipe, None, "disk")
    with pytest.raises(InputError, match='offload="model" moves weights between the CPU and an accelerator'):
        place(pipe, "cpu", "model")
    assert place(pipe, "cpu", None) is pipe and place(pipe, None, None) is pipe
    for wrong in ({"offload": "disk"}, {"offload": "model", "device": "cpu"}, {"quantize": "int3"}):
        with pytest.raises(InputError, match="offload|quantize"):  # before anything is read
            idcore.IDPipeline.from_pretrained("nowhere/nothing", **wrong)


def test_eight_bit_needs_torchao(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError("no torchao here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="needs torchao, which is not installed .* pip install torchao"):
        quantize(tiny_unet("sdxl"), "int8")
    with pytest.raises(InputError, match="quantize must be one of int8, fp8, got 'int3'"):
        quantize(tiny_unet("sdxl"), "int3")


@pytest.mark.parametrize("kind, far", [("int8", 0.03), ("fp8", 0.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_weights(folder, kind, far, dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    system = TinySystem(tiny_unet("sdxl", cross_attention_dim=32 + 48), options=AttentionOptions("ortho_v2", 4, 3))
    plain = idcore.IDPipeline.from_pretrained(folder, system, dtype=dtype)
    small = idcore.IDPipeline.from_pretrained(folder, system, dtype=dtype, quantize=kind)
    a, b = (picture(p, id_embeds=system.identity()).float() for p in (plain, small))
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < far
    linear = small.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    assert linear.weight.dtype == dtype and type(linear.weight) is not torch.nn.Parameter
