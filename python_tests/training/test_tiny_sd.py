"""tiny-sd: its parts, files, and training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from idcore.errors import InputError, WeightsError
from idcore.sampling import tiny_sd as model
from idcore.sampling.tiny_sd import FoldedPixels, TinySDConfig, make_tokenizer, names, tiny_sd
from idcore.training import checkpoint
from idcore.training.bases.opening import open_base
from idcore.training.bases.tiny_sd import TinySDBase, timesteps
from idcore.training.tiny.people import sample_person
from idcore.training.tiny.pool import TRAIN_SEED, make_pool
from idcore.training.tiny_sd.codes import codes, parameters
from idcore.training.tiny_sd.data import ONE, TWO, PeopleData, PeopleSource
from idcore.training.tiny_sd.run import TinySDTrainConfig, train_tiny_sd

SMALL = TinySDConfig(channels=(32, 32), text_layers=1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    make_pool(folder, shards=1, people=6)
    return folder


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train_tiny_sd(config(pool), out)
    return out


def config(pool, **changes):
    made = TinySDTrainConfig(pool=str(pool), shards=0, model=SMALL)
    loop = {"steps": 4, "batch": 2, "save_every": 2, "warmup": 1, "precision": "no", "validate_every": 0}
    return replace(made, loop=replace(made.loop, **{**loop, **changes}))


def test_folding_pixels_is_exact():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    vae = FoldedPixels().double()
    z = vae.encode(x).latent_dist.mode()
    assert z.shape == (2, 48, 2, 3) and torch.equal(vae.decode(z).sample, x)
    assert vae.dtype == torch.float64 and 2 ** (len(vae.config.block_out_channels) - 1) == 4


def test_the_tokenizer_reads_words():
    read = make_tokenizer(TinySDConfig())
    ids = read(["A Photo, of [V] blorb!"], padding="max_length", truncation=True).input_ids[0]
    words = read.convert_ids_to_tokens(ids)
    assert words[:7] == [model.START, "a", "photo", "of", "v", model.UNKNOWN, model.END] and len(words) == 24
    assert len(set(names())) == 512 and not set(names()) & set(model.WORDS)
    assert all(len(read(n).input_ids) == 3 and read.unk_token_id not in read(n).input_ids for n in names())


def test_codes_are_a_linear_image_of_the_people():
    """A linear fit reads every parameter of people who are not in it, so nothing of a person is lost."""
    people = [sample_person(np.random.default_rng(i)) for i in range(600)]
    made = codes(people)
    assert made.shape == (600, 128) and made.dtype == np.float32
    assert 0.7 < np.sqrt((made**2).mean()) < 1.3
    wanted = np.stack([parameters(p) for p in people])
    fit, *_ = np.linalg.lstsq(np.c_[made[:400], np.ones(400)], wanted[:400], rcond=None)
    error = np.abs(np.c_[made[400:], np.ones(200)] @ fit - wanted[400:]) / wanted.std(0)
    assert np.median(error, 0).max() < 0.05
    again = codes([dict(people[0])])
    assert np.allclose(again[0], made[0], atol=1e-5)  # a matrix product of another size
    other = dict(people[0], eye_x=people[0]["eye_x"] + 0.01)
    assert not np.allclose(codes([other])[0], made[0], atol=1e-3)
    assert len(parameters(people[0])) <= 128


def test_a_batch_says_what_it_shows(pool):
    data = PeopleData(pool)
    prompts, words, pictures, present = data.batch(0, 24)
    again = data.batch(0, 24)
    assert prompts == again[0] and torch.equal(pictures, again[2]) and torch.equal(words, again[1])
    assert pictures.shape == (24, 3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    known = codes([sample_person(np.random.default_rng(TRAIN_SEED + i)) for i in range(6)])
    for prompt, pair in zip(prompts, words):
        nearest = np.abs(known - pair.mean(0).numpy()).max(1).min()
        assert nearest < 1e-5  # one word is the person, two are on both sides of it
        assert torch.equal(pair[0], pair[1]) == (TWO not in prompt)
    blue = [p for p, text in zip(pictures, prompts) if "blue" in text and "scene" not in text]
    for picture in blue:
        corner = picture[:, :6, :6].mean((1, 2))
        assert corner[2] > corner[0] + 0.1
    assert any(p and ONE in text for p, text in zip(present, prompts)) and not all(present)
    assert any(ONE in p for p in prompts) and any(ONE not in p for p in prompts)


def test_styles_can_be_left_out_of_pictures_and_words(pool):
    plans = PeopleData(pool, without=("pencil", "oil", "cartoon"))
    prompts = " ".join(p for step in range(8) for p in plans.batch(step, 32)[0])
    assert not any(word in prompts for word in ("pencil", "sketch", "oil", "painting", "cartoon", "comic"))
    assert "night" in prompts and "sepia" in prompts
    with pytest.raises(InputError, match="some, not all, of photo, pencil, oil, cartoon, sepia, night; got crayon"):
        PeopleData(pool, without=("crayon",))


def test_the_source_is_for_one_size_of_batch(pool):
    source = PeopleSource(PeopleData(pool), 2)
    a = list(source.micro_batches(3, 0, 0, 1, 2, 2))
    b = [next(source.micro_batches(3, 0, r, 2, 2, 1)) for r in (0, 1)]
    for x, y in zip(a, b):
        assert x.prompts == y.prompts and torch.equal(x.pixels, y.pixels) and torch.equal(x.places, y.places)
    with pytest.raises(InputError, match="drawn for batch 2 and seed 0, asked for 3 and 0"):
        next(source.micro_batches(0, 0, 0, 1, 3, 1))


def test_the_recogniser_joins_late(pool, tmp_path):
    late = replace(TinySDTrainConfig().late, begin=1, share=1.0)
    train_tiny_sd(replace(config(pool, steps=2), late=late), tmp_path)
    first, second = (json.loads(line)["terms"] for line in (tmp_path / "losses.jsonl").read_text().splitlines())
    assert set(first) == {"picture"} and set(second) == {"picture", "perceptual", "identity"}
    assert second["identity"] > 0


def test_resuming_equals_not_having_stopped_bit_for_bit(pool, trained, tmp_path):
    train_tiny_sd(config(pool, stop_at=2), tmp_path)
    train_tiny_sd(config(pool), tmp_path, resume=True)
    whole, parts = (checkpoint.newest(out / "checkpoints") for out in (trained, tmp_path))
    for name in ("module", "average", "optimiser"):
        a, b = whole.tensors(name), parts.tensors(name)
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_result_is_a_base_and_a_pipeline(pool, trained):
    base = open_base(str(trained / "model"))
    assert isinstance(base, TinySDBase) and base.latent_shape(64, 64) == (48, 16, 16)
    pipe = base.pipe
    table = pipe.text_encoder.get_input_embeddings().weight
    row = pipe.tokenizer.convert_tokens_to_ids(names()[5])
    person = sample_person(np.random.default_rng(model.NAMED_SEED + 5))
    assert np.allclose(table[row].numpy(), codes([person])[0], atol=1e-3)
    made = pipe(f"a photo of {names()[5]}", num_inference_steps=4, guidance_scale=1.0, height=64, width=64)
    assert made.images[0].size == (64, 64)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = base.encode_pictures(x)
    assert torch.equal(base.decode(z), x)
    noise, u = torch.randn_like(z), torch.tensor([0.1, 0.9])
    noisy, t = base.noised(z, noise, u)
    product = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(noisy, product.sqrt() * z + (1 - product).sqrt() * noise, atol=1e-5)
    assert torch.equal(base.target(z, noise, t), z) and torch.equal(base.clean(noisy, t, z), z)


def test_most_noise_levels_are_those_of_the_sampler(trained):
    t = timesteps(torch.linspace(0, 0.99999, 1001))
    steps = open_base(str(trained / "model")).few_steps(4).times.long().tolist()
    assert list(dict.fromkeys(t[:750].tolist())) == steps
    assert (t[:750] == 999).float().mean() == pytest.approx(0.35 / 0.75, abs=0.01)
    assert t[751:].min() < 10 and t[751:].max() > 990


def test_damaged_files_are_refused(trained, tmp_path):
    with pytest.raises(WeightsError, match="has no model.safetensors; wanted a folder with"):
        tiny_sd(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((trained / "model" / name).read_bytes())
    facts = json.loads((tmp_path / "config.json").read_text())
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x55")
    with pytest.raises(WeightsError, match="is not the file of config.json"):
        tiny_sd(tmp_path)
    assert facts["kind"] == "tiny-sd" and facts["training"]["samples"] == 8


def test_the_command_line(pool, tmp_path):
    from idcore.cli import app

    run = CliRunner().invoke(app, ["train", "tiny-sd", "--print-config"])
    assert run.exit_code == 0 and "drop_text" in run.stdout
    few = ["loop.steps=1", "loop.batch=2", "loop.warmup=0", "loop.validate_every=1", f"pool={pool}", "shards=0"]
    args = ["train", "tiny-sd", "--out", str(tmp_path / "run"), *(a for c in few for a in ("--set", c))]
    run = CliRunner().invoke(app, args)
    assert run.exit_code == 0, run.output
    assert "use it with `idcore train ... --base" in run.output and "stopped" not in run.output
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "run" / "validation").rglob("people.png"))
    measures = json.loads((tmp_path / "run" / "measures.jsonl").read_text().splitlines()[-1])
    assert "right person" in json.dumps(measures)
