"""The command line on the embedded model and on a tiny random SDXL folder; bad inputs end with one clear text."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from typer.testing import CliRunner

from idcore import cli
from idcore.attach import attach
from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.files import file_hash, write_safetensors
from idcore.generating import GenerateRequest, generate_pictures
from idcore.identity import Identity
from idcore.sampling.loading import unet_shapes
from idcore.sampling.sdxl import few_step_scheduler
from idcore.sampling.tiny_pipeline import TinyPipeline
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import tiny_pipeline
from idcore.workflows import encode_photos


@pytest.fixture(scope="module")
def photo():
    from pathlib import Path

    import idcore

    return Path(idcore.__file__).parent / "assets/photos/astronaut.png"


def run(*args):
    """Exit status, standard output and the error text, as `idcore ...` would give them."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    text = str(result.exception) if isinstance(result.exception, IdcoreError) else ""
    return result.exit_code, result.stdout, text or result.output


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A saved tiny random SDXL, PuLID weights that fit it, and an identity of one person."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = tiny_pipeline("sdxl")
    pipe.save_pretrained(folder / "base")
    encoder = EncoderConfig("v1", output_dim=32)
    torch.manual_seed(0)
    system = PuLID(PuLIDConfig.for_unet(pipe.unet, encoder))
    system.save(folder / "pulid.safetensors")
    tokens = torch.randn(1, 10, 32) * 3
    Identity(tokens, torch.zeros(1, 10, 32), system.name, {}).save(folder / "me.safetensors")
    return folder


def pictures(paths):
    return [np.asarray(Image.open(p)) for p in paths]


def test_generate_with_the_embedded_model(tmp_path, photo):
    status, out, error = run("encode", photo, "--out", tmp_path / "me.safetensors")
    assert status == 0, error
    args = ("generate", "--prompt", "a photo of a person, blue background", "--count", 3, "--seed", 5)
    status, out, error = run(*args, "--id", tmp_path / "me.safetensors", "--out", tmp_path / "a")
    assert status == 0, error
    assert [line.rsplit("/", 1)[1] for line in out.split()] == ["000_seed5.png", "001_seed6.png", "002_seed7.png"]
    status, out2, error = run(*args[:-4], "--count", 1, "--seed", 6, "--id", photo, "--out", tmp_path / "b")
    assert status == 0, error
    a, b = pictures(out.split())[1], pictures(out2.split())[0]
    assert np.abs(a.astype(int) - b).max() <= 1, "same seed, same picture, whatever the batch"
    info = json.loads((tmp_path / "b" / "generate.json").read_text())
    assert len(info["similarity"]["values"]) == 1 and "same recogniser" in info["similarity"]["measure"].lower()


def request(sdxl, out, **over):
    values = dict(
        prompt="a person",
        out=out,
        id=sdxl / "me.safetensors",
        base=str(sdxl / "base"),
        weights=sdxl / "pulid.safetensors",
        width=16,
        height=16,
    )
    return GenerateRequest(**{**values, **over})


def test_generate_uses_the_model_of_the_folder_that_it_is_given(tmp_path):
    pipe = TinyPipeline.from_package()
    with torch.no_grad():
        for p in pipe.model.unet.parameters():
            p.mul_(1.05)
    pipe.save(tmp_path / "model")
    args = ("generate", "--prompt", "a photo of a person", "--seed", 3)
    made = [
        run(*args, "--base", base, "--out", tmp_path / f"p{i}") for i, base in enumerate(["tiny", tmp_path / "model"])
    ]
    assert [m[0] for m in made] == [0, 0], made
    shipped, own = (pictures(m[1].split())[0] for m in made)
    assert not np.array_equal(shipped, own)


def test_encode_takes_a_folder_says_which_face_and_makes_the_folder_of_its_result(tmp_path, photo):
    alone = Image.open(photo).convert("RGB")
    both = Image.new("RGB", (alone.width * 2, alone.height))
    both.paste(alone, (0, 0))
    both.paste(alone.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (alone.width, 0))
    (tmp_path / "me ü").mkdir()
    both.save(tmp_path / "me ü" / "both.jpg")
    alone.save(tmp_path / "me ü" / "one.PNG")
    out = tmp_path / "a/b/m.safetensors"
    result = CliRunner().invoke(cli.app, ["encode", str(tmp_path / "me ü"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("2 faces in a photo, the largest is taken: ") == 1 and "--choose" in result.stderr
    assert "2 photos" in result.stderr and not result.stdout
    assert Identity.load(out).system == "tiny"


def test_what_was_drawn_stays_when_the_rest_is_stopped(tmp_path, monkeypatch, capsys):
    """Each picture is written when it is there; Ctrl-C says how to get the others, and they are the same pictures."""
    from idcore.sampling.tiny_sd import tiny_sd

    drawn = type(tiny_sd()).__call__
    calls = []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return drawn(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny_sd()), "__call__", stopped)
    args = ["generate", "--base", "tiny-sd", "--prompt", "a photo of a person", "--steps", "1", "--out"]
    monkeypatch.setattr("sys.argv", ["idcore", *args, str(tmp_path / "a"), "--seed", "5", "--count", "4"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    said = capsys.readouterr().err
    assert f"2 of 4 pictures are in {tmp_path / 'a'}; the others: --seed 7 --count 2" in said, said
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["000_seed5.png", "001_seed6.png"]
    status, out, error = run(*args, tmp_path / "b", "--seed", 5, "--count", 2)
    assert status == 0, error
    assert all(np.array_equal(*pictures([p, tmp_path / "a" / p.name])) for p in sorted((tmp_path / "b").glob("*.png")))


def test_what_does_nothing_is_said(tmp_path):
    args = ("--base", "tiny-sd", "--negative", "blurry", "--preset", "style", "--steps", "1", "--out", str(tmp_path))
    result = CliRunner().invoke(cli.app, ["generate", "--prompt", "a person", *args])
    assert result.exit_code == 0, result.output
    assert "--preset: not used, since no --id" in result.stderr
    assert "--negative: not used at --guidance 1" in result.stderr


def test_mix_writes_a_weighted_mean(tmp_path):
    a, b = (Identity(torch.full((1, 2, 3), v), None, "tiny", {}) for v in (1.0, 5.0))
    a.save(tmp_path / "a.safetensors")
    b.save(tmp_path / "b.safetensors")
    files, out = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "ab.safetensors"
    assert run("mix", *files, "--weights", "3,1", "--out", out)[0] == 0
    assert torch.equal(Identity.load(out).tokens, torch.full((1, 2, 3), 2.0))
    assert run("mix", *files, "--out", out)[0] == 0
    assert torch.equal(Identity.load(out).tokens, torch.full((1, 2, 3), 3.0))
    assert 'weights must be numbers such as "0.7,0.3"' in run("mix", *files, "--weights", "3;1", "--out", out)[2]
    assert "wanted 2 finite weights" in run("mix", *files, "--weights", "1", "--out", out)[2]
    assert "at least two identities" in run("mix", files[0], "--out", out)[2]


def test_generate_with_an_sdxl_folder_and_pulid(sdxl, tmp_path):
    with_id = pictures(generate_pictures(request(sdxl, tmp_path / "a", count=2, seed=3)))
    again = pictures(generate_pictures(request(sdxl, tmp_path / "b", seed=4)))
    without = pictures(generate_pictures(request(sdxl, tmp_path / "c", seed=4, id_scale=0.0)))
    plain = pictures(generate_pictures(request(sdxl, tmp_path / "d", seed=4, id=None)))
    assert np.array_equal(with_id[1], again[0]), "the same seed gives the same picture whatever the count"
    assert np.array_equal(without[0], plain[0]), "id_scale 0 is not attached"
    assert not np.array_equal(again[0], plain[0]), "the identity has an influence"


def test_an_sdxl_base_draws_what_diffusers_draws(sdxl, tmp_path):
    me, system = Identity.load(sdxl / "me.safetensors"), PuLID.from_weights(sdxl / "pulid.safetensors")
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl / "base", add_watermarker=False)
    own = pipe.scheduler
    for steps in (3, 9):
        pipe.scheduler = few_step_scheduler(own.config) if steps <= 8 else own
        with attach(pipe, system, me, id_scale=0.7, id_guidance_end=0.5):
            wanted = pipe(
                "a person", negative_prompt="bad", num_inference_steps=steps, guidance_scale=2.0, width=16, height=16,
                generator=torch.Generator().manual_seed(3),
            ).images[0]  # fmt: skip
        over = dict(steps=steps, seed=3, guidance=2.0, negative="bad", id_scale=0.7, id_end=0.5)
        (path,) = generate_pictures(request(sdxl, tmp_path / str(steps), **over))
        made = Image.open(path)
        assert np.array_equal(np.asarray(made), np.asarray(wanted))
    assert made.text["prompt"] == "a person" and made.text["seed"] == "3" and made.text["id_scale"] == "0.7"
    assert made.text["identity_sha256"] == file_hash(sdxl / "me.safetensors") and "me" not in made.text["base"]
    assert json.loads((path.parent / "generate.json").read_text())["request"]["id"].endswith("me.safetensors")


def test_two_people_in_regions_by_layout_or_masks(sdxl, tmp_path):
    other = tmp_path / "other.safetensors"
    me = Identity.load(sdxl / "me.safetensors")
    Identity(-me.tokens, me.uncond_tokens, me.system, {}).save(other)
    ids = ("--id", sdxl / "me.safetensors", "--id", other)
    sides = []
    for i in range(2):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, 32 * i : 32 * i + 32] = 255
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
        sides += ["--mask", tmp_path / f"{i}.png"]

    def draw(name, *more):
        status, out, error = run(
            "generate", "--prompt", "people", "--out", tmp_path / name, "--base", sdxl / "base", "--weights",
            sdxl / "pulid.safetensors", "--width", 16, "--height", 16, "--steps", 2, *more,
        )  # fmt: skip
        return pictures(out.split())[0] if status == 0 else error

    by_masks = draw("a", *ids, *sides)
    assert np.array_equal(by_masks, draw("b", *ids, "--layout", "left, right"))
    assert not np.array_equal(by_masks, draw("c", *ids))
    assert "give --layout or --mask, not both" in draw("d", *ids, *sides, "--layout", "1 1")
    assert "say where people act, and --id gives none" in draw("e", *sides)
    assert 'base "tiny" draws one person everywhere' in run(
        "generate", "--prompt", "x", "--out", tmp_path, *ids, "--layout", "1 1"
    )[2]  # fmt: skip


def test_lightning_files_and_options_that_sd15_lacks(sdxl, tmp_path):
    unet = tiny_pipeline("sdxl").unet
    for p in unet.parameters():
        p.data.mul_(1.1)
    write_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), {})
    plain = pictures(generate_pictures(request(sdxl, tmp_path / "a")))[0]
    euler = pictures(generate_pictures(request(sdxl, tmp_path / "b", sampler="lightning-euler")))[0]
    other = pictures(generate_pictures(request(sdxl, tmp_path / "c", unet_weights=tmp_path / "unet.safetensors")))[0]
    assert not np.array_equal(plain, euler) and not np.array_equal(plain, other)
    tiny_pipeline("sd").save_pretrained(tmp_path / "sd")
    with pytest.raises(InputError, match="sampler, runner work with SDXL bases, .* is SD 1.x or 2.x; leave them out"):
        generate_pictures(request(sdxl, tmp_path / "d", base=str(tmp_path / "sd"), sampler="own", runner="graph"))
    with pytest.raises(InputError, match='runner="graph" records a CUDA graph and the UNet is on cpu'):
        generate_pictures(request(sdxl, tmp_path / "e", runner="graph"))


def test_an_identity_with_its_bank_needs_no_weights(sdxl, tmp_path, photo):
    me, system = Identity.load(sdxl / "me.safetensors"), PuLID.from_weights(sdxl / "pulid.safetensors")
    me.with_bank(system, unet_shapes(sdxl / "base"), torch.float32).save(tmp_path / "banked.safetensors")
    with_weights = pictures(generate_pictures(request(sdxl, tmp_path / "a")))[0]
    alone = pictures(generate_pictures(request(sdxl, tmp_path / "b", id=tmp_path / "banked.safetensors", weights=None)))
    assert np.abs(with_weights.astype(int) - alone[0]).max() <= 1
    with pytest.raises(WeightsError, match="no unet/config.json; wanted a folder with a base model"):
        unet_shapes(tmp_path)
    with pytest.raises(InputError, match="--bank keeps keys and values of an adapter; the embedded model has none"):
        encode_photos([photo], bank=sdxl / "base")


def test_presets_differ(sdxl, tmp_path):
    a = pictures(generate_pictures(request(sdxl, tmp_path / "a", preset="fidelity")))
    b = pictures(generate_pictures(request(sdxl, tmp_path / "b", preset="style")))
    assert not np.array_equal(a[0], b[0])


@pytest.mark.parametrize(
    "args, text",
    [
        (("generate", "--prompt", " ", "--out", "{tmp}"), "the prompt is empty"),
        (("generate", "--prompt", "x", "--out", "{tmp}", "--base", "{tmp}/none"), "has no model_index.json"),
        (("generate", "--prompt", "x", "--out", "{tmp}", "--id", "{tmp}/none.png"), "none.png"),
        (("generate", "--prompt", "x", "--out", "{tmp}", "--system", "pulid"), 'base "tiny" works with system "tiny"'),
        (("generate", "--prompt", "x", "--out", "/proc/none"), "cannot write into /proc/none"),
        (("encode", "{tmp}/none.png", "--out", "{tmp}/a.safetensors"), "none.png"),
        (("encode", "{photo}", "--system", "pulid", "--out", "{tmp}/a.safetensors"), "needs its adapter weights"),
        (
            ("encode", "{photo}", "--system", "magic", "--out", "{tmp}/a.safetensors"),
            'system must be "tiny" (embedded model), "auto", pulid',
        ),
        (("convert", "{tmp}/none.bin", "--out", "{tmp}/a.safetensors"), "none.bin"),
        (("encode", "{grey}", "--out", "{tmp}/a.safetensors"), "No face was found"),
        (("demo", "--photo", "{grey}", "--out", "{tmp}/d"), "No face was found in {tmp}/grey.png"),
        (("demo", "--out", "/proc/none"), "cannot write into /proc/none"),
        (
            ("encode", "{photo}", "--weights", "pulid.safetensors", "--out", "{tmp}/a.safetensors"),
            "say whose the files are",
        ),
        (
            (
                "generate",
                "--prompt",
                "x",
                "--out",
                "{tmp}",
                "--guidance",
                5,
                "--negative",
                "y",
                "--width",
                128,
                "--sampler",
                "own",
                "--weights",
                "a.safetensors",
                "--preset",
                "style",
            ),
            '--negative, --guidance, --width, --weights, --sampler, --preset: base "tiny"',
        ),
        (("generate", "--prompt", "x", "--out", "{tmp}", "--like", "{photo}"), "--like gives a photo per --id"),
        (("generate", "--prompt", "x", "--out", "{tmp}", "--base", "tiny-sd", "--id", "{photo}"), "train sefi-ide"),
        (("encode", "{photo}", "--out", "{tmp}/me.png"), "ends in .safetensors, such as me.safetensors"),
        (("encode", "{photo}", "--out", "{tmp}/dir.safetensors"), "is a folder; wanted a file, such as"),
        (("encode", "{tmp}/dir.safetensors", "--out", "{tmp}/a.safetensors"), "is a folder without pictures"),
        (("encode", "{grey}", "--out", "/proc/none/a.safetensors"), "cannot write into /proc/none"),
        (
            ("generate", "--prompt", "x", "--out", "{tmp}/g", "--id", "{photo}", "--like", "{grey}"),
            "No face was found in {tmp}/grey.png",
        ),
        (("generate", "--prompt", "x", "--out", "{tmp}/g", "--seed", 2**63 - 1), "--seed plus --count is"),
        (
            ("generate", "--prompt", "x", "--out", "{tmp}/g", "--guidance", "nan"),
            "--guidance is a number from 0 to 100",
        ),
        (
            ("generate", "--prompt", "x", "--out", "{tmp}/g", "--preset", "old"),
            "--preset must be one of fidelity, style",
        ),
        (("prepare",), "idcore prepare PHOTOS --out data"),
        (("draw", "{tmp}/d", "--size", 8), "'--size'"),
        (("generate", "--prompt", "x", "--out", "{tmp}/g", "--base", "tiny-sd", "--width", 100_000), "'--width'"),
        (("stylise", "{photo}", "--prompt", "x", "--out", "{tmp}/g", "--long-side", 100_000), "'--long-side'"),
        (("evaluate", "--out", "{tmp}/g", "--people", "{photo}", "--height", 0), "'--height'"),
        (("bench", "nothing"), "invalid choice: 'nothing'"),
        (("fetch", "--bundle", "{tmp}/x.tar"), "a bundle needs at least one recipe"),
        (("ui", "--base", "/nope"), "/nope does not exist; wanted a folder with an SDXL pipeline"),
        (("ui", "--port", 99999), "Invalid value for '--port'"),
    ],
)
def test_bad_input_is_one_clear_text(args, text, tmp_path, photo):
    grey = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), (128, 128, 128)).save(grey)
    (tmp_path / "dir.safetensors").mkdir()
    status, _, error = run(*(str(a).format(tmp=tmp_path, photo=photo, grey=grey) for a in args))
    assert status in (1, 2) and text.format(tmp=tmp_path) in error, error


def test_what_the_embedded_model_does_not_know_is_said(tmp_path, photo):
    run("encode", photo, "--out", tmp_path / "me.safetensors")
    args = ("generate", "--prompt", "a photo of an elephant, blue background", "--id", tmp_path / "me.safetensors")
    status, _, error = run(*args, "--like", photo, "--out", tmp_path / "a")
    assert status == 0, error
    lines = error.splitlines()
    assert any(x.startswith("the embedded model never learned: elephant. It draws heads") for x in lines), lines
    assert any(x.startswith("astronaut.png: mean distance 0.") for x in lines), lines
    status, _, error = run(*args, "--base", "tiny-sd", "--out", tmp_path / "b")
    assert status == 1 and "drawn by --base tiny alone" in error


def test_an_identity_of_another_system_is_refused(sdxl, tmp_path):
    with pytest.raises(IdcoreError, match="made by the system 'pulid-v1'"):
        generate_pictures(GenerateRequest(prompt="x", out=tmp_path, id=sdxl / "me.safetensors"))


def test_help_names_every_command():
    status, out, _ = run("--help")
    assert status == 0
    for name in ("demo", "encode", "generate", "convert", "train", "env"):
        assert name in out


def test_version():
    assert run("--version") == (0, "idcore 0.1.0\n", "idcore 0.1.0\n")


def test_main_prints_the_error_and_no_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["idcore", "encode", str(tmp_path / "none.png"), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and "Traceback" not in error


@pytest.mark.slow
def test_train_tiny_resumes_and_its_model_generates(tmp_path, photo):
    args = ("train", "tiny", "--out", tmp_path / "run", "--people", 500, "--batch", 2, "--recogniser-from", 99)
    status, _, error = run(*args, "--iterations", 1)
    assert status == 0, error
    status, _, error = run(*args, "--iterations", 1)
    assert status == 1 and "holds a run already (step-00000001); add --resume" in error
    status, _, error = run(*args, "--iterations", 2, "--resume")
    assert status == 0, error
    base = tmp_path / "run" / "model"
    status, out, error = run("generate", "--prompt", "a photo", "--base", base, "--id", photo, "--out", tmp_path / "p")
    assert status == 0, error
    assert pictures(out.split())[0].shape == (64, 64, 3)
