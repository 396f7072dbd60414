"""StyleForge's losses against their formula, and whole small trainings: made, saved, loaded, drawn with."""

import json

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from styleforge_cases import base_of, data, folder, pictures, settings

from idcore.errors import InputError, WeightsError
from idcore.files import read_safetensors, write_safetensors
from idcore.lora_files import read_lora
from idcore.results import read_result
from idcore.systems.lora import load_lora
from idcore.systems.styleforge import StyleWords, style_words
from idcore.training.contract import Step
from idcore.training.styleforge.config import SearchSettings
from idcore.training.styleforge.drawn import person, place
from idcore.training.styleforge.run import StyleData, check_mix, open_pictures, split_style_ref, train_styleforge
from idcore.training.styleforge.search import StepSearch, draw
from idcore.training.styleforge.task import StyleForgeTask
from idcore.training.tuning import Tuned


def task_of(base, config, given):
    sets, source = open_pictures(config, given, base)
    tuned = Tuned(base, config.tune)
    return StyleForgeTask(tuned, config, sets, source.shares, config.style_words(given.multi)), source


def terms(changes, given, prediction="epsilon", batch=4, count=1, step=3):
    base = base_of()
    base.prediction = prediction
    task, source = task_of(base, settings(*changes), given)
    found = []
    for b in source.micro_batches(step, 0, 0, 1, batch // count, count):
        found.append({k: v.item() for k, v in task.losses(b, Step(0, step, 10)).items()})
    names = [name for name, _ in task.sets]
    return {n: sum(f.get(n, 0.0) for f in found) / count for n in names}


def by_hand(changes, given, prediction, weigh):
    """E[w |f - target|^2] of each set over the whole batch, in float64."""
    base = base_of()
    base.prediction = prediction
    task, source = task_of(base, settings(*changes), given)
    batch = next(source.micro_batches(3, 0, 0, 1, 4, 1))
    step = Step(0, 3, 10)
    latents = base.encode_pictures(batch.pixels)
    noise = step.normal("noise", batch.places, latents.shape[1:])
    x, t = base.noised(latents, noise, step.uniform("time", batch.places))
    a = base.pipe.scheduler.alphas_cumprod[t].double().sqrt().view(-1, 1, 1, 1)
    s = (1 - a**2).sqrt()
    with torch.no_grad():
        out = base.predict(x, t, base.text(batch.prompts, 16, 16)).double()
    clean = {"epsilon": (x.double() - s * out) / a, "v_prediction": a * x.double() - s * out, "sample": out}[prediction]
    error = (clean - latents.double()).square() * weigh((a / s) ** 2)
    each = error.flatten(1).mean(1)
    return {n: w * float(each[batch.extra["group"] == i].mean()) for i, (n, w) in enumerate(task.sets)}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "weight, weigh",
    [("one", lambda snr: 1.0), ("snr", lambda snr: snr), ("min_snr", lambda snr: snr.clamp(max=5.0))],
)
def test_the_loss_of_the_clean_picture_is_the_papers(prediction, weight, weigh):
    changes = ("loss.form=clean", f"loss.weight={weight}", "loss.aux=0.7")
    found = terms(changes, data(), prediction)
    assert set(found) == {"style", "aux"}
    assert found == pytest.approx(by_hand(changes, data(), prediction, weigh), rel=1e-4)


def test_weighted_by_the_snr_the_clean_picture_is_epsilon():
    given = data()
    assert terms(("loss.form=clean", "loss.weight=snr"), given) == pytest.approx(terms((), given), rel=1e-4)


@pytest.mark.parametrize("multi", [False, True])
def test_micro_batches_change_nothing(multi):
    given = data(multi)
    whole = terms((), given)
    assert terms((), given, count=4) == pytest.approx(whole, rel=1e-4) == terms((), given, count=2)
    assert set(whole) == ({"people", "backgrounds", "aux"} if multi else {"style", "aux"})


def test_sets_prompts_and_weights():
    base = base_of()
    sets, source = open_pictures(settings("loss.aux=0.5"), data(multi=True), base)
    assert sets == [("people", 0.5), ("backgrounds", 0.5), ("aux", 0.5)] and source.shares == (0.25, 0.25, 0.5)
    said = [p for p in next(source.micro_batches(0, 0, 0, 1, 8, 1)).prompts]
    assert sorted(said) == ["[V] style"] * 2 + ["[W] style"] * 2 + ["style"] * 4
    sets, source = open_pictures(settings("loss.aux=0"), StyleData(pictures(3)), base)
    assert sets == [("style", 1.0)] and source.prompts() == ["[V] style"]


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("sd", ("tune.text_encoder=true",)),
        ("sd2", ("loss.form=clean", "tune.layers=all")),
        ("sdxl", ("tune.text_encoder=true", "result.layouts=kohya,diffusers,peft")),
    ],
)
def test_trained_saved_loaded_and_drawn_with(kind, changes, tmp_path):
    base = base_of(kind)
    before = np.asarray(draw(base, ["a photo of [V] style, a man"], [0], 16, 2, 1.0)[0])
    config = settings(*changes)
    made = train_styleforge(config, data(multi=kind == "sdxl"), tmp_path / "run", base=base)
    result = read_result(made)
    assert (result.system, result.weights, made) == ("styleforge", "styleforge.safetensors", tmp_path / "run" / "model")
    words = style_words(read_lora(made / result.weights).metadata)
    assert words.person("a man") == "a photo of [V] style, a man"
    after = np.asarray(draw(base, ["a photo of [V] style, a man"], [0], 16, 2, 1.0)[0])
    assert np.array_equal(after, before)  # the base is as it was
    drawn = []
    others = [p for p in made.iterdir() if p.name.startswith("styleforge_")]
    assert len(others) == len(config.result.layouts) - 1
    for file in (made / result.weights, *others):
        with load_lora(base.pipe, file):
            base.to("cpu", torch.float32)  # forgets the prompts that were encoded before
            drawn.append(np.asarray(draw(base, ["a photo of [V] style, a man"], [0], 16, 2, 1.0)[0]))
    assert (drawn[0] != before).any()
    assert all(np.abs(d.astype(int) - drawn[0]).max() <= 1 for d in drawn[1:])
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    card = (made / "README.md").read_text()
    assert "idcore generate --style RESULT" in card and "StyleForge" in card


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_whole_weights(kind, tmp_path):
    base = base_of(kind)
    config = settings("tune.weights=full", "tune.text_encoder=true", "loop.lr=1e-3")
    made = train_styleforge(config, data(), tmp_path, base=base)
    assert read_result(made).weights == "pipeline"
    again = type(base).from_pretrained(made / "pipeline", dtype=torch.float32)
    start = base_of(kind).pipe
    for part in ("unet", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])):
        moved = zip(getattr(again.pipe, part).parameters(), getattr(start, part).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in moved), part
    drawn = [np.asarray(draw(b, ["a photo of [V] style"], [0], 16, 2, 1.0)[0]).astype(int) for b in (base, again)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert (drawn[0] != np.asarray(draw(base_of(kind), ["a photo of [V] style"], [0], 16, 2, 1.0)[0])).mean() > 0.2


def same_file(one, two):
    """Equal tensors bit for bit and equal metadata, whose order in a file is by chance."""
    (a, said), (b, again) = read_safetensors(one), read_safetensors(two)
    return said == again and a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    shared = ("loop.steps=4", "loop.save_every=1")
    one = train_styleforge(settings(*shared), data(), tmp_path / "one", base=base_of())
    part = settings(*shared, "loop.stop_at=2")
    stopped = train_styleforge(part, data(), tmp_path / "two", base=base_of())
    assert stopped.name == "step-00000002"
    two = train_styleforge(settings(*shared), data(), tmp_path / "two", base=base_of(), resume=True)
    assert same_file(one / "styleforge.safetensors", two / "styleforge.safetensors")
    assert train_styleforge(settings(*shared), data(), tmp_path / "two", base=base_of(), resume=True) == two
    with pytest.raises(InputError, match="holds a finished training already; add --resume"):
        train_styleforge(settings(*shared), data(), tmp_path / "two", base=base_of())
    with pytest.raises(InputError, match=r"lr: was 0.01, is 0.02"):
        (tmp_path / "two" / "model" / "result.json").unlink()
        train_styleforge(settings(*shared, "loop.lr=2e-2"), data(), tmp_path / "two", base=base_of(), resume=True)


class TestSearch:
    CONFIG = ("loop.steps=6", "loop.validate_every=1", "search.patience=2", "search.prompts=a man")

    def test_the_best_weights_are_the_result_and_training_ends_early(self, tmp_path, monkeypatch):
        scores = {0: 9.0, 1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 8.0}  # step 0 is the base and does not count
        kept = {}
        keep = StepSearch._keep

        def watched(self, module, step, measures):
            kept[step] = {k: v.clone() for k, v in module.state_dict().items()}
            keep(self, module, step, measures | {"score": scores[step]})

        monkeypatch.setattr(StepSearch, "_keep", watched)
        made = train_styleforge(settings(*self.CONFIG), data(), tmp_path, base=base_of())
        assert sorted(kept) == [0, 1, 2, 3, 4]  # two scores after the best
        assert json.loads((made / "result.json").read_text())["step"] == 2
        assert [p.name for p in (tmp_path / "search").glob("best-*")] == ["best-00000002.safetensors"]
        lora = read_lora(made / "styleforge.safetensors")
        key = next(k for k in lora.layers if k[0] == "unet")
        best = kept[2][f"unet.{key[1]}.lora_B.weight"]
        assert torch.equal(lora.layers[key].folded().up, best)
        assert (tmp_path / "validation" / "step-00000004" / "style.png").is_file()

    def search_of(self, folder, *changes, ref=None):
        config = settings(*self.CONFIG, *changes)
        return StepSearch(base_of(), config.search, StyleWords("[V] style"), ref or pictures(4), 16, folder)

    def test_the_base_has_style_0_and_content_1_and_the_style_itself_1(self, tmp_path):
        base, config = base_of(), settings(*self.CONFIG, "search.seeds=[0,1]")
        search = StepSearch(base, config.search, StyleWords("[V] style"), pictures(4), 16, tmp_path / "search")
        with Tuned(base, config.tune) as tuned:
            shown = search(tuned.module, 0)
            assert shown.measures == pytest.approx({"style": 0.0, "content": 1.0, "score": 0.0}, abs=1e-5)
            assert search._scored(search.wanted, np.zeros((2, 64), np.float32))["style"] == pytest.approx(1)
            with torch.no_grad():
                for p in tuned.module.parameters():
                    p.add_(1.0)
            assert search(tuned.module, 1).measures["content"] < 0.999
        again = StepSearch(base, config.search, StyleWords("[V] style"), pictures(4), 16, tmp_path / "search")
        assert again.best() == 1 and not again.enough(1)

    def test_a_style_that_is_there_wins_over_content_that_was_never_touched(self, tmp_path):
        """Shares of the way to the style, and of the base's layout, as a training's first and later steps have them."""
        search = self.search_of(tmp_path)
        start = search.wanted + 5.0
        layout = np.zeros((4, 64), np.float32)
        layout[:, 0] = 1
        tmp_path.mkdir(exist_ok=True)
        kept = {"features": torch.from_numpy(start), "content": torch.from_numpy(layout)}
        write_safetensors(tmp_path / "base.safetensors", kept)
        early, late = (search._scored(start - 5.0 * way, layout * left) for way, left in ((0.1, 0.98), (0.5, 0.55)))
        assert (early["style"], late["style"]) == pytest.approx((0.1, 0.5), abs=1e-5)
        assert late["score"] == pytest.approx(0.5 * 0.55, abs=1e-5) and late["score"] > 2 * early["score"]
        away = search._scored(start + 1.0, layout * 0.0)
        assert away["score"] == pytest.approx(-0.2, abs=1e-5)  # no content makes up for less than no style
        heavy = self.search_of(tmp_path, "search.content=2")._scored(start - 2.5, layout * 0.55)
        assert heavy["score"] == pytest.approx(0.5 * 0.55**2, abs=1e-5)

    def test_a_soft_picture_in_the_style_is_nearer_to_it_than_a_soft_photo(self, tmp_path):
        """Small models paint softly: not their sharpness tells the style."""
        soft = ImageFilter.GaussianBlur(1.5)
        ref = [person(5_800_000 + i, ["pencil"])[0] for i in range(6)] + [place(i, "pencil") for i in range(3)]
        drawn = [person(5_900_000 + i, ["photo", "sepia", "pencil"]) for i in range(6)]
        photo, sepia, pencil = ([p.filter(soft) for p in some] for some in zip(*drawn, strict=True))
        search = self.search_of(tmp_path, ref=ref)
        layout = np.ones((6, 64), np.float32) / 8
        kept = {"features": torch.from_numpy(search.looker(photo)), "content": torch.from_numpy(layout)}
        tmp_path.mkdir(exist_ok=True)
        write_safetensors(tmp_path / "base.safetensors", kept)
        style = [search._scored(search.looker(p), layout)["style"] for p in (photo, sepia, pencil)]
        assert style[0] == pytest.approx(0, abs=1e-5) and style[2] > 0.25 and style[2] > style[1] + 0.1

    def test_a_style_that_comes_late_is_waited_for(self, tmp_path):
        """Scores as Multi-StyleForge had them on a base that never saw the style."""
        search = self.search_of(tmp_path, f"search.patience={SearchSettings().patience}")
        scores = (-0.14, 0.07, -0.07, -0.02, 0.05, 0.24, 0.29)
        search.record = {"best": 2, "scores": {str(i + 1): {"score": s} for i, s in enumerate(scores)}}
        assert not any(search.enough(i + 1) for i in range(len(scores)))

    def test_an_interrupted_search_goes_on(self, tmp_path):
        one = train_styleforge(settings(*self.CONFIG), data(), tmp_path / "one", base=base_of())
        train_styleforge(settings(*self.CONFIG, "loop.stop_at=1"), data(), tmp_path / "two", base=base_of())
        two = train_styleforge(settings(*self.CONFIG), data(), tmp_path / "two", base=base_of(), resume=True)
        assert same_file(one / "styleforge.safetensors", two / "styleforge.safetensors")


class TestMix:
    def test_what_the_face_detector_thinks_is_said_and_splits(self, tmp_path, monkeypatch):
        from idcore.training.styleforge import run

        class Finder:
            def detect(self, picture):
                return ["face"] if np.asarray(picture).mean() > 128 else []

        monkeypatch.setattr(run, "face_finder", lambda config: Finder())
        bright, dark = (np.full((16, 16, 3), v, np.uint8) for v in (200, 30))
        ref = folder(tmp_path / "ref", 0)
        from PIL import Image

        for i in range(4):
            Image.fromarray(bright if i else dark).save(ref / f"{i}.png")
        said = []
        check_mix(settings(), StyleData(ref), said.append)
        assert "3 with people, 1 without" in said[0] and "warning: 4 images; the paper takes 15 to 20" in said[0]
        made = split_style_ref(settings(), StyleData(ref, "aux"), said.append)
        assert ([p.name for p in made.people], [p.name for p in made.backgrounds]) == (
            ["1.png", "2.png", "3.png"],
            ["0.png"],
        )
        said.clear()
        check_mix(settings(), StyleData(people=ref, backgrounds=ref), said.append)
        assert "--people: no face is found in 1, such as 0.png" in said[0] and "--backgrounds: a face" in said[1]
        (ref / "0.png").unlink()
        with pytest.raises(InputError, match="--multi found 3 pictures with people, 0 without"):
            split_style_ref(settings(), StyleData(ref), said.append)


def test_errors_of_the_sets():
    some = pictures(1)
    cases = [
        (StyleData(aux=some), "--style-ref FOLDER is missing"),
        (StyleData(some), "--aux FOLDER is missing: 15 to 20 portraits"),
        (StyleData(some, some, some, some), "not both; --multi splits"),
        (StyleData(None, some, some), "needs --people and --backgrounds; --backgrounds is missing"),
    ]
    for given, text in cases:
        with pytest.raises(InputError, match=text):
            given.check(settings())
    StyleData(some).check(settings("loss.aux=0"))


def test_errors_of_the_settings():
    for change, text in (
        ("words.style=", "words.style needs at least one prompt"),
        ("words.template=a photo", "a template with {style} and {content}"),
        ("result.layouts=a1111", "result.layouts holds diffusers, kohya, peft"),
        ("loop.compile=true", "loop.compile: what trains here is part of the UNet"),
        ("loss.form=x0", "loss.form must be one of prediction, clean"),
    ):
        with pytest.raises(InputError, match=text):
            settings(change)
    with pytest.raises(InputError, match="search.prompts and search.seeds need at least one each"):
        settings("loop.validate_every=1", "search.prompts=")
    with pytest.raises(InputError, match="model.dtype is bfloat16; set model.dtype=float32"):
        settings("tune.weights=full", "model.dtype=bfloat16")


def test_whole_weights_learn_slower_unless_told_otherwise():
    from idcore.training.styleforge.config import load_config

    assert load_config(None, [], "x").loop.lr == 1e-4
    assert load_config(None, ["tune.weights=full"], "x").loop.lr == 2e-6
    assert load_config(None, ["tune.weights=full", "loop.lr=1e-3"], "x").loop.lr == 1e-3
    tiny = load_config(None, ["tune.weights=full"])
    assert tiny.loop.lr == 3e-4 and tiny.model.resolution == 64


def test_words():
    words = StyleWords("[V] style", "[W] style")
    assert words.place("a lake") == "a photo of [W] style, a lake"
    assert words.both("a man", "a lake") == "a photo of [V] style, a man, [W] style, a lake"
    assert style_words(words.metadata()) == words and style_words({}) is None
    assert StyleWords("x").place("a lake") == "a photo of x, a lake"
    with pytest.raises(InputError, match="'x' is the only one"):
        StyleWords("x").both("a", "b")
    with pytest.raises(WeightsError, match="idcore_style is damaged"):
        style_words({"idcore_style": "{"})
