"""Drawn styles, their judge, and the experiment's tables."""

import json

import numpy as np
import pytest
from PIL import Image

from idcore.systems.styleforge import StyleWords
from idcore.training.styleforge import exam, experiment
from idcore.training.styleforge.drawn import ALL, Styles, person, place


@pytest.fixture(scope="module")
def styles():
    return Styles(people=40, unseen=8)


def test_the_judge_knows_styles_of_people_it_never_saw(styles):
    assert styles.names == list(ALL) and styles.right > 0.75
    assert styles(person(6_900_000, ["duotone", "pencil"])) == ["duotone", "pencil"]


def test_drawings_hang_on_their_seed_alone():
    one, two = person(5, ["oil", "duotone"], "blue")
    assert one.size == (64, 64) and np.asarray(one)[1, 1].tolist() == np.asarray(two)[1, 1].tolist()  # the same wall
    assert np.array_equal(np.asarray(one), np.asarray(person(5, ["oil"], "blue")[0]))
    assert np.array_equal(np.asarray(place(3, "pencil")), np.asarray(place(3, "pencil")))
    assert np.asarray(place(3, "pencil")).std() > 1


def test_sets_of_pictures_by_method(monkeypatch):
    for name, count in (("PEOPLE", 2), ("PLACES", 1), ("AUX", 2)):
        monkeypatch.setattr(experiment, name, count)
    mixed = experiment.data_of("duotone", 0, multi=False)
    apart = experiment.data_of("duotone", 0, multi=True)
    assert len(mixed.style_ref) == 3 and len(mixed.aux) == 2 and not mixed.multi
    assert (len(apart.people), len(apart.backgrounds)) == (2, 1)
    first = experiment.AUX_SEED + 100 * experiment.TARGETS.index("duotone")
    by_turns = [person(first + i, [s])[0] for i, s in enumerate(("pencil", "oil"))]  # never the target itself
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(mixed.aux, by_turns)] == [True, True]
    assert np.array_equal(np.asarray(mixed.style_ref[0]), np.asarray(apart.people[0]))
    other = experiment.data_of("duotone", 1, multi=False)
    assert not np.array_equal(np.asarray(mixed.style_ref[0]), np.asarray(other.style_ref[0]))


def test_the_way_to_a_style_is_0_at_its_begin_and_1_at_its_end(styles):
    walls = ["blue", "red"]
    drawn = (
        [person(6_950_000 + i, [s], walls[i % 2])[0] for i in range(8)] for s in ("photo", "sepia", "oil", "pencil")
    )
    photo, sepia, oil, pencil = drawn
    assert styles.way(photo, photo, "pencil", walls) == 0
    assert styles.way(photo, pencil, "pencil", walls) == pytest.approx(1, abs=0.3)
    assert 0.5 > styles.way(photo, sepia, "pencil", walls) > 0.05 > 0 > styles.way(photo, oil, "pencil", walls)


class TestExam:
    @pytest.fixture(scope="class")
    def made(self):
        from idcore.training.bases.tiny_sd import TinySDBase

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exam, "SEEDS", (100,))
            patch.setattr(exam, "Styles", lambda: Styles(people=20, unseen=4))
            yield exam.Exam(TinySDBase.from_package())

    def test_the_base_alone_is_a_photo_of_what_was_asked_for(self, made):
        words = StyleWords("[V] style")
        made.remember(words)
        figures, pictures = made("pencil", words)
        assert list(figures) == list(exam.MEASURES) and len(pictures) == 15
        assert figures["way"] == pytest.approx(0, abs=1e-6) and figures["style"] == figures["all"] == 0
        assert figures["background"] > 0.8 and figures["plain"] > 0.8 and figures["nobody"] == 1

    def test_guidance_reaches_the_pipeline(self, made, monkeypatch):
        asked = []
        pipe = made.base.pipe

        def spy(prompts, **options):
            asked.append(options["guidance_scale"])
            return pipe(prompts, **options)

        monkeypatch.setattr(made.base, "pipe", spy)
        made.remember(StyleWords("a word"), 3.0)
        assert asked == [3.0] and ("a word", 3.0) in made.before

    def test_a_style_that_the_base_knows_is_found_and_counts(self, made):
        made.remember(StyleWords("[V] style"))
        pencil = StyleWords("a pencil drawing", template="{style} of {content}")
        made.before[pencil.style, 1.0] = made.before["[V] style", 1.0]
        figures, _ = made("pencil", pencil)
        assert figures["style"] > 0.3 and figures["way"] > 0.3
        assert figures["all"] <= min(figures[k] for k in ("style", "background", "face"))
        by_word = made.by_word()["pencil"]
        assert by_word["style"] == figures["style"] and by_word["way"] > 0.3


def test_the_report_shows_means_over_seeds_and_their_spread(tmp_path):
    rows = []
    for seed in (0, 1):
        for method in (*experiment.METHODS, *([experiment.UNTRAINED] if seed == 0 else [])):
            folder = tmp_path / f"seed{seed}" / "oil" / method.replace(" ", "-")
            folder.mkdir(parents=True)
            for guidance in (2.0, 1.0):
                picture = experiment.measures_of(folder, guidance).with_suffix(".png")
                Image.new("RGB", (128, 64), (seed * 90, 0, int(guidance))).save(picture)
                figures = dict.fromkeys(exam.MEASURES, 1.0) | {"style": seed / 2 / guidance}
                rows.append({"seed": seed, "target": "oil", "method": method, "guidance": guidance, **figures})
    by_word = {"pencil": {"style": 0.0, "way": 0.1}, "oil": {"style": 0.125, "way": 0.2}}
    training = {"steps": 7, "samples": 448}
    found = {
        "judge": {"right": 0.951, "shipped base by word": {"pencil": {"style": 1.0, "way": 0.75}}},
        "base": {"name": "made/model", "by word": by_word, "training": training}, "rows": rows,
    }  # fmt: skip
    written = experiment.report(tmp_path, found, ["loop.lr=1"], tmp_path / "docs")
    page = written[1].read_text()
    guided, plain = page.split("## Drawn with guidance 1")
    assert "## Drawn with guidance 2" in guided and "| StyleForge | 0.12 ± 0.12 | 1.00 ± 0.00 |" in guided
    assert "| StyleForge | 0.25 ± 0.25 | 1.00 ± 0.00 |" in plain and "| no training | 0.00 | 1.00 |" in plain
    assert "right for 95.1%" in page and "loop.lr=1" in page
    assert "7 steps, 448 samples" in page and "by its name: pencil 0.00, oil 0.12." in page
    assert "by name: pencil 0.75." in page
    assert json.loads(written[0].read_text())["rows"] == rows
    assert Image.open(written[2]).size == (128, 2 * (14 + 4 * 64))
    del found["base"]["training"]
    experiment.report(tmp_path, found, [], tmp_path / "docs")
    assert "Base: the shipped tiny-sd, which knows the styles" in written[1].read_text()
