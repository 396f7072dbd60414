"""`idcore train sefi-ide` on tiny random Stable Diffusion and SDXL models: train, resume, save, load, generate."""

import functools
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import idcore
from idcore.attention.staged import AttentionLoss
from idcore.cli import app
from idcore.errors import InputError
from idcore.systems.sefi_files import load_tokens
from idcore.systems.sefi_ide import watching
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.contract import Step
from idcore.training.data.few import FewPictures
from idcore.training.personal.run import native_edge, photos
from idcore.training.sefi_ide.config import PersonSettings, load_config
from idcore.training.sefi_ide.counted import counted_tokens
from idcore.training.sefi_ide.run import train_sefi_ide
from idcore.training.sefi_ide.task import SeFiTask

BASES = {"sd": SD15Base, "sdxl": SDXLBase}
# The tiny tokenizer has a token for each byte, so a class word of one token is one letter.
SMALL = (
    "model.base=random", "model.dtype=float32", "person.class_word=x", "person.prompts=[a V*, V* b]", "words.heads=2",
    "words.head_dim=8", "loop.steps=2", "loop.batch=2", "loop.lr=1e-2", "loop.trackers=", "validation.faces=null",
    "validation.steps=2", "validation.prompts=[a V*]",
)  # fmt: skip


def photo(seed=0, size=40):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(size, size + 8, 3, generator=g) * 255).byte().numpy())


def base_of(kind="sd"):
    return BASES[kind](tiny_pipeline(kind), name=f"random {kind}")


def config_of(*more):
    return load_config(None, [*SMALL, *more])


def task_of(*more, kind="sd"):
    config, base = config_of(*more), base_of(kind)
    source = FewPictures([photos(config, [photo()], "sefi-ide")], native_edge(base))
    return SeFiTask(config, base), next(iter(source.micro_batches(0, 0, 0, 1, 2, 1)))


def losses_of(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_by_the_command_and_back_into_pictures(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "base")
    photo().save(tmp_path / "me.png")
    settings = [s for pair in SMALL[1:] for s in ("--set", pair)]
    command = ["train", "sefi-ide", "--base", str(tmp_path / "base"), "--images", str(tmp_path / "me.png"), "--out"]
    made = CliRunner().invoke(app, [*command, str(tmp_path / "run"), *settings], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    result = tmp_path / "run" / "model"
    assert str(result) in made.stdout and "idcore generate --base" in made.stderr
    person = load_tokens(result / "person.safetensors")
    assert person.meta["stages"] == 5 and person.meta["class_word"] == "x" and person.meta["base"].endswith("base")
    assert (result / "person.safetensors").stat().st_size < 6000 and "lambda 0.003" in (
        result / "README.md"
    ).read_text()
    assert json.loads((result / "result.json").read_text())["stages"] == 5
    draw = [
        "generate",
        "--base",
        str(tmp_path / "base"),
        "--id",
        str(result / "person.safetensors"),
        "--prompt",
        "a V*",
    ]
    draw += ["--out", str(tmp_path / "drawn"), "--width", "16", "--height", "16", "--steps", "2"]
    drawn = CliRunner().invoke(app, draw, catch_exceptions=False)
    assert drawn.exit_code == 0 and len(list((tmp_path / "drawn").glob("*.png"))) == 1

    def picture(said):
        return pipe(said, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    plain = picture("a x")
    with idcore.attach(pipe, None, person):
        assert not torch.equal(picture("a V*"), plain)
    assert torch.equal(picture("a x"), plain)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_only_the_words_learn_and_the_base_is_as_it_was(kind, tmp_path):
    base = base_of(kind)
    modules = [base.unet, base.vae, *base._encoders()]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    out = train_sefi_ide(config_of("loop.validate_every=1"), tmp_path / "run", images=[photo(), photo(1)], base=base)
    for module, was in zip(modules, before):
        assert all(torch.equal(v, was[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters()) and not module._forward_pre_hooks
    person = load_tokens(out / "person.safetensors")
    stages = person.tokens[0].unflatten(0, (5, 2))
    assert not torch.equal(stages[0, 0], stages[0, 1]) and not torch.equal(stages[0], stages[4])
    lines = losses_of(tmp_path / "run")
    assert [set(line["terms"]) for line in lines] == [{"diffusion", "attention"}] * 2
    assert lines[0]["logs"]["attention"] == 0 and lines[1]["logs"]["attention"] > 0  # training begins at the class word
    assert len(list((tmp_path / "run" / "validation").glob("step-*/person.png"))) == 3
    with pytest.raises(InputError, match="holds a finished training already; add --resume"):
        train_sefi_ide(config_of(), tmp_path / "run", images=[photo()], base=base)
    assert train_sefi_ide(config_of(), tmp_path / "run", images=[photo()], base=base, resume=True) == out


def test_stopped_and_resumed_is_the_run_in_one_piece(tmp_path):
    more = ("loop.steps=3", "loop.save_every=1", "loop.ema=0.5", "words.stages=2")
    whole = train_sefi_ide(config_of(*more), tmp_path / "a", images=[photo()], base=base_of())
    part = train_sefi_ide(config_of(*more, "loop.stop_at=1"), tmp_path / "b", images=[photo()], base=base_of())
    assert part.name == "step-00000001"
    with pytest.raises(InputError, match="pictures"):
        train_sefi_ide(config_of(*more), tmp_path / "b", images=[photo(3)], base=base_of(), resume=True)
    again = train_sefi_ide(config_of(*more), tmp_path / "b", images=[photo()], base=base_of(), resume=True)
    same = [load_file(folder / "person.safetensors") for folder in (whole, again)]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert [x["terms"] for x in losses_of(tmp_path / "a")] == [x["terms"] for x in losses_of(tmp_path / "b")]


def test_the_words_learn_what_is_in_the_photo():
    task, batch = task_of("words.dropout=0", "loss.attention=0")
    optimiser = torch.optim.Adam(task.module.parameters(), lr=5e-3)

    def mean_loss(first, count=4):
        with torch.no_grad():
            return sum(float(task.losses(batch, Step(0, first + i, 1))["diffusion"]) for i in range(count)) / count

    before = mean_loss(0)
    for i in range(12):
        optimiser.zero_grad()
        sum(task.losses(batch, Step(0, i % 4, 1)).values()).backward()
        optimiser.step()
    assert mean_loss(0) < before - 1e-3
    task.close()


@pytest.mark.parametrize("form, which", [("sum", "all"), ("mean", "prompt"), ("sum", "person")])
def test_the_attention_term_is_the_loss_between_both_prompts(form, which):
    task, batch = task_of(f"loss.attention_form={form}", f"loss.attention_tokens={which}", "loss.attention=0.5",
                          "loss.attention_layers=down_blocks")  # fmt: skip
    torch.nn.init.normal_(task.module.expanders[0].out.weight, std=0.1)
    task.module.eval()
    step, base = Step(0, 0, 1), task.base
    terms = task.losses(batch, step)
    noise = step.normal("noise", batch.places, (4, 8, 8))
    x, t = base.noised(base.encode_pictures(batch.pixels), noise, step.uniform("time", batch.places))
    text = task.text(batch, t)
    where = counted_tokens(base.pipe, batch.prompts, task.config.person, which)
    loss = AttentionLoss(base.unet, task.staged, text.embeds, layers=["down_blocks"], tokens=where, weight=0.5)
    with watching(base.unet, loss):
        base.predict(x, t, text)
    want = loss.total()
    if form == "sum":  # both layers have 64 image tokens, and the prompts as many text tokens
        want = want * 64 * (77 if where is None else int(where.sum()) / 2)
    assert torch.allclose(terms["attention"], want, rtol=1e-5) and want.item() > 0
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in task.module.parameters())
    assert task.logs()["attention"] == pytest.approx(want.item() / 0.5, rel=1e-4)
    task.close()


def test_which_tokens_count():
    pipe, person = tiny_pipeline("sd"), PersonSettings(class_word="x")
    assert counted_tokens(pipe, ["V*"], person, "all") is None
    said = counted_tokens(pipe, ["a V*", "V* b V*"], person, "person")
    assert [row.nonzero().flatten().tolist() for row in said] == [[2], [1, 3]]
    assert counted_tokens(pipe, ["a V*", "V* b V*"], person, "prompt").sum(1).tolist() == [4, 5]


@pytest.mark.parametrize("how", ["gradient_checkpointing", "compile"])
def test_checkpointing_and_compiling_change_nothing(how, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    found = []
    for on in ("false", "true"):
        task, batch = task_of(f"loop.{how}={on}", "words.dropout=0", "loss.attention=1")
        torch.manual_seed(1)
        torch.nn.init.normal_(task.module.expanders[0].out.weight, std=0.1)
        values = task.losses(batch, Step(0, 0, 1))
        sum(values.values()).backward()
        found.append(([v.item() for v in values.values()], [p.grad for p in task.module.parameters()]))
        with task.drawing():
            assert task.base.unet._compiled_call_impl is None and not task.base.unet.is_gradient_checkpointing
        task.close()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(found[0][1], found[1][1]))
    torch._dynamo.reset()


def test_settings_and_presets():
    assert load_config().model.base == "tiny-sd" and load_config().model.dtype == "float32"
    c = load_config(None, ["loop.lr=2e-4"], "some/folder", {"person": {"placeholder": "<me>"}})
    assert (c.loop.steps, c.loop.lr, c.model.dtype, c.loss.attention) == (600, 2e-4, "bfloat16", 0.003)
    assert c.texts(c.person.prompts) == ("a photo of the face of <me>",)
    assert c.texts(c.validation.prompts)[1] == "a photo of <me> in the snow"
    assert len(c.texts(["sefi-ide-edits"])) > 10 and c.texts(["sefi-ide-edits"])[0].startswith("a photo of <me>")


@pytest.mark.parametrize(
    "change, words",
    [
        ("person.prompts=a photo of her", "person.prompts must name the person by V"),
        ("person.class_word=", "class_word is empty"),
        ("person.placeholder=V x", "without blanks"),
        ("words.stages=11", "words.stages must be >= 1 and <= 10, got 11"),
        ("loss.attentoin=1", "did you mean 'loss.attention'"),
    ],
)
def test_settings_that_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        load_config(None, [change])


def test_runs_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="no photo; give --images PHOTO"):
        train_sefi_ide(config_of(), tmp_path / "a", base=base_of())
    with pytest.raises(InputError, match="takes one position and the class word 'person' 6"):
        train_sefi_ide(config_of("person.class_word=person"), tmp_path / "b", images=[photo()], base=base_of())
    with pytest.raises(InputError, match="multiples of 4, got 18x18"):
        train_sefi_ide(config_of("model.resolution=18"), tmp_path / "c", images=[photo()], base=base_of())
    made = CliRunner().invoke(app, ["train", "sefi-ide", "--out", str(tmp_path / "d")])
    assert "train sefi-ide: --images PHOTO is missing" in str(made.exception)


def test_accumulating_equals_one_larger_batch_with_dropout_on(tmp_path):
    """What dropout leaves out hangs on the step, not on how the batch is divided."""
    found = []
    for name, batch, accumulate in (("one", 2, 1), ("two", 1, 2)):
        config = config_of(f"loop.batch={batch}", f"loop.accumulate={accumulate}", "words.dropout=0.5")
        train_sefi_ide(config, tmp_path / name, images=[photo()], base=base_of())
        lines = [json.loads(x) for x in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        found.append([x["terms"] for x in lines])
    for a, b in zip(*found):
        assert a == pytest.approx(b, rel=1e-4)
