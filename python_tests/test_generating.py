"""`idcore generate` with people of several systems, regions, styles and texts for parts of a picture."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run

import idcore
from idcore.attach import attach
from idcore.attention.sites import find_sites
from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.files import file_hash
from idcore.generating import GenerateRequest, generate_pictures
from idcore.generating_likeness import compared
from idcore.generating_regions import Named, texts_of
from idcore.generating_styles import unsaid_words
from idcore.identity import Identity
from idcore.lora_files import Layer, Lora, write_lora
from idcore.sampling.sdxl import few_step_scheduler
from idcore.systems.lora import load_lora
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.systems.region_passes import attach_passes
from idcore.systems.region_text import attach_texts, shared_out
from idcore.systems.sefi_files import load_tokens, save_tokens
from idcore.systems.sefi_ide import SeFiIDE, SeFiTokens, class_word_embeddings
from idcore.systems.styleforge import StyleWords
from idcore.systems.words import WordSystem
from idcore.testing.tiny_models import tiny_pipeline

PHOTO = Path(idcore.__file__).parent / "assets/photos/astronaut.png"
FAST = {"num_inference_steps": 1, "guidance_scale": 1.2}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A saved SD 1.5 with PuLID, people of three systems, and a style."""
    return made_for("sd", tmp_path_factory.mktemp("sd"))


def made_for(kind, folder):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(folder / "base")
    torch.manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    pulid = PuLID(PuLIDConfig.for_unet(pipe.unet, EncoderConfig("v1", output_dim=32)))
    pulid.save(folder / "pulid.safetensors")
    Identity(torch.randn(1, 4, 32) * 3, torch.zeros(1, 4, 32), pulid.name, {}).save(folder / "a.safetensors")
    for name in "bc":
        Identity(torch.randn(1, 2, width) * 3, None, "dreamidentity", {}).save(folder / f"{name}.safetensors")
    tokens = SeFiTokens(class_word_embeddings(pipe, "a"), 5)
    for p in tokens.parameters():
        torch.nn.init.normal_(p)
    save_tokens(folder / "v.safetensors", tokens.identity("a"))
    layers = {}
    for site in find_sites(pipe.unet):
        down, up = torch.randn(2, width), torch.randn(site.hidden, 2)
        layers["unet", f"{site.path}.to_v"] = Layer(down, up, 2.0)
    words = StyleWords("[V] style", "[W] style").metadata()
    write_lora(Lora(layers), folder / "style.safetensors", "diffusers", metadata=words)
    return SimpleNamespace(folder=folder, kind=kind)


def draw(there, out, **over):
    f = there.folder
    ids = tuple(f / f"{n}.safetensors" for n in over.pop("id", ""))
    styles = (f / "style.safetensors",) if over.pop("style", False) else ()
    values = dict(
        prompt="S* and V* in a garden", out=out, id=ids, base=str(f / "base"), weights=f / "pulid.safetensors", steps=1,
        width=16, height=16, styles=styles,
    )  # fmt: skip
    return [np.asarray(Image.open(p)) for p in generate_pictures(GenerateRequest(**values | over))]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_people_of_three_systems_and_a_style_in_one_pass(there, kind, tmp_path):
    """The command draws what attaches by hand draw."""
    there = there if kind == "sd" else made_for(kind, tmp_path)
    (made,) = draw(there, tmp_path / "a", id="abv", style=True)
    f, pipe = there.folder, tiny_pipeline(there.kind)
    if there.kind == "sd":
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    else:
        pipe = idcore.IDPipeline(pipe)
    pulid = PuLID.from_weights(f / "pulid.safetensors")
    a, b = (Identity.load(f / f"{n}.safetensors") for n in "ab")
    with (
        load_lora(pipe, f / "style.safetensors"),
        attach(pipe, pulid, a),
        attach(pipe, WordSystem(), b),
        attach(pipe, SeFiIDE(), load_tokens(f / "v.safetensors")),
    ):
        wanted = pipe(
            "S* and V* in a garden", generator=torch.Generator().manual_seed(0), width=16, height=16, **FAST
        ).images[0]
    assert np.abs(made.astype(int) - np.asarray(wanted)).max() <= 1
    prompts = {"bv": "S* and V* in a garden", "av": "a and V* in a garden", "ab": "S* and a in a garden"}
    others = {n: draw(there, tmp_path / n, id=n, style=True, prompt=p)[0] for n, p in prompts.items()}
    others["plain"] = draw(there, tmp_path / "plain", id="abv")[0]
    for name, other in others.items():
        assert not np.array_equal(other, made), f"without one part the picture is another: {name}"
    about = Image.open(tmp_path / "a" / "000_seed0.png").text
    assert about["identity_sha256"].split() == [file_hash(f / f"{n}.safetensors") for n in "abv"]
    assert about["style_sha256"] == file_hash(f / "style.safetensors")


def test_people_in_regions_whatever_their_system(there, tmp_path):
    prompt = "S* and V* and B*"
    args = dict(id="acv", placeholder=["S*", "V*"], prompt="S* and V*")
    apart = draw(there, tmp_path / "a", layout="left, right, all", **args)[0]
    whole = draw(there, tmp_path / "b", layout="all, all, all", **args)[0]
    assert np.array_equal(whole, draw(there, tmp_path / "c", **args)[0]), "all is everywhere"
    assert not np.array_equal(apart, whole)
    by_words = dict(id="bc", placeholder=["S*", "B*"], prompt="S* and B*")
    sides = draw(there, tmp_path / "d", layout="left, right", **by_words)[0]
    swapped = draw(there, tmp_path / "e", layout="right, left", **by_words)[0]
    assert not np.array_equal(sides, swapped)
    with pytest.raises(InputError, match="2 people act through the prompt and need as many different words"):
        draw(there, tmp_path / "f", id="bc", prompt=prompt)
    with pytest.raises(InputError, match="have one strength, 1 or 0"):
        draw(there, tmp_path / "h", id="bc", placeholder=["S*", "V*"], id_scale=(1.0, 0.0))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_people_by_stages_have_regions_by_passes(there, kind, tmp_path):
    there = there if kind == "sd" else made_for(kind, tmp_path)
    f, pipe, prompt = there.folder, tiny_pipeline(kind), "V* and U* in a garden"
    tokens = SeFiTokens(class_word_embeddings(pipe, "a"), 5)
    torch.manual_seed(4)
    for p in tokens.parameters():
        torch.nn.init.normal_(p)
    save_tokens(f / "u.safetensors", tokens.identity("a"))
    args = dict(id="vu", placeholder=["V*", "U*"], prompt=prompt)
    apart = draw(there, tmp_path / "a", layout="left, right", style=True, **args)[0]
    if kind == "sd":
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    else:
        pipe = idcore.IDPipeline(pipe)
    people = [load_tokens(f / f"{n}.safetensors") for n in "vu"]
    with (
        load_lora(pipe, f / "style.safetensors"),
        attach(pipe, SeFiIDE(), people, placeholder=["V*", "U*"]),
        attach_passes(pipe, ["V* and a in a garden", "a and U* in a garden"], "left, right"),
    ):
        g = torch.Generator().manual_seed(0)
        wanted = pipe("a and a in a garden", generator=g, width=16, height=16, **FAST).images[0]
    assert np.abs(apart.astype(int) - np.asarray(wanted)).max() <= 1
    for name, other in (("b", "right, left"), ("c", "all, right"), ("d", "all, all")):
        assert not np.array_equal(apart, draw(there, tmp_path / name, layout=other, style=True, **args)[0])


def test_a_strength_of_each_person(there, tmp_path):
    prompt = "S* in a garden"
    off = draw(there, tmp_path / "a", id="ab", id_scale=(0.0, 1.0), prompt=prompt)[0]
    alone = draw(there, tmp_path / "b", id="b", prompt=prompt)[0]
    assert np.abs(off.astype(int) - alone).max() <= 1
    weak = draw(there, tmp_path / "c", id="ab", id_scale=0.5, prompt=prompt)[0]  # words have no strength between
    assert np.array_equal(weak, draw(there, tmp_path / "d", id="ab", id_scale=(0.5, 1.0), prompt=prompt)[0])
    with pytest.raises(InputError, match="2 people need one --id-scale or 2, got 3"):
        draw(there, tmp_path / "e", id="ab", id_scale=(1, 1, 1), prompt=prompt)


def test_a_background_of_its_own(there, tmp_path):
    """Multi-StyleForge: the person's words inside of the person's region, the background's outside."""
    person, garden = draw(there, tmp_path / "a", prompt="a man")[0], draw(there, tmp_path / "b", prompt="a garden")[0]
    both = draw(there, tmp_path / "c", prompt="a man", background="a garden", person_region="left")[0]
    assert not np.array_equal(both, person) and not np.array_equal(both, garden)
    everywhere = draw(there, tmp_path / "d", prompt="a man", background="a garden", person_region="all")[0]
    assert np.abs(everywhere.astype(int) - person).max() <= 1
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    by_mask = draw(
        there, tmp_path / "e", prompt="a man", background="a garden", person_region=str(tmp_path / "mask.png")
    )
    assert np.array_equal(by_mask[0], both)
    with_id = dict(id="a", prompt="a man", background="a garden")
    assert not np.array_equal(draw(there, tmp_path / "f", layout="left", **with_id)[0], both)
    with pytest.raises(InputError, match="nothing says where they are; give --person-region"):
        draw(there, tmp_path / "g", **with_id)
    with pytest.raises(InputError, match="--person-region says where --background is not read"):
        draw(there, tmp_path / "h", prompt="a man", person_region="left")


def test_a_background_of_nobody_leaves_the_person(tmp_path):
    """tiny-sd: a face in the person's region, the other prompt's wall outside; with both texts in one attention
    (`attach_texts`) the background takes most faces."""
    from idcore.metrics.gate import Judge
    from idcore.sampling.tiny_sd import tiny_sd

    person, empty, judge = "a photo of a man, blue background", "a photo of an empty scene, yellow background", Judge()
    how = dict(prompt=person, background=empty, person_region="center", base="tiny-sd", count=6)
    made = [Image.open(p) for p in generate_pictures(GenerateRequest(out=tmp_path, **how))]
    pipe, outside = tiny_sd(), torch.ones(64, 64)
    outside[:, 16:48] = 0

    def pictures(prompt):
        g = [torch.Generator().manual_seed(s) for s in range(6)]
        return pipe([prompt] * 6, num_inference_steps=4, guidance_scale=1.0, generator=g).images

    alone, walls = pictures(person), pictures(empty)
    with attach_texts(pipe, [empty], [outside]):
        shared = pictures(person)
    faces, taken = ([judge.embed(p) is not None for p in some].count(True) for some in (made, shared))
    assert faces >= 5 and taken <= faces - 2
    reached = [1 - np.linalg.norm(wall(m) - wall(w)) / np.linalg.norm(wall(a) - wall(w)) for m, a, w in
               zip(made, alone, walls)]  # fmt: skip
    assert min(reached) > 0.4
    with pytest.raises(InputError, match="--person-margin is 0 to 0.25 of the longer side, got 0.5"):
        generate_pictures(GenerateRequest(out=tmp_path, person_margin=0.5, **how))


def wall(picture):
    """Mean colour of the upper corners."""
    a = np.asarray(picture.convert("RGB"), np.float64)[:8]
    return np.concatenate([a[:, :8], a[:, -8:]], 1).mean((0, 1))


def test_texts_of_parts():
    left, right = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    left[..., 0] = right[..., 1] = 1
    a, b, v = Named("A*", "man", left, False), Named("B*", "person", right, False), Named("V*", "dog", None, True)
    made = texts_of("A*, B* and V*", [a, b, v])
    assert made.prompt == "man, person and V*"
    assert [t for t, _ in made.others] == ["A*, person and dog", "man, B* and dog"]
    assert torch.equal(made.others[0][1], left)
    made = texts_of("A* and V*", [a, v._replace(mask=right)])
    assert made.prompt == "man and V*" and [t for t, _ in made.others] == ["A* and dog", "man and dog"]
    assert torch.equal(made.others[0][1], left) and not made.others[1][1].any()
    assert texts_of("x", [Named("A*", "man", None, False)]) == ("x", [], [])
    u = Named("U*", "cat", left, True)
    made = texts_of("U*, B* and V*", [u, b, v._replace(mask=right)])
    assert made.prompt == "cat, person and dog" and [t for t, _ in made.others] == ["cat, B* and dog"]
    assert [t for t, _ in made.passes] == ["U*, person and dog", "cat, person and V*"]
    made = texts_of("U* and V*", [u, v])
    assert made.prompt == "cat and V*" and not made.others and [t for t, _ in made.passes] == ["U* and V*"]


def test_masks_share_out_what_they_cover_together():
    shared = shared_out([torch.ones(1, 2, 2), None, torch.zeros(1, 4, 4)])
    assert [float(m.mean()) for m in shared] == [0.5, 0.5, 0]
    assert float(shared_out([None, None])[0].sum()) == 0.5 and shared_out([None]) == [None]


def test_a_text_for_a_region_takes_the_prompts_place():
    pipe = tiny_pipeline("sd")

    def draws(prompt, **more):
        more = {**FAST, "guidance_scale": 2.0} | more
        return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **more).images[0]

    man, garden = draws("a man"), draws("a garden")
    with attach_texts(pipe, ["a garden"], None) as handle:
        assert np.abs(draws("a man") - garden).max() < 1e-5
        handle.scale(0.0)
        assert np.array_equal(draws("a man"), man)
    with attach_texts(pipe, ["a garden", "a garden"], "left, right"), attach(pipe, WordSystem(), word("W*")):
        assert np.abs(draws("W*") - garden).max() < 1e-5
    with attach_texts(pipe, ["a garden"], "left", scale=0.5):
        half = draws("a man")
    assert 0 < np.abs(half - man).mean() < np.abs(garden - man).mean()
    assert np.array_equal(draws("a man"), man)
    tokens = SeFiTokens(class_word_embeddings(pipe, "a"), 5).identity("a")
    with attach(pipe, SeFiIDE(), tokens):
        with pytest.raises(InputError, match="names a person of SeFi-IDE, whose words change with the stage"):
            attach_texts(pipe, ["V*"], None)
        with attach_texts(pipe, ["a garden"], None):
            assert np.abs(draws("V*") - garden).max() < 1e-5
    with pytest.raises(InputError, match="wanted at least one text, none of them empty"):
        attach_texts(pipe, [" "], None)


def word(name):
    return Identity(torch.ones(1, 1, 32), None, "dreamidentity", {"placeholder": name})


def test_what_a_style_takes_of_the_likeness_is_printed(tmp_path):
    """Measured on a photo of the person and a copy that the style blurred away."""
    photo = Image.open(PHOTO).convert("RGB")
    grey = Image.new("RGB", photo.size, (90, 90, 90))
    dark = photo.point(lambda v: v // 2)
    r = GenerateRequest("x", tmp_path, id=(PHOTO,), base="somewhere")
    found = compared(r, [dark, grey], [photo, photo], ())
    one = found["people"][0]
    assert one["without_style"] == [0.0, 0.0] and one["found"] == 1 and one["values"][1] is None
    assert one["pairs"] == 1 and one["loss"] == one["values"][0] > 0
    both = Image.new("RGB", (2 * photo.width, photo.height), (90, 90, 90))
    both.paste(photo, (0, 0))
    left, right = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    left[..., 0] = right[..., 1] = 1
    two = GenerateRequest("x", tmp_path, id=(PHOTO, PHOTO), base="somewhere")
    found = compared(two, [both], [], (left, right))
    assert [p["values"] for p in found["people"]] == [[0.0], [None]]


def test_the_command_says_it(there, tmp_path):
    f = there.folder
    args = (
        "generate", "--prompt", "a man", "--out", tmp_path / "o", "--base", f / "base", "--weights",
        f / "pulid.safetensors", "--id", f / "a.safetensors", "--style", f / "style.safetensors", "--width", 16,
        "--height", 16, "--steps", 1,
    )  # fmt: skip
    status, out, error = run(*args, "--like", PHOTO, "--compare", "--style-scale", 2)
    assert "note: the prompt does not say '[V] style', the word of style.safetensors" in error
    assert status == 0 and "face found in 0 of 1; without style unknown: the style takes unknown" in error
    assert len(list((tmp_path / "o" / "without_style").glob("*.png"))) == 1
    told = json.loads((tmp_path / "o" / "generate.json").read_text())["similarity"]["people"][0]
    assert told["values"] == [None] and told["loss"] is None
    strong = np.asarray(Image.open(tmp_path / "o" / "000_seed0.png"))
    plain = np.asarray(Image.open(tmp_path / "o" / "without_style" / "000_seed0.png"))
    assert np.array_equal(plain, draw(there, tmp_path / "p", id="a", prompt="a man")[0])
    assert not np.array_equal(strong, plain)
    for more, text in (
        (("--compare",), "--compare measures how alike the pictures are to the people's photos: give --like"),
        (("--like", PHOTO, "--like", PHOTO), "--like gives a photo per --id: 1 people, 2 photos"),
        (("--style-scale", 1, "--style-scale", 2), "1 styles need one --style-scale or 1, got 2"),
        (("--style", f / "pulid.safetensors"), "is no LoRA of kohya, diffusers or peft"),
    ):
        assert text in run(*args, *more)[2]
    with pytest.raises(InputError, match="--compare draws the same pictures without --style, and there is none"):
        draw(there, tmp_path / "q", id="a", compare=True)


def test_a_style_whose_word_is_said(there):
    path = there.folder / "style.safetensors"
    assert not unsaid_words([path], ["a photo of [V] style, a man"]) and not unsaid_words([path], ["x", "[W] style"])
    assert len(unsaid_words([path], ["a photo"])) == 1 and not unsaid_words([there.folder], ["a photo"])


def test_two_systems_in_the_attention_are_refused(there, tmp_path):
    Identity(torch.randn(1, 4, 32), None, "faceid", {}).save(there.folder / "z.safetensors")
    with pytest.raises(InputError, match="people of pulid-v1 and faceid both act in the attention"):
        draw(there, tmp_path, id="az")
    with pytest.raises(WeightsError, match="needs its adapter weights"):
        draw(there, tmp_path, id="ab", weights=None)


def test_regions_and_sizes_that_do_not_fit(there, tmp_path):
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")
    black = tmp_path / "black.png"
    for args, text in (
        (
            dict(layout="left, center, right"),
            "2 people need one area in --layout per person, in the order of --id; got 3",
        ),
        (dict(masks=(PHOTO,)), "2 people need one --mask per person, in the order of --id; got 1"),
        (dict(masks=(PHOTO, black)), "black.png is black, so that its person is nowhere; draw white where"),
        (dict(layout="left, right", masks=(PHOTO, PHOTO)), "give --layout or --mask, not both"),
        (dict(background="x", person_region="left, right"), "--person-region is one area, got 'left, right'"),
        (dict(width=33), "--width is a multiple of 8 pixels, got 33; give 32"),
        (dict(height=2), "--height is a multiple of 8 pixels, got 2; give 8"),
        (dict(like=(tmp_path / "grey.png", PHOTO)), "No face was found in"),
        (dict(like=(PHOTO, tmp_path / "no.png")), "There is no file"),
    ):
        with pytest.raises(IdcoreError) as e:
            draw(there, tmp_path / "o", id="ab", prompt="S*", **args)
        assert text in str(e.value), str(e.value)
        assert not list((tmp_path / "o").glob("*.png")), "before anything is drawn"


def test_files_of_another_base(there, tmp_path):
    other = made_for("sdxl", tmp_path)
    names = {"style": "use the base model that it was made for", "b": "text encoders have 32; encode the photos with"}
    names["v"] = "have width 32 + 32, this pipeline's text encoders have 32"
    for name, text in names.items():
        path = other.folder / f"{name}.safetensors"
        args = dict(styles=(path,), id=()) if name == "style" else dict(id=(path,))
        values = dict(prompt="S* and V*", out=tmp_path / "o", base=str(there.folder / "base"), steps=1) | args
        with pytest.raises(IdcoreError, match=re.escape(text)):
            generate_pictures(GenerateRequest(**values))


def test_the_embedded_model_says_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match='--style, --background: base "tiny" draws one person everywhere'):
        generate_pictures(GenerateRequest("x", tmp_path, styles=(tmp_path,), background="y"))
