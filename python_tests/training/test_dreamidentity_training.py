"""DreamIdentity's training: two sources, the loss, two steps on SD's and SDXL's layouts, save, load, draw; errors."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_augment import job
from test_face_vit_training import no_more_people, pool  # noqa: F401 (fixtures)
from typer.testing import CliRunner

import idcore
from idcore.cli import app
from idcore.demo import PHOTO
from idcore.encoders.face_vit import FaceViT, FaceViTConfig
from idcore.errors import InputError, WeightsError
from idcore.files import write_safetensors
from idcore.results import read_result
from idcore.systems.dreamidentity import DreamIdentity, words_penalty
from idcore.systems.loading import load_system
from idcore.systems.words import encode_with_words
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.augment.run import augment
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.contract import Step
from idcore.training.dreamidentity.ablation import ARMS, report
from idcore.training.dreamidentity.config import DreamIdentityTrainConfig, load_config
from idcore.training.dreamidentity.data import open_data
from idcore.training.dreamidentity.run import new_system, train_dreamidentity, vit_of
from idcore.training.dreamidentity.task import DreamIdentityTask
from idcore.training.face_vit.data import drawn_exam
from idcore.training.face_vit.task import identification
from idcore.training.tiny.pool import write_shard

VIT = FaceViTConfig(image_size=16, patch_size=8, width=32, depth=4, heads=2, mlp_dim=48, id_dim=6)
BASES = {"sd": SD15Base, "sdxl": SDXLBase}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A face ViT, names that the tiny tokenizer knows as one token each, and pairs."""
    folder = tmp_path_factory.mktemp("dream")
    torch.manual_seed(0)
    about = {"heads": "2", "template": "head"}
    write_safetensors(folder / "vit.safetensors", FaceViT(VIT).state_dict(), about)
    (folder / "names.txt").write_text("a b c\nd e\n")
    augment(["ada", "bea", "cy"], folder / "pairs", job(), progress=False)
    return folder


def changes(files, pool, *more):  # noqa: F811
    return [
        f"encoder.vit={files / 'vit.safetensors'}", f"encoder.names={files / 'names.txt'}", "encoder.hidden=12",
        f"people.drawn_folder={pool}", "people.drawn=8", "model.resolution=16", "loop.steps=2", "loop.batch=4",
        "loop.warmup=0", "loop.lr=0.01", "loop.ema=0.5", "loop.trackers=", "loop.validate_every=0", *more,
    ]  # fmt: skip


def config_of(files, pool, *more):  # noqa: F811
    return load_config(None, changes(files, pool, *more), "tiny-sd")


def base_of(kind):
    return BASES[kind](tiny_pipeline(kind), name=kind)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_steps_then_saved_loaded_and_drawn(files, pool, tmp_path, kind):  # noqa: F811
    base, config = base_of(kind), config_of(files, pool)
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    model = train_dreamidentity(config, "drawn", files / "pairs", tmp_path / "run", base=base)
    assert (
        read_result(model).system == "dreamidentity" and "50% self-augmented pairs" in (model / "README.md").read_text()
    )
    lines = [json.loads(t) for t in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert {"reconstruction", "editability", "largest_word"} <= set(lines[0]["logs"])
    assert all(torch.equal(before[k], v) for k, v in base.unet.state_dict().items()), "the model is as it was"
    start, made = new_system(config, base), DreamIdentity.from_weights(model / "dreamidentity.safetensors")
    assert made.config == start.config and made.config.template == "head" and made.config.taps == (1, 2, 3, 4)
    moved = [k for k, v in made.state_dict().items() if not torch.equal(v, start.state_dict()[k])]
    assert {"vit.blocks.0.attn.qkv.weight", "heads.0.fc1.weight", "heads.1.fc2.weight"} <= set(moved)
    assert not {"name_mean", "name_std"} & set(moved)
    me = load_system(model / "dreamidentity.safetensors").encode(PHOTO)
    pipe = tiny_pipeline(kind)

    def draw():
        return torch.as_tensor(pipe("S* as nurse", num_inference_steps=2, height=16, width=16, output_type="np",
                                    generator=torch.Generator().manual_seed(0)).images)  # fmt: skip

    with idcore.attach(pipe, None, me):
        mine = draw()
    assert mine.isfinite().all() and not torch.equal(mine, draw())


def naive_loss(task, batch, step):
    """Sample by sample: the prompt with its own words, the model's prediction against its target, mean square."""
    base, config, total = task.base, task.config, 0.0
    words = task.module(batch.face["crop"])
    for i, place in enumerate(batch.places.tolist()):
        own = tuple(w[i : i + 1] for w in words.split(list(task.module.config.widths), -1))
        text, pooled = encode_with_words(base.pipe, [batch.prompts[i]], {config.people.placeholder: own})
        clean = base.encode_pictures(batch.pixels[i : i + 1])
        noise = torch.randn(clean.shape[1:], generator=step.generator("noise", place))[None]
        u = torch.rand((), generator=step.generator("time", place))[None]
        x, t = base.noised(clean, noise, u)
        given = base._conditions(text, pooled, 16, 16, None)
        total = total + (base.predict(x, t, given) - base.target(clean, noise, t)).square().mean()
    return total / len(batch), words


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_loss_and_its_gradient_are_those_of_each_sample_alone(files, pool, tmp_path, kind):  # noqa: F811
    base, config = base_of(kind), config_of(files, pool, "loss.penalty=0.01")
    task = DreamIdentityTask(new_system(config, base), config, base)
    source, _ = open_data("drawn", files / "pairs", tmp_path, config, task.module.config, print)
    batch, step = next(source.micro_batches(1, 3, 0, 1, 4, 1)), Step(3, 1, 2)
    batch.sizes = None
    assert sorted(batch.extra["group"].tolist()) == [0, 0, 1, 1]
    terms = task.losses(batch, step)
    sum(terms.values()).backward()
    got = {k: p.grad.clone() for k, p in task.module.named_parameters()}
    task.module.zero_grad()
    truth, words = naive_loss(task, batch, step)
    assert terms["diffusion"].item() == pytest.approx(truth.item(), rel=1e-5)
    assert terms["penalty"].item() == pytest.approx(words_penalty(words).item(), rel=1e-5)
    (truth + words_penalty(words)).backward()
    for k, p in task.module.named_parameters():
        assert torch.allclose(got[k], p.grad, atol=2e-5 * max(1.0, float(p.grad.abs().max()))), k
    logs = task.logs()
    assert (logs["reconstruction"] + logs["editability"]) / 2 == pytest.approx(terms["diffusion"].item(), rel=1e-5)


def test_reconstruction_asks_for_the_face_itself_and_pairs_for_the_edit(files, pool, tmp_path):  # noqa: F811
    config = config_of(files, pool)
    sizes = new_system(config, base_of("sd")).config
    source, _ = open_data("drawn", files / "pairs", tmp_path, config, sizes, print)
    batch = next(source.micro_batches(0, 0, 0, 1, 4, 1))
    for group, prompt, picture, crop in zip(
        batch.extra["group"].tolist(), batch.prompts, batch.pixels, batch.face["crop"]
    ):
        same = float((picture - crop).abs().mean())
        if group == 0:
            assert prompt == "A photo of S*" and same < 0.15, "the face that is read is the one that is drawn"
        else:
            assert prompt in ("S* on the left", "S* on the right", "S* as a painting") and same > 0.15
    one, _ = open_data("drawn", None, tmp_path, replace_share(config, 0.0), sizes, print)
    assert next(one.micro_batches(0, 0, 0, 1, 4, 1)).extra["group"].tolist() == [0] * 4
    two, _ = open_data(None, files / "pairs", tmp_path, replace_share(config, 1.0), sizes, print)
    assert len(two) == 18 and all("S*" in p for p in next(two.micro_batches(0, 0, 0, 1, 4, 1)).prompts)


def replace_share(config, share):
    return replace(config, people=replace(config.people, editability=share))


def test_the_mlps_alone_leave_the_vit_as_it_was(files, pool, tmp_path):  # noqa: F811
    base, config = base_of("sd"), config_of(files, pool, "encoder.trains=heads", "people.editability=0")
    model = train_dreamidentity(config, "drawn", None, tmp_path / "run", base=base)
    made, start = DreamIdentity.from_weights(model / "dreamidentity.safetensors"), new_system(config, base)
    for k, v in made.vit.state_dict().items():
        assert torch.allclose(v, start.vit.state_dict()[k], rtol=1e-6), k
    assert not torch.equal(made.heads[0].fc2.weight, start.heads[0].fc2.weight)


def test_a_resumed_run_has_the_losses_that_it_would_have_had(files, pool, tmp_path):  # noqa: F811
    more = ("loop.steps=3", "people.editability=0")
    train_dreamidentity(config_of(files, pool, *more), "drawn", None, tmp_path / "a", base=base_of("sd"))
    stopped = config_of(files, pool, *more, "loop.stop_at=1")
    train_dreamidentity(stopped, "drawn", None, tmp_path / "b", base=base_of("sd"))
    train_dreamidentity(config_of(files, pool, *more), "drawn", None, tmp_path / "b", base=base_of("sd"), resume=True)
    a, b = (DreamIdentity.from_weights(tmp_path / n / "model/dreamidentity.safetensors").state_dict() for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_validation_draws_people_whom_the_training_does_not_have(files, pool, tmp_path):  # noqa: F811
    more = ("loop.validate_every=2", "validation.count=1", "people.editability=0", "validation.steps=1")
    base, config = base_of("sd"), config_of(files, pool, *more)
    train_dreamidentity(config, "drawn", None, tmp_path / "run", base=base)
    assert list((tmp_path / "run/validation").glob("step-00000002/people.png"))
    line = json.loads((tmp_path / "run/measures.jsonl").read_text().splitlines()[-1])
    assert "face/found" in line["measures"]
    assert (
        "S*" not in base.pipe.tokenizer.get_vocab() and type(base.pipe.tokenizer).__mro__[1].__name__ != "_KnowsWords"
    )


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_command_line_trains_and_draws(files, pool, tmp_path, kind):  # noqa: F811
    tiny_pipeline(kind).save_pretrained(tmp_path / "base")
    sets = [a for s in changes(files, pool, "model.dtype=float32") for a in ("--set", s)]
    train = ["train", "dreamidentity", "--base", str(tmp_path / "base"), "--data", "drawn", "--pairs",
             str(files / "pairs"), "--editability", "0.25", "--out", str(tmp_path / "run"), *sets]  # fmt: skip
    result = CliRunner().invoke(app, train)
    assert result.exit_code == 0, result.output
    model = tmp_path / "run/model"
    assert str(model) in result.stdout and "25% self-augmented" in (model / "README.md").read_text()
    drawn = CliRunner().invoke(app, [
        "generate", "--system", str(model), "--base", str(tmp_path / "base"), "--id", str(PHOTO), "--prompt",
        "a photo of S*", "--steps", "1", "--width", "16", "--height", "16", "--out", str(tmp_path / "pictures"),
    ])  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_the_shipped_vit_tells_people_apart_whom_it_never_saw(tmp_path):
    write_shard(tmp_path, 20, people=12)  # its training saw the first four shards of 500
    vit, cut = vit_of(load_config())
    assert cut == "head" and vit.config.image_size == 64 and vit.config.id_dim == 128
    exam = drawn_exam(tmp_path, 0, 12, 64, cut)
    with torch.no_grad():
        seen = torch.cat([vit(b.face["crop"])[0] for b in exam])
    made = identification(seen, torch.cat([b.extra["person"] for b in exam]))
    assert made["rank1"] > 0.8 and made["same"] > made["different"] + 0.5


def test_defaults_and_settings():
    c = DreamIdentityTrainConfig()
    assert (c.encoder.words, c.people.editability, c.loss.penalty, c.encoder.adain) == (2, 0.5, 0.01, True)
    assert c.reconstruction() == ("A photo of S*",)
    small = load_config(None, ["people.placeholder=V*", "validation.prompts=a photo of V*"])
    assert small.loss.penalty == 0, "its words are far larger than CLIP's"
    assert small.model.resolution == 64 and small.reconstruction() == ("A photo of V*",)


def test_errors_say_what_to_do(files, pool, tmp_path):  # noqa: F811
    config, base = config_of(files, pool), base_of("sd")
    with pytest.raises(InputError, match=r"editability=0.5 needs pairs \(--pairs FOLDER.*set the share to 0"):
        train_dreamidentity(config, "drawn", None, tmp_path, base=base)
    with pytest.raises(InputError, match=r"needs faces \(--data FOLDER\); give them, or set the share to 1"):
        train_dreamidentity(config, None, files / "pairs", tmp_path, base=base)
    with pytest.raises(InputError, match=r"must hold the placeholder S\*, 'a face' does not"):
        config_of(files, pool, "validation.prompts=a face")
    with pytest.raises(InputError, match="data.latents must be false"):
        config_of(files, pool, "data.latents=true")
    with pytest.raises(InputError, match="loop.compile"):
        train_dreamidentity(config_of(files, pool, "loop.compile=true"), "drawn", None, tmp_path, base=base)
    new_system(config, base).save(tmp_path / "d.safetensors")
    other = config_of(files, pool, f"init={tmp_path / 'd.safetensors'}")
    with pytest.raises(WeightsError, match=r"makes words of widths \(32,\), this base has \(32, 32\)"):
        new_system(other, base_of("sdxl"))
    task = DreamIdentityTask(new_system(other, base), other, base)
    source, _ = open_data("drawn", files / "pairs", tmp_path, config, task.module.config, print)
    batch = next(source.micro_batches(0, 0, 0, 1, 4, 1))
    batch.prompts[2] = "a house"
    with pytest.raises(InputError, match=r"must hold the placeholder S\*, 'a house'"):
        task.losses(batch, Step(0, 0, 1))
    with pytest.raises(InputError, match="no landmarks of faces"):
        list(source.sources[0].__class__(_NoFaces(), 16).micro_batches(0, 0, 0, 1, 1, 1))


def test_the_ablation_s_page_holds_both_arms_and_their_spread(tmp_path):
    rows = [
        {"seed": s, "run": name, "distance": 0.5 + 0.1 * s, "rank1": 0.0, "adherence": 0.75, "seconds": None}
        for name in ARMS for s in (0, 1)
    ]  # fmt: skip
    for name in ARMS:
        folder = tmp_path / "runs/seed0" / name.replace(" ", "-")
        folder.mkdir(parents=True)
        Image.new("RGB", (128, 512), "red").save(folder / "drawn.png")
    results, page, picture = report(tmp_path / "runs", rows, tmp_path / "docs")
    text = page.read_text()
    assert text.count("| 0.550 ± 0.050 | 0.000 ± 0.000 | – | 0.750 ± 0.000 |") == 2 and "faces and pairs" in text
    assert json.loads(results.read_text())["runs"] == rows
    assert Image.open(picture).size == (128, 2 * (256 + 16))


class _NoFaces:
    def __len__(self):
        return 1

    def micro_batches(self, *place):
        from idcore.training.contract import Batch

        yield Batch(["x"], torch.zeros(1, dtype=torch.int64), [""], pixels=torch.zeros(1, 3, 8, 8))
