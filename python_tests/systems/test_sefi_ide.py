"""SeFi-IDE: a pair of words per stage; whole pictures against diffusers with naive attention, files, no trace."""

import copy

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sefi_naive import WIDTHS, drawn, naive_pictures
from typer.testing import CliRunner

import idcore
from idcore.attention.staged import StagedText
from idcore.cli import app
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.systems.loading import load_system
from idcore.systems.sefi_files import load_tokens, save_tokens
from idcore.systems.sefi_ide import SeFiIDE, staged_unet
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_ip_adapter, tiny_pipeline, tiny_unet


def person(kind="sd", stages=5, seed=1, **meta):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 2 * stages, sum(WIDTHS[kind]), generator=g) * 0.05
    meta = {"stages": stages, "widths": list(WIDTHS[kind]), "class_word": "x"} | meta
    return Identity(tokens, None, "sefi-ide", meta)


def near(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize(
    "kind, stages, guidance, count", [("sd", 5, 3.0, 1), ("sdxl", 5, 3.0, 2), ("sd", 3, 1.0, 1), ("sdxl", 10, 1.0, 1)]
)
def test_pictures_equal_the_paper_written_out(kind, stages, guidance, count):
    me = person(kind, stages)
    how = dict(steps=6, guidance=guidance, count=count)
    truth = naive_pictures(kind, {"V*": me.tokens}, "a photo of V* as a nurse", "bad", stages=stages, **how)
    pipe = tiny_pipeline(kind).to(torch.float64)
    with idcore.attach(pipe, SeFiIDE(), me):
        exact = drawn(pipe, "a photo of V* as a nurse", "bad", **how)
    assert torch.allclose(exact, truth, rtol=1e-9, atol=1e-9)
    usual = tiny_pipeline(kind)
    with idcore.attach(usual, None, me):
        made = drawn(usual, "a photo of V* as a nurse", "bad", **how)
    assert (made - truth).abs().max() < 2e-4 * truth.abs().max()
    plain = drawn(usual, "a photo of x as a nurse", "bad", **how)
    assert (plain - truth).abs().max() > 1e-2, "the words matter here"


def test_two_people_and_a_person_in_the_negative_prompt():
    a, b = person(seed=1), person(seed=2)
    prompt, negative = "V* and B*'s cat", "B*"
    truth = naive_pictures("sd", {"V*": a.tokens, "B*": b.tokens}, prompt, negative, stages=5, steps=5, guidance=2.0)
    pipe = tiny_pipeline().to(torch.float64)
    with idcore.attach(pipe, None, [a, b], placeholder=["V*", "B*"]) as handle:
        assert torch.allclose(drawn(pipe, prompt, negative, guidance=2.0), truth, rtol=1e-9, atol=1e-9)
        assert repr(handle) == "SeFiHandle(V*, B*, 5 stages, attached)"


def test_beside_an_identity_in_the_attention_and_words_of_the_prompt():
    me = person("sdxl")
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    system = TinySystem(pipe.unet)
    other = system.identity(uncond=False)
    sites = {s.name: s for s in system.sites(pipe.unet)}
    add = lambda name: system.project(sites[name], other.tokens)  # noqa: E731
    truth = naive_pictures("sdxl", {"V*": me.tokens}, "a V*", stages=5, steps=4, guidance=1.0, add=add)
    with idcore.attach(pipe, system, other), idcore.attach(pipe, None, me):
        assert torch.allclose(drawn(pipe, "a V*", steps=4, guidance=1.0), truth, rtol=1e-8, atol=1e-8)
    with idcore.attach(pipe, None, me), idcore.attach(pipe, system, other):
        assert torch.allclose(drawn(pipe, "a V*", steps=4, guidance=1.0), truth, rtol=1e-8, atol=1e-8)
        words = Identity(torch.ones(1, 2, 64) * 0.02, None, "words")
        with idcore.attach(pipe, None, words):
            assert (drawn(pipe, "a V* and S*", steps=4, guidance=1.0) - truth).abs().max() > 1e-4


@pytest.mark.parametrize("stages", range(1, 11))
def test_the_stage_of_a_timestep_is_prospects_index(stages):
    staged = StagedText([], 8, stages)
    for t in (torch.arange(1000), torch.linspace(0, 999, 777), 999, torch.tensor(0.0)):
        staged.begin(t, torch.device("cpu"))
        wanted = [int(float(x) * stages / 1000) for x in torch.as_tensor(t, dtype=torch.float64).reshape(-1)]
        assert staged.stage.tolist() == wanted and staged.stage.dtype == torch.int32


def test_limits_of_ones_own():
    staged = StagedText([], 8, 3, limits=[100, 900])
    staged.begin(torch.tensor([99, 100, 899, 900]), torch.device("cpu"))
    assert staged.stage.tolist() == [0, 1, 1, 2]
    with pytest.raises(InputError, match="3 stages need 2 rising limits between 0 and 1000"):
        StagedText([], 8, 3, limits=[900, 100])
    with pytest.raises(InputError, match="whole number from 1 to 10, got 11"):
        StagedText([], 8, 11)


def test_texts_keys_and_values_are_projected_once_for_all_steps(monkeypatch):
    pipe, calls = tiny_pipeline(), []
    layers = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    with idcore.attach(pipe, None, person()):
        handles = [
            part.register_forward_hook(lambda m, a, o: calls.append(tuple(a[0].shape)))
            for layer in layers
            for part in (layer.to_q,)
        ]
        seen = []
        real = torch.nn.functional.linear
        monkeypatch.setattr(
            torch.nn.functional, "linear", lambda x, w, b=None: seen.append(tuple(x.shape)) or real(x, w, b)
        )
        drawn(pipe, "a V*", steps=7)
        for h in handles:
            h.remove()
    assert len(calls) == 7 * len(layers)
    assert sum(shape == (5, 2, 77, 32) for shape in seen) == 2 * len(layers)


def test_no_trace_remains_plain_prompts_are_untouched_and_any_order_detaches():
    pipe = tiny_pipeline("sdxl")
    processors = dict(pipe.unet.attn_processors)
    before = drawn(pipe, "a photo of x")
    system = TinySystem(pipe.unet)
    first = idcore.attach(pipe, None, person("sdxl"))
    assert torch.equal(drawn(pipe, "a photo of x"), before)
    second = idcore.attach(pipe, system, system.identity())
    third = idcore.attach(pipe, None, Identity(torch.ones(1, 1, 64), None, "words"), placeholder="S*")
    first.scale(0)
    second.scale(0)
    assert torch.equal(drawn(pipe, "a photo of V*"), before), "scale 0 reads the class word"
    first.detach()
    first.detach()
    assert torch.equal(drawn(pipe, "a photo of x"), before)
    second.detach()
    third.detach()
    assert pipe.unet.attn_processors == processors and "encode_prompt" not in pipe.__dict__
    assert not pipe.unet._forward_pre_hooks and torch.equal(drawn(pipe, "a photo of x"), before)


def test_detach_finds_people_in_prompts_and_in_the_attention():
    pipe = tiny_pipeline("sd")
    system = TinySystem(pipe.unet)
    before = [type(pipe.tokenizer), set(pipe.__dict__), set(pipe.unet._forward_pre_hooks)]
    idcore.attach(pipe, system, system.identity())
    idcore.attach(pipe, None, person())
    idcore.attach(pipe, None, Identity(torch.zeros(1, 2, 32), None, "words"), placeholder="W*")
    assert idcore.detach(pipe) == 3
    assert [type(pipe.tokenizer), set(pipe.__dict__), set(pipe.unet._forward_pre_hooks)] == before
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    assert idcore.detach(pipe) == 0


def test_text_encoded_before_and_handed_in():
    pipe = tiny_pipeline()
    with idcore.attach(pipe, None, person()), torch.no_grad():
        wanted = drawn(pipe, "a V*", guidance=2.0)
        text, none = pipe.encode_prompt("a V*", "cpu", 1, True)
        assert text.shape == none.shape == (1, 77, 11 * 32)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
        how = dict(num_inference_steps=5, guidance_scale=2.0, height=16, width=16, latents=noise, output_type="latent")
        assert near(pipe(prompt_embeds=text, negative_prompt_embeds=none, **how).images, wanted)
        assert near(pipe(prompt_embeds=text, **how).images, wanted), "a plain negative prompt serves all stages"
    with pytest.raises(RuntimeError):
        pipe(prompt_embeds=text, negative_prompt_embeds=none, **how)


def test_ip_adapter_and_lora_beside():
    from peft import LoraConfig

    pipe = tiny_pipeline()
    pipe.load_ip_adapter(tiny_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    picture = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    how = dict(guidance=2.0, ip_adapter_image_embeds=[picture])
    same = person(seed=3)
    one = same.tokens[:, :1].expand(-1, 10, -1)
    with idcore.attach(pipe, None, Identity(one, None, "sefi-ide", same.meta)):
        by_stages = drawn(pipe, "a V*", **how)
    with idcore.attach(pipe, None, Identity(one[:, :1], None, "words"), placeholder="V*"):
        assert near(drawn(pipe, "a V*", **how), by_stages), "ten equal words are one word"
    lora = tiny_pipeline()
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    truth = copy.deepcopy(lora)
    with idcore.attach(lora, None, Identity(one, None, "sefi-ide", same.meta)):
        got = drawn(lora, "a V*")
    with idcore.attach(truth, None, Identity(one[:, :1], None, "words"), placeholder="V*"):
        assert near(drawn(truth, "a V*"), got)


def test_controlnet_reads_the_reference_prompt():
    import diffusers

    unet = tiny_unet()
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)).eval()
    for p in net.controlnet_mid_block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pipe = tiny_pipeline(cls=diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=net)
    seen = []
    net.register_forward_hook(lambda m, a, kw, o: seen.append(kw["encoder_hidden_states"]), with_kwargs=True)
    with idcore.attach(pipe, None, person()):
        drawn(pipe, "a V*", image=torch.rand(1, 3, 16, 16))
        assert seen[0].shape[-1] == 32 and torch.equal(seen[0][1:], pipe.encode_prompt("a x", "cpu", 1, False)[0])
    assert len(net._forward_pre_hooks) == 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_files_are_small_documented_and_read_by_diffusers(tmp_path, kind):
    me = person(kind, base="some base", placeholder="V*")
    path = save_tokens(tmp_path / "me.safetensors", me)
    back = load_tokens(path)
    assert torch.equal(back.tokens, me.tokens) and back.meta == me.meta and back.system == "sefi-ide"
    state = load_file(path)
    assert {k: tuple(v.shape) for k, v in state.items()} == (
        {"V*": (10, 32)} if kind == "sd" else {"clip_l": (10, 32), "clip_g": (10, 32)}
    )
    assert path.stat().st_size < 10 * sum(WIDTHS[kind]) * 4 + 500
    half = load_tokens(save_tokens(tmp_path / "half.safetensors", me, torch.float16))
    assert torch.allclose(half.tokens, me.tokens, rtol=1e-3, atol=1e-6)
    if kind == "sd":
        theirs, ours = tiny_pipeline(), tiny_pipeline()
        theirs.load_textual_inversion(path)
        with idcore.attach(ours, None, Identity(me.tokens[:, 3:4], None, "words"), placeholder="V*"), torch.no_grad():
            wanted = ours.encode_prompt("a V*", "cpu", 1, False)[0]
            # the fourth word: stage 1, value
            ids = theirs.tokenizer("a <>", add_special_tokens=False)["input_ids"][:1]
            ids = [512, *ids, theirs.tokenizer.convert_tokens_to_ids("V*_3"), 513]
            got = theirs.text_encoder(torch.tensor([ids + [513] * (77 - len(ids))]))[0]
            assert torch.equal(got, wanted)


def test_errors_say_what_to_do(tmp_path):
    pipe, me = tiny_pipeline(), person()
    with idcore.attach(pipe, None, me):
        with pytest.raises(InputError, match="attach several people at once, as a list"):
            idcore.attach(pipe, None, person(seed=2), placeholder="B*")
        assert pipe.tokenizer("B*")["input_ids"] == tiny_pipeline().tokenizer("B*")["input_ids"], "nothing of it stays"
        with pytest.raises(InputError, match="reads text of width 32, or 11 times that for 5 stages"):
            pipe.unet(**tiny_inputs() | {"encoder_hidden_states": torch.zeros(2, 77, 64)})
    with pytest.raises(InputError, match="width 32, this pipeline's text encoders have 32 \\+ 32"):
        idcore.attach(tiny_pipeline("sdxl"), None, me)
    with pytest.raises(InputError, match="does not take id_mask"):
        idcore.attach(pipe, None, me, id_mask="left")
    with pytest.raises(InputError, match=r"as many stages, got \[5, 3\]"):
        idcore.attach(pipe, None, [me, person(stages=3)], placeholder=["A*", "B*"])
    with pytest.raises(InputError, match=r"wanted a person of \[1, 2 S, E\] words for S = 4 stages, got \[1, 10, 32\]"):
        idcore.attach(pipe, None, Identity(me.tokens, None, "sefi-ide", me.meta | {"stages": 4}))
    with pytest.raises(InputError, match="must be one of its own"):
        idcore.attach(pipe, SeFiIDE(), Identity(me.tokens, None, "words"))
    with pytest.raises(InputError, match="act or do not: 1, or 0"):
        idcore.attach(pipe, None, me, id_scale=0.3)
    from safetensors.torch import save_file

    save_file({"V*": me.tokens[0]}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no stage tokens of SeFi-IDE"):
        load_tokens(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is a person of SeFi-IDE, which is trained from photos"):
        load_system(save_tokens(tmp_path / "me.safetensors", me))

    class Strange:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return hidden_states

    unet = tiny_unet()
    unet.set_attn_processor(Strange())
    with pytest.raises(InputError, match="holds Strange, which staged text"), staged_unet(unet):
        pass
    assert all(type(p) is Strange for p in unet.attn_processors.values()) and not unet._forward_pre_hooks


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_command_line_draws_with_a_persons_file(tmp_path, kind):
    run = CliRunner()
    me = save_tokens(tmp_path / "me.safetensors", person(kind))
    tiny_pipeline(kind).save_pretrained(tmp_path / "base")

    def draw(name, *more, prompt="a photo of V* as a nurse"):
        out = tmp_path / name
        done = run.invoke(app, ["generate", "--prompt", prompt, "--out", str(out), "--base", str(tmp_path / "base"),
                                "--width", "16", "--height", "16", "--steps", "3", *more])  # fmt: skip
        return done, sorted(Image.open(p).tobytes() for p in out.glob("*.png"))

    first = draw("a", "--system", "sefi-ide", "--weights", str(me))
    assert first[0].exit_code == 0 and len(first[1]) == 1, first[0].exception
    assert draw("b", "--id", str(me))[1] == first[1]
    assert draw("c", prompt="a photo of x as a nurse")[1] != first[1]
    assert draw("d", "--id", str(me), "--id-scale", "0")[1] == draw("e", prompt="a photo of x as a nurse")[1]
    wrong = draw("f", "--id", str(me), prompt="a nurse")[0]
    assert "which does not say V*" in str(wrong.exception)
    torch.save({}, tmp_path / "y.safetensors")
    assert isinstance(draw("g", "--system", "sefi-ide", "--weights", str(tmp_path / "y.safetensors"))[0].exception,
                      WeightsError)  # fmt: skip
