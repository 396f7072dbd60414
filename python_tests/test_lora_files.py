"""LoRA files: three layouts that mean the same, diffusers' own loader as judge, merged weights as truth, refusals."""

import json

import pytest
import torch
from torch import nn

from idcore import lora_files
from idcore.errors import InputError, WeightsError
from idcore.lora_files import Layer, Lora, read_lora, to_state, write_lora
from idcore.lora_names import from_kohya, to_kohya
from idcore.systems.lora import load_lora
from idcore.testing.tiny_models import tiny_inputs, tiny_pipeline

KINDS = {"sd": "sd15", "sdxl": "sdxl"}
PARTS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.0.proj", "net.2", "conv1", "conv_shortcut", "time_emb_proj",
    "downsamplers.0.conv", "upsamplers.0.conv", "q_proj", "v_proj", "out_proj", "fc1",
)  # fmt: skip


def random_lora(pipe, seed=0, dtype=torch.float32, mixed=True):
    """Of every layer kind; ranks 2 and 4, alpha 1 to 6; else rank 4 and alpha 2."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(pipe, component, nn.Module()).named_modules():
            if not path.endswith(PARTS) or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            out, inside, *kernel = module.weight.shape
            rank, alpha = ((2, 4)[len(layers) % 2], 1 + len(layers) % 6) if mixed else (4, 2)
            down = torch.randn(rank, inside, *kernel, generator=g) * 0.3
            up = torch.randn(out, rank, *([1] * len(kernel)), generator=g) * 0.3
            path = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
            layers[component, path] = Layer(down.to(dtype), up.to(dtype), float(alpha))
    return Lora(layers)


def module_of(pipe, component, path):
    model = getattr(pipe, component)
    return model.get_submodule(path if hasattr(model, "text_model") else path.removeprefix("text_model."))


@torch.no_grad()
def results(pipe, kind):
    """The UNet's and the text encoders' answers to fixed inputs."""
    words = torch.arange(77)[None] % 500
    found = [pipe.unet(**tiny_inputs(kind)).sample, pipe.text_encoder(words).last_hidden_state]
    return found + ([pipe.text_encoder_2(words).text_embeds] if kind == "sdxl" else [])


def merged(kind, lora):
    """Truth: the change added to the weights."""
    pipe = tiny_pipeline(kind)
    for (component, path), layer in lora.layers.items():
        weight = module_of(pipe, component, path).weight
        change = layer.up.flatten(1) @ layer.down.flatten(1)
        weight.data += layer.alpha / layer.down.shape[0] * change.reshape(weight.shape)
    return results(pipe, kind)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_both_layouts_and_so_do_we(kind, mixed, tmp_path):
    pipe = tiny_pipeline(kind)
    lora, plain = random_lora(pipe, mixed=mixed), results(pipe, kind)
    truth = merged(kind, lora)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(truth, plain))
    for layout in ("kohya", "diffusers"):
        path = write_lora(lora, tmp_path / f"{layout}.safetensors", layout, family=KINDS[kind])
        if layout == "diffusers" or not mixed:  # diffusers 0.42 drops alphas of attention where they differ
            theirs = tiny_pipeline(kind)
            theirs.load_lora_weights(str(tmp_path), weight_name=path.name, local_files_only=True)
            for a, b in zip(results(theirs, kind), truth):
                torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
        with load_lora(pipe, path) as handle:
            for a, b in zip(results(pipe, kind), truth):
                torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
            handle.scale(0.0)
            for a, b in zip(results(pipe, kind), plain):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(results(pipe, kind), plain))


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_comes_back_to_the_bit(kind, tmp_path):
    lora = random_lora(tiny_pipeline(kind), dtype=torch.float16)
    path = write_lora(lora, tmp_path / "k.safetensors", "kohya", family=KINDS[kind])
    again = read_lora(path)
    assert again.layout == "kohya" and again.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        other = again.layers[name]
        assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up) and layer.alpha == other.alpha
    assert again.metadata["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize("kind", KINDS)
def test_all_layouts_mean_the_same_change(kind, tmp_path):
    lora = random_lora(tiny_pipeline(kind))
    for layout in lora_files.LAYOUTS:
        out = write_lora(lora, tmp_path / layout, layout, family=KINDS[kind])
        folders = sorted(out.iterdir()) if layout == "peft" else [out]
        again = {k: v for folder in folders for k, v in read_lora(folder).layers.items()}
        assert again.keys() == lora.layers.keys() == read_lora(out).layers.keys()
        for name, layer in lora.layers.items():
            a, b = (x.strength * (x.up.flatten(1) @ x.down.flatten(1)) for x in (layer, again[name]))
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_peft_itself_loads_the_folder(tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd")
    lora = random_lora(pipe)
    lora.layers = {k: v for k, v in lora.layers.items() if k[0] == "unet"}
    truth = merged("sd", lora)[0]
    folder = write_lora(lora, tmp_path / "peft", "peft") / "unet"
    model = PeftModel.from_pretrained(pipe.unet, folder)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs("sd")).sample, truth, atol=2e-4, rtol=1e-4)


def test_what_diffusers_saves_is_read_with_its_strength(tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = tiny_pipeline("sd")
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config, adapter_name="a")
    state = get_peft_model_state_dict(pipe.unet, adapter_name="a")
    facts = pipe.unet.peft_config["a"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=facts)
    lora = read_lora(tmp_path)
    assert lora.layout == "diffusers" and {layer.strength for layer in lora.layers.values()} == {2.5}
    want = results(pipe, "sd")[0]
    with load_lora(tiny_pipeline("sd"), tmp_path) as handle:
        (unet,) = handle._models
        with torch.no_grad():
            torch.testing.assert_close(unet(**tiny_inputs("sd")).sample, want, atol=1e-5, rtol=1e-5)


def test_rank_stabilised_strength_and_patterns():
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}, "use_rslora": True}
    flat = json.dumps({f"unet.{k}": v for k, v in config.items()})
    tensors = {}
    for name in ("attn1.to_q", "attn2.to_q"):
        tensors[f"unet.mid_block.{name}.lora_A.weight"] = torch.ones(4, 6)
        tensors[f"unet.mid_block.{name}.lora_B.weight"] = torch.ones(5, 4)
    found = lora_files._parse(tensors, {"lora_adapter_metadata": flat}, {}, "x").layers
    assert found["unet", "mid_block.attn1.to_q"].strength == pytest.approx(2 / 4**0.5)
    assert found["unet", "mid_block.attn2.to_q"].strength == pytest.approx(8 / 4**0.5)


def test_old_diffusers_names():
    tensors = {}
    for name in ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
                 "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"):  # fmt: skip
        tensors |= {f"{name}.down.weight": torch.ones(2, 3), f"{name}.up.weight": torch.ones(3, 2)}
    assert list(read_lora(tensors).layers) == [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
    ]


@pytest.mark.parametrize(
    ("kohya", "path"),
    [  # names of published SDXL files
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q",
         "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("middle_block_1_transformer_blocks_9_ff_net_0_proj",
         "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"),
        ("output_blocks_2_1_transformer_blocks_3_attn2_to_out_0",
         "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_7_0_in_layers_2", "down_blocks.2.resnets.0.conv1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
    ],
)  # fmt: skip
def test_names_of_the_original_unet(kohya, path):
    assert from_kohya(f"lora_unet_{kohya}") == ("unet", path)
    assert to_kohya("unet", path, sdxl=True) == f"lora_unet_{kohya}"
    assert from_kohya(to_kohya("unet", path, sdxl=False)) == ("unet", path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_whole_unet_has_a_name_of_its_own(kind):
    from diffusers import UNet2DConditionModel

    from idcore.bench.unets import sdxl_shapes

    with torch.device("meta"):
        unet = sdxl_shapes() if kind == "sdxl" else UNet2DConditionModel(cross_attention_dim=768)
    paths = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    names = {to_kohya("unet", p, sdxl=kind == "sdxl"): p for p in paths}
    assert len(names) == len(paths) > 250
    assert all(from_kohya(n) == ("unet", p) for n, p in names.items())


def test_the_family_is_told_by_the_text_width():
    def one(width, component="unet", path="mid_block.attentions.0.transformer_blocks.0.attn2.to_k"):
        return Lora({(component, path): Layer(torch.ones(2, width), torch.ones(4, 2), 2.0)})

    assert [one(w).family() for w in (768, 1024, 2048, 32)] == ["sd15", "sd21", "sdxl", ""]
    assert one(768, "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1").family() == "sdxl"
    with pytest.raises(InputError, match="does not tell its own .* give family, one of sd15, sd21, sdxl"):
        to_state(one(32), "kohya")
    with pytest.raises(InputError, match='layout must be "kohya" or "diffusers", got \'x\''):
        to_state(one(32), "x")


GOOD = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": (2, 3)}, "is no LoRA of kohya, diffusers or peft: its first key is 'a.weight'"),
        ({f"{GOOD}.dora_scale": (1, 3)}, "makes it DoRA .*only plain LoRA is read"),
        ({f"{GOOD}.hada_w1_a": (1, 3)}, "makes it LoHa"),
        ({f"{GOOD}.lokr_w1": (1, 3)}, "makes it LoKr"),
        ({f"{GOOD}.lora_mid.weight": (1, 3)}, "makes it LoCon with a middle tensor"),
        ({"unet.a.lora_magnitude_vector": (3,), "unet.a.lora_A.weight": (1, 3)}, "makes it DoRA"),
        ({f"{GOOD}.lora_down.weight": (2, 3)}, "has no up matrix; the file is damaged or not whole"),
        ({f"{GOOD}.lora_down.weight": (2, 3), f"{GOOD}.lora_up.weight": (4, 3)}, r"\[2, 3\] and \[4, 3\]; wanted"),
        ({f"{GOOD}.lora_left.weight": (2, 3)}, "is no part of a LoRA layer"),
        ({"lora_unet_input_blocks_4_0_nothing.alpha": ()}, "no layer of a residual block"),
        ({"lora_te3_encoder.alpha": (), f"{GOOD}.alpha": ()}, "of no UNet or CLIP text encoder .*FLUX"),
    ],
)
def test_what_is_refused(tensors, said):
    with pytest.raises(WeightsError, match=said):
        read_lora({k: torch.ones(s) for k, s in tensors.items()})


def test_peft_without_its_configuration_or_with_dora(tmp_path):
    lora = Lora({("unet", "mid_block.attentions.0.proj_in"): Layer(torch.ones(2, 3), torch.ones(3, 2), 2.0)})
    folder = write_lora(lora, tmp_path, "peft") / "unet"
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(WeightsError, match="use_dora; only plain LoRA is read"):
        read_lora(folder)
    config.unlink()
    with pytest.raises(WeightsError, match="peft's weights and no adapter_config.json, which says how strong"):
        read_lora(folder)


def test_another_model_is_refused_before_anything_is_touched():
    lora = random_lora(tiny_pipeline("sdxl"))
    pipe = tiny_pipeline("sd")
    with pytest.raises(WeightsError, match="layers do not fit this pipeline: .*use the base model"):
        load_lora(pipe, lora)
    assert not getattr(pipe.unet, "peft_config", {})
    with pytest.raises(InputError, match="wanted a pipeline of diffusers or an IDPipeline, got Linear"):
        load_lora(nn.Linear(2, 2), lora)
    with pytest.raises(InputError, match="scale must be a finite number, got nan"):
        load_lora(pipe, lora, scale=float("nan"))


def test_two_loras_act_together_and_one_name_is_one():
    pipe = tiny_pipeline("sd")
    first, second = random_lora(pipe, 1), random_lora(pipe, 2)
    plain = results(pipe, "sd")
    with load_lora(pipe, first, name="a") as a, load_lora(pipe, second, name="b"):
        both = results(pipe, "sd")
        with pytest.raises(InputError, match="an adapter 'a' already"):
            load_lora(pipe, first, name="a")
        a.remove()
        alone = results(pipe, "sd")
    assert not torch.allclose(both[0], alone[0], atol=1e-3)
    for x, y in zip(alone, merged("sd", second)):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(results(pipe, "sd"), plain))
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_convert_on_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from idcore import cli, weights

    lora = random_lora(tiny_pipeline("sd"), mixed=False)
    first = write_lora(lora, tmp_path / "k.safetensors", "kohya", family="sd15")
    assert (weights.describe(first).layout, weights.describe(first).version) == ("lora", "kohya")

    def run(*args):
        return CliRunner().invoke(cli.app, ["convert", *map(str, args)])

    done = run(first, "--out", tmp_path / "d.safetensors")
    assert done.exit_code == 0 and "written in the layout of diffusers" in done.output
    assert run(tmp_path / "d.safetensors", "--out", tmp_path / "p", "--layout", "peft").exit_code == 0
    back = run(tmp_path / "p", "--out", tmp_path / "k2.safetensors", "--layout", "kohya", "--family", "sd15")
    assert back.exit_code == 0 and read_lora(tmp_path / "k2.safetensors").layers.keys() == lora.layers.keys()
    untold = run(tmp_path / "p", "--out", tmp_path / "k3.safetensors")
    assert isinstance(untold.exception, InputError) and "give family" in str(untold.exception)
    wrong = run(first, "--out", tmp_path / "x.safetensors", "--layout", "pulid")
    assert "is a LoRA; layout must be one of kohya, diffusers, peft, got 'pulid'" in str(wrong.exception)
    from idcore.files import write_safetensors

    other = write_safetensors(tmp_path / "other.safetensors", {"a": torch.ones(1)})
    assert "is no LoRA" in str(run(other, "--out", tmp_path / "x.safetensors", "--layout", "kohya").exception)
