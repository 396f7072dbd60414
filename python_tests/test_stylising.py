"""`idcore stylise`: photos redrawn on every base, with people of every system, styles of every layout, and regions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from test_cli import run
from test_generating import made_for

import idcore
from idcore.attach import attach
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.lora_files import read_lora, write_lora
from idcore.metrics.drawn_attributes import drawn_photo
from idcore.metrics.layouts import same_layout
from idcore.metrics.tiny_style import StyleJudge
from idcore.results import Result
from idcore.sampling.sdxl import few_step_scheduler
from idcore.sampling.stylise import redrawer, stylise
from idcore.stylising import StyliseRequest, stylise_photos
from idcore.systems.lora import load_lora
from idcore.systems.pulid import PuLID
from idcore.systems.region_text import attach_texts
from idcore.systems.sefi_files import load_tokens
from idcore.systems.sefi_ide import SeFiIDE
from idcore.systems.words import WordSystem
from idcore.testing.tiny_models import tiny_pipeline, tiny_unet

PHOTO = Path(idcore.__file__).parent / "assets/photos/astronaut.png"


def sd2(**more):
    """SD 2.x's differences: linear projections, heads of one size, velocity prediction."""
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", steps_offset=1)
    return tiny_pipeline("sd", unet=tiny_unet("sd", use_linear_projection=True), scheduler=scheduler, **more)


@pytest.fixture(scope="module", params=["sd", "sd2", "sdxl"])
def there(request, tmp_path_factory):
    """A saved base, PuLID, people of three systems, a style, a photo."""
    folder = tmp_path_factory.mktemp(request.param)
    found = made_for("sdxl" if request.param == "sdxl" else "sd", folder)
    if request.param == "sd2":
        sd2().save_pretrained(folder / "base")
    found.kind = request.param
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 64)).save(folder / "photo.png")
    return found


def redraw(there, out, **over):
    f = there.folder
    ids = tuple(f / f"{n}.safetensors" for n in over.pop("id", ""))
    values = dict(
        prompt="S* and V* in a garden", out=out, id=ids, base=str(f / "base"), weights=f / "pulid.safetensors",
        photos=(f / "photo.png",), steps=2, strength=0.5, guidance=1.5,
    )  # fmt: skip
    made = stylise_photos(StyliseRequest(**values | over))
    return [np.asarray(Image.open(out / n)) for n in made["pictures"]]


def test_people_of_three_systems_and_a_style_as_by_hand(there, tmp_path):
    f = there.folder
    ours = redraw(there, tmp_path / "a", id="abv", styles=(f / "style.safetensors",), count=2, seed=3)
    base = {"sd": tiny_pipeline, "sdxl": tiny_pipeline, "sd2": lambda kind: sd2()}[there.kind](there.kind)
    if there.kind == "sdxl":
        base = idcore.IDPipeline(base)
    else:
        base.scheduler = few_step_scheduler(base.scheduler.config)
    pipe, me = redrawer(base), Identity.load(f / "a.safetensors")
    with (
        load_lora(pipe, f / "style.safetensors"),
        attach(pipe, PuLID.from_weights(f / "pulid.safetensors"), me),
        attach(pipe, WordSystem(), Identity.load(f / "b.safetensors")),
        attach(pipe, SeFiIDE(), load_tokens(f / "v.safetensors")),
    ):
        for seed, made in zip((3, 4), ours):
            wanted = stylise(
                pipe, f / "photo.png", "S* and V* in a garden", strength=0.5, guidance_scale=1.5, seed=seed,
                num_inference_steps=2, long_side=16,
            )  # fmt: skip
            assert made.shape == (16, 8, 3), "the base's own size on the long side, multiples of 8"
            assert np.abs(made.astype(int) - np.asarray(wanted)).max() <= 1
    assert not np.array_equal(ours[0], redraw(there, tmp_path / "b", id="abv", seed=3)[0]), "without the style"


def test_styles_of_every_layout_and_a_result_folder(there, tmp_path):
    style = there.folder / "style.safetensors"
    kohya, peft, result = tmp_path / "kohya.safetensors", tmp_path / "peft", tmp_path / "result"
    family = "sdxl" if there.kind == "sdxl" else "sd15"
    write_lora(read_lora(style), kohya, "kohya", family=family)
    write_lora(read_lora(style), peft, "peft")
    result.mkdir()
    (result / "styleforge.safetensors").write_bytes(style.read_bytes())
    Result("styleforge", "styleforge.safetensors", "x").write(result, {})
    plain = redraw(there, tmp_path / "p", prompt="a man")[0]
    wanted = redraw(there, tmp_path / "w", prompt="a man", styles=(style,), style_scale=2.0)[0]
    assert not np.array_equal(wanted, plain)
    for i, path in enumerate((kohya, peft, result)):
        made = redraw(there, tmp_path / str(i), prompt="a man", styles=(path,), style_scale=2.0)[0]
        assert np.abs(made.astype(int) - wanted).max() <= 1, path


def test_regions_and_a_background_of_its_own(there, tmp_path):
    how = dict(prompt="a man", background="a garden", person_region="left")
    ours = redraw(there, tmp_path / "a", **how)[0]
    assert not np.array_equal(ours, redraw(there, tmp_path / "b", prompt="a man")[0])
    everywhere = redraw(there, tmp_path / "c", **how | {"person_region": "all"})[0]
    assert np.abs(everywhere.astype(int) - redraw(there, tmp_path / "d", prompt="a man")[0]).max() <= 1
    sides = redraw(there, tmp_path / "e", id="aa", layout="left, right", prompt="two men")[0]
    assert not np.array_equal(sides, redraw(there, tmp_path / "f", id="aa", prompt="two men")[0])


def drawn(tmp_path, count):
    paths = []
    for i in range(count):
        paths.append(tmp_path / f"person{i}.png")
        drawn_photo(5_700_002 + i, size=128, background="green").save(paths[-1])
    return paths


def test_a_drawn_photo_becomes_a_pencil_drawing_of_the_same_layout(tmp_path):
    """tiny-sd by the command: what was asked for, measured; more strength, more style and less of the photo."""
    photos, figures = drawn(tmp_path, 4), {}
    judge = StyleJudge.from_package()
    pencil, photo = 1, 0
    for strength in (0.25, 0.75):
        out = tmp_path / str(strength)
        status, text, said = run(
            "stylise", *photos, "--prompt", "a pencil drawing of a person, green background", "--out", out,
            "--strength", strength, "--json",
        )  # fmt: skip
        assert status == 0, said
        told = json.loads(text)
        assert told["pictures"] == [f"{k:03d}_seed0.png" for k in range(4)]
        made = [Image.open(out / n).convert("RGB") for n in told["pictures"]]
        assert made[0].size == (64, 64)
        kept = [k["layout"][0] for k in told["kept"]]
        own = [same_layout(Image.open(p), m) for p, m in zip(photos, made)]
        assert np.allclose(kept, own, atol=0.02)
        others = np.mean([same_layout(Image.open(p), m) for p, m in zip(photos, made[1:] + made[:1])])
        scores = judge.scores(made)
        distance = np.mean([k["likeness"][0] for k in told["kept"] if k["likeness"][0] is not None])
        figures[strength] = np.mean(kept), others, float((scores[:, pencil] - scores[:, photo]).mean()), distance
        assert judge(made).count("photo") == 4 if strength < 0.5 else judge(made).count("photo") <= 1
    (weak, others, less_style, near), (strong, _, style, far) = figures[0.25], figures[0.75]
    assert weak > 0.97 and 0.75 < strong < weak and others < 0.5
    assert style > less_style + 20 and near < far < 0.6
    assert "layout kept" not in text, "what is said goes to standard error"


def test_the_file_says_how_it_was_made(tmp_path):
    (photo,) = drawn(tmp_path, 1)
    status, out, said = run(
        "stylise", photo, "--prompt", "a person", "--out", tmp_path / "o", "--count", 2, "--seed", 5, "--long-side", 32
    )
    assert status == 0 and "person0.png: layout kept 0." in said and "stylise: 100%" in said
    assert out.split("\n")[-3:-1] == [str(tmp_path / "o" / f"000_seed{s}.png") for s in (5, 6)]
    about = Image.open(tmp_path / "o" / "000_seed6.png")
    assert about.size == (32, 32) and about.text["strength"] == "0.6" and about.text["seed"] == "6"
    told = json.loads((tmp_path / "o" / "stylise.json").read_text())
    assert told["request"]["photos"] == [str(photo)] and len(told["kept"][0]["layout"]) == 2
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")
    _, _, said = run("stylise", tmp_path / "grey.png", "--prompt", "a wall", "--out", tmp_path / "p")
    assert "grey.png: layout kept 0.00\n" in said and "grey.png: no face found in the photo" in said


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("{photo}", "--base", "tiny"), "stylise: base tiny draws from the identity alone and cannot begin at a photo"),
        (("{photo}", "--strength", "0"), "stylise: strength is above 0 and at most 1, got 0.0"),
        (("{photo}", "--strength", "0.1"), "0.1 of 4 steps is less than one; give a larger strength, or at least 10"),
        (("{photo}", "--base", "{tmp}"), 'stylise: base must be "tiny"'),
        (("{photo}", "--person-region", "left"), "--person-region says where --background is not read; give both"),
        (("{photo}", "--sampler", "own"), "stylise: sampler work with SDXL bases, tiny-sd is SD 1.x or 2.x"),
        (("{photo}", "--layout", "left"), "stylise: --mask and --layout say where people act, and --id gives none"),
        (("{tmp}/none.png",), "none.png"),
        (("{photo}", "--prompt", " "), "stylise: the prompt is empty"),
        (("{photo}", "--background", "x", "--person-margin", "0.5"), "stylise: --person-margin is 0 to 0.25 of the"),
        (("{photo}", "--id", "{photo}"), "stylise: nothing that ships reads a photo for tiny-sd"),
    ],
)
def test_what_is_refused(args, text, tmp_path):
    given = [a.format(photo=PHOTO, tmp=tmp_path) for a in args]
    status, _, error = run("stylise", "--prompt", "x", "--out", tmp_path / "o", *given)
    assert status == 1 and text in error, error


def test_no_photos(tmp_path):
    with pytest.raises(InputError, match="wanted at least one photo, got none"):
        stylise_photos(StyliseRequest("x", tmp_path))


def test_texts_of_regions_go_on_a_redrawer_too():
    pipe = redrawer(tiny_pipeline("sd"))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    torch.manual_seed(0)
    garden = np.asarray(stylise(pipe, photo, "a garden", guidance_scale=2.0))
    with attach_texts(pipe, ["a garden"], None):
        assert np.abs(np.asarray(stylise(pipe, photo, "a man", guidance_scale=2.0)).astype(int) - garden).max() <= 1
