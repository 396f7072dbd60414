"""`idcore augment` on pipelines in Stable Diffusion's and SDXL's layout; its drawer and its judges; what it refuses."""

import json

import numpy as np
import pytest
import torch
from augment_cases import ColourAnalyzer, PaintBase
from PIL import Image
from typer.testing import CliRunner

from idcore.cli import app
from idcore.errors import IdcoreError, InputError
from idcore.metrics.similarity import Similarity
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.augment.draw import Drawer, own_size
from idcore.training.augment.judge import ClipJudge, FaceJudge, NoTextJudge
from idcore.training.augment.options import AugmentConfig, Prompt
from idcore.training.augment.setup import NamedModels, content_hash
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase


class Lenient(ColourAnalyzer):
    """Random pictures are grey: all of them are one person."""

    measure = Similarity("l2", 9.0, "colour", "this test")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders by kind."""
    found = {}
    for kind in ("sd", "sdxl"):
        found[kind] = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind).save_pretrained(found[kind])
    return found


@pytest.fixture()
def lists(tmp_path):
    (tmp_path / "names.txt").write_text("Ada\nBea\n")
    (tmp_path / "prompts.txt").write_text("{person} as a nurse\na painting of {person}\n")
    return ["--names", str(tmp_path / "names.txt"), "--prompts", str(tmp_path / "prompts.txt")]


def run(*arguments):
    return CliRunner().invoke(app, ["augment", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_command_draws_on_both_layouts(pipelines, lists, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("idcore.encoders.analyzer.analyzer_from", lambda spec: Lenient())
    out = tmp_path / "out"
    line = ["--out", out, "--base", pipelines[kind], *lists, "--text", "none", "--set", "steps=2", "--set", "size=16"]
    line += ["--set", "guidance=3", "--set", "source_tries=2", "--set", "sampler=dpmpp_2m"]
    done = run(*line)
    assert done.exit_code == 0, done.output
    rows = [json.loads(row) for row in (out / "index.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 and all(r["text"] is None and r["size"] == [16, 16] for r in rows)
    assert "8 pairs of 2 people; examples:" in done.output and (out / "examples.png").is_file()
    again = run(*line)
    assert again.exit_code == 0 and "2 used, 2 stood already" in again.output
    other = run(*line, "--set", "steps=3")
    assert isinstance(other.exception, InputError) and "other settings: steps = 2, now 3" in str(other.exception)


@pytest.mark.parametrize("kind, cls", [("sd", SD15Base), ("sdxl", SDXLBase)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_drawer_draws_what_diffusers_draws(kind, cls, guidance):
    pipe = tiny_pipeline(kind)
    base = cls(pipe)
    drawer = Drawer(base, AugmentConfig(size=16, steps=3, guidance=guidance, negative="", batch=2))
    prompts, seeds = ["a face", "two", "three words here"], [5, 6, 7]
    found = drawer(prompts, seeds)
    for prompt, seed, ours in zip(prompts, seeds, found):
        noise = torch.randn(1, *drawer.shape, generator=torch.Generator().manual_seed(seed))
        options = {"negative_prompt": ""} if guidance > 1 else {}
        theirs = pipe(
            prompt, num_inference_steps=3, guidance_scale=guidance, latents=noise, height=16, width=16, **options
        ).images[0]
        away = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
        assert away.max() <= 1 and np.asarray(ours).std() > 1


def test_the_base_says_its_size():
    assert own_size(SD15Base(tiny_pipeline("sd"))) == 16
    assert Drawer(PaintBase(), AugmentConfig()).size == 32
    base = PaintBase()
    base.unet = None
    with pytest.raises(InputError, match="does not say its own size \\(None\\); set size, in pixels"):
        own_size(base)
    base = PaintBase()
    base.nan = True
    with pytest.raises(IdcoreError, match="paint drew NaN or infinity"):
        Drawer(base, AugmentConfig(size=32))(["ada"], [1])


def test_small_pictures_are_enlarged_and_faces_told_in_their_own_pixels():
    judge = FaceJudge(ColourAnalyzer(), AugmentConfig())
    small = judge.look(Image.new("RGB", (32, 32), (200, 90, 90)))
    large = judge.look(Image.new("RGB", (512, 512), (200, 90, 90)))
    assert np.allclose((small.box + 0.5) * 16 - 0.5, large.box, atol=16)
    assert small.box[2] < 32 and large.box[2] == 511 and np.allclose(small.embedding, large.embedding)


def test_faces_that_do_not_count_have_a_reason():
    class Two(ColourAnalyzer):
        def detect(self, image):
            return super().detect(image) * 2

    grey = Image.new("RGB", (64, 64), "gray")
    assert FaceJudge(Two(), AugmentConfig()).look(grey)[0] == "several faces"
    assert FaceJudge(Two(), AugmentConfig(several="largest")).look(grey).score == 0.99
    assert FaceJudge(ColourAnalyzer(), AugmentConfig()).look(Image.new("RGB", (64, 64)))[0] == "no face"

    class Small(ColourAnalyzer):
        def detect(self, image):
            (face,) = super().detect(image)
            face.box = face.box / 16
            return [face]

    assert FaceJudge(Small(), AugmentConfig()).look(grey) == (
        "face too small", "0.4% of the picture; wanted 2.0% (min_face)"
    )  # fmt: skip


def test_a_similarity_is_larger_where_people_are_alike():
    class Cosine(ColourAnalyzer):
        measure = Similarity("cosine", 0.9, "colour", "this test")

    judge = FaceJudge(Cosine(), AugmentConfig())
    assert judge.same(np.array([0.95, 0.5])).tolist() == [True, False]
    assert judge.best_first(np.array([0.1, 0.9, 0.5])).tolist() == [1, 2, 0]
    assert FaceJudge(Cosine(), AugmentConfig(identity=0.4)).same(np.array([0.5])).all()
    near = FaceJudge(ColourAnalyzer(), AugmentConfig())
    assert near.same(np.array([0.05, 0.5])).tolist() == [True, False]
    assert near.best_first(np.array([0.1, 0.9, 0.5])).tolist() == [0, 2, 1]


def test_clip_reads_the_class_word_in_the_place_of_the_name():
    class Clip:
        key, words, asked = "clip:x", "CLIP x", []

        def text(self, prompts):
            self.asked += prompts
            return np.array([[3.0, 0.0] if "red" in p else [0.0, 2.0] for p in prompts])

        def __call__(self, pictures):
            return np.array([[p.getpixel((0, 0))[0], p.getpixel((0, 0))[1]] for p in pictures], float)

    judge = ClipJudge(Clip(), "man")
    red, green = Image.new("RGB", (4, 4), (200, 0, 0)), Image.new("RGB", (4, 4), (0, 90, 0))
    prompts = [Prompt("{person} in red"), Prompt("{person} in green"), Prompt("{person} in red")]
    assert judge.scores([red, red, green], prompts) == pytest.approx([1.0, 0.0, 0.0])
    judge.scores([red], prompts[:1])
    assert judge.clip.asked == ["man in red", "man in green"]  # each once
    assert NoTextJudge().scores([red], prompts[:1]) == [None]


def test_drawn_attributes_are_those_that_the_prompt_names():
    from idcore.metrics.drawn_attributes import drawn_photo
    from idcore.training.augment.judge import DrawnJudge

    picture = drawn_photo(6_400_000, background="blue", style="photo")
    asked = [{"background": "blue"}, {"background": "red", "style": "photo"}, {"kind": "other"}]
    prompts = [Prompt("{person}", labels) for labels in asked]
    assert DrawnJudge().scores([picture] * 3, prompts) == [1.0, 0.5, None]


def test_other_models_are_another_data_set(pipelines, tmp_path):
    sd, sdxl = (NamedModels(str(pipelines[k]), text="none").fingerprint() for k in ("sd", "sdxl"))
    assert sd["base"] != sdxl["base"] and {k: v for k, v in sd.items() if k != "base"} == {
        k: v for k, v in sdxl.items() if k != "base"
    }
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1" * 100)
    first = content_hash(file)
    file.write_bytes(b"1" * 99 + b"2")
    assert content_hash(file) != first
    with pytest.raises(InputError, match="augment: there is no .*gone"):
        content_hash(tmp_path / "gone")


def test_what_is_missing_is_said(pipelines, lists, tmp_path):
    def refused(*arguments):
        done = run(*arguments)
        assert isinstance(done.exception, InputError), done.output
        return str(done.exception)

    out = ["--out", tmp_path / "out"]
    assert "--out FOLDER is missing" in refused()
    assert "--names FILE and --prompts FILE are missing" in refused(*out, "--base", pipelines["sd"])
    here = [*out, "--base", pipelines["sd"], *lists]
    assert "give --clip FOLDER" in refused(*here) and "leave it out with --text none" in refused(*here)
    assert "clip None" in refused(*here, "--text", "clip") or "give --clip" in refused(*here, "--text", "clip")
    assert "by clip, drawn, none, got 'blip'" in refused(*here, "--text", "blip")
    assert "add --ray local" in refused(*here, "--workers", 2)
    assert "float32, float16 or bfloat16, got 'int8'" in refused(*here, "--text", "none", "--dtype", "int8")
    assert "do not say {person}" in refused(*here, "--text", "none", "--source-prompt", "a photo")
    assert "unknown key 'stepz'; did you mean 'steps'?" in refused(*here, "--text", "none", "--set", "stepz=3")
    assert "got nobody/model" in refused(*out, *lists, "--base", "nobody/model", "--text", "none")
    assert not (tmp_path / "out").exists()


def test_nothing_kept_is_an_error_with_the_place_of_the_reasons(pipelines, lists, tmp_path):
    out = tmp_path / "out"
    done = run(
        "--out", out, "--base", pipelines["sd"], *lists, "--text", "none", "--set", "size=16", "--set", "steps=1"
    )
    assert isinstance(done.exception, InputError) and "no pair was kept of 2 names; reasons in" in str(done.exception)
    drops = [json.loads(row) for row in (out / "dropped.jsonl").read_text().splitlines()]
    assert [d["reason"] for d in drops if d["what"] == "Ada"] == ["no source"]


def test_settings_are_printed_with_their_sources():
    said = run("--print-config", "--set", "steps=20")
    assert said.exit_code == 0 and "steps: 20" in said.output and "our choice" in said.output
