"""`idcore evaluate` on the embedded model: figures by hand, nothing twice, killed and gone on, the page, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny_clip
from typer.testing import CliRunner

from idcore import cli
from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.encoders.face import Chooses, Face
from idcore.errors import InputError, NoFaceError
from idcore.evaluating import EvaluateRequest, run_evaluation
from idcore.metrics import figures, probes
from idcore.metrics.evaluate import Judges, evaluate
from idcore.metrics.people import Person, read_people
from idcore.metrics.rows import Row, read_rows
from idcore.metrics.similarity import ARCFACE_COSINE
from idcore.metrics.store import Store


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "two.json"
    entries = [
        {"text": "a photo of a person, blue background", "background": "blue", "style": "photo"},
        {"text": "a pencil drawing of a person, white background", "background": "white", "style": "pencil"},
    ]
    path.write_text(json.dumps({"format": "idcore-prompts", "name": "two", "prompts": entries}))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, prompts):
    """Two drawn people, two prompts, one seed, with twins, CLIP, features and real pictures: (request, result)."""
    out = tmp_path_factory.mktemp("evaluated")
    save_tiny_clip(out / "clip")
    request = EvaluateRequest(
        out, people="drawn:2", prompts=str(prompts), seeds=1, without=True, clip=out / "clip", features="embedded",
        real=out / "people",
    )  # fmt: skip
    return request, run_evaluation(request)


def test_every_figure_is_there_and_the_json_is_the_result(done):
    request, result = done
    assert json.loads((request.out / "evaluation.json").read_text()) == result
    wanted = {"face_found", "embedded.own", "embedded.rank1", "embedded.other", "background", "style", "clip_text"}
    wanted |= {
        "clip_image",
        "pair.pixel",
        "pair.ssim",
        "pair.clip",
        "pair.features",
        "fid",
        "kid",
        "without.face_found",
    }
    assert wanted <= result["figures"].keys()
    for key, f in result["figures"].items():
        assert f["words"] and f["better"] in ("higher", "lower", "") and np.isfinite(f["mean"]), key
    assert result["figures"]["embedded.own"]["n"] == 4 and result["figures"]["without.face_found"]["n"] == 2
    assert result["counts"] == {"pictures": 6, "people": 2, "prompts": 2, "unreadable": {}}
    assert result["figures"]["background"]["mean"] == 1.0  # what the shipped model does
    assert result["recognisers"]["embedded"]["circular"] == "yes"
    assert any("circular" in c for c in result["caveats"]) and any("fewer pictures" in c for c in result["caveats"])


def test_identity_scores_are_those_of_the_gates_judge(done):
    request, result = done
    judge = EmbeddedAnalyzer(min_score=0.8)
    photos = {p: Image.open(request.out / "people" / f"{p}.png") for p in result["people"]}
    gallery = {p: judge.embed(photo, judge.detect(photo)[0]) for p, photo in photos.items()}
    for row in (r for r in result["rows"] if r["person"]):
        large = Image.open(request.out / "pictures" / row["file"]).resize((256, 256), Image.Resampling.BICUBIC)
        found = judge.embed(large, judge.detect(large)[0])
        d = {p: float(np.linalg.norm(found - g)) for p, g in gallery.items()}
        own = d.pop(row["person"])
        assert row["scores"]["embedded.own"] == pytest.approx(own, abs=1e-4)
        assert row["scores"]["embedded.margin"] == pytest.approx(min(d.values()) - own, abs=1e-4)
        assert row["scores"]["embedded.rank1"] == float(own < min(d.values()))


def test_a_second_run_makes_and_measures_nothing(done, monkeypatch):
    request, result = done

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(probes, "_measure", never)
    monkeypatch.setattr("idcore.sampling.tiny_pipeline.TinyPipeline.__call__", never)
    again = run_evaluation(request)
    assert again["figures"] == result["figures"] and again["rows"] == result["rows"]


def test_other_settings_do_not_mix_into_one_folder(done):
    request, _ = done
    with pytest.raises(InputError, match="made with other settings: steps 4, now 2; choose another --out"):
        run_evaluation(EvaluateRequest(request.out, people="drawn:2", prompts=request.prompts, seeds=1, steps=2))


def test_against_itself_nothing_got_worse_and_against_better_it_did(done, tmp_path):
    request, result = done
    before = json.loads(json.dumps(result))
    for row in before["rows"]:
        if "embedded.own" in row["scores"]:
            row["scores"]["embedded.own"] -= 0.1
    (tmp_path / "before.json").write_text(json.dumps(before))
    (tmp_path / "same.json").write_text(json.dumps(result))
    args = ["evaluate", "--out", request.out, "--people", "drawn:2", "--prompts", request.prompts, "--seeds", 1]
    args += ["--without", "--clip", request.clip, "--features", "embedded", "--real", request.real]
    same = CliRunner().invoke(cli.app, [str(a) for a in (*args, "--against", tmp_path / "same.json")])
    assert same.exit_code == 0 and "nothing worse beyond its interval" in same.stdout
    worse = CliRunner().invoke(cli.app, [str(a) for a in (*args, "--against", tmp_path / "before.json")])
    assert worse.exit_code == 1 and "worse beyond the interval: embedded.own\n" in worse.stdout


def test_the_page_holds_everything_itself(done):
    request, result = done
    page = (request.out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6 + 2  # pictures and one photo a person
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page and "src=" in page
    for key in result["figures"]:
        assert f"<code>{key}</code>" in page
    assert page.count('class="mark">circular<') > 3 and "<svg" in page


def test_what_users_write_cannot_become_markup(tmp_path):
    picture = Image.new("RGB", (32, 32), "blue")
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text('<script>alert(1)</script> & "x"')
    evaluate(tmp_path / "in", tmp_path / "out", Judges({"<b>": EmbeddedAnalyzer()}))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<code><b>" not in page


class Colour(Chooses):
    """An analyzer by hand: a face wherever a picture is not black; its embedding is the mean colour."""

    name, measure, provider = "colour", ARCFACE_COSINE, "none"

    def detect(self, image):
        a = np.asarray(image)
        return [Face(np.array([0, 0, 9, 9.0]), 1.0, np.zeros((5, 2)), image.size)] if a.any() else []

    def embed(self, image, face):
        return np.asarray(image, np.float32).mean((0, 1))


def test_figures_by_hand_with_a_missing_face_and_unreadable_files(tmp_path):
    folder, people = tmp_path / "in", {"r": (255, 0, 0), "g": (0, 255, 0)}
    (tmp_path / "people").mkdir()
    for name, colour in people.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (300, 300), colour).save(tmp_path / "people" / f"{name}.png")
    for file, colour in (("r/1", (200, 0, 0)), ("r/2", (100, 200, 0)), ("r/3", (0, 0, 0)), ("g/1", (0, 9, 0))):
        Image.new("RGB", (300, 300), colour).save(folder / f"{file}.png")
    (folder / "g" / "2.png").write_bytes(b"no picture")
    result = evaluate(folder, tmp_path / "out", Judges({"colour": Colour()}), people=read_people(tmp_path / "people"))
    means = {k: f["mean"] for k, f in result["figures"].items()}
    tilted = 1 / np.sqrt(5)
    assert means["face_found"] == pytest.approx(3 / 4)  # of the four that can be read
    assert means["colour.own"] == pytest.approx((1 + tilted + 1) / 3, abs=1e-5)
    assert means["colour.own_counted"] == pytest.approx((1 + tilted + 0 + 1 + 0) / 5, abs=1e-5)
    assert means["colour.same_person"] == pytest.approx(3 / 5) and means["colour.rank1"] == pytest.approx(2 / 5)
    assert means["colour.other"] == pytest.approx((0 + 2 * tilted + 0) / 3, abs=1e-5)
    assert list(result["counts"]["unreadable"]) == ["g/2.png"]
    assert result["recognisers"]["colour"]["circular"] == "unknown"
    assert result["people"] == ["g", "r"]
    np.testing.assert_allclose(
        result["recognisers"]["colour"]["matrix"], [[1, 0], [tilted, (1 + tilted) / 2]], atol=1e-4
    )


class Mean:
    key, words = "mean", "mean colour"

    def __call__(self, pictures):
        return np.stack([np.asarray(p, np.float32).mean((0, 1)) for p in pictures])


def test_a_twin_that_cannot_be_read_is_told_and_left_out(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("a0", "red")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    (folder / "b0.png").write_bytes((folder / "b.png").read_bytes()[:60])
    lines = [json.dumps({"file_name": f"{n}.png", "person": "me", "without": f"{n}0.png"}) for n in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for _ in range(2):  # the second time from the store
        result = evaluate(folder, tmp_path / "out", Judges({"c": Colour()}, features=Mean()))
        figures = result["figures"]
        assert figures["pair.pixel"]["n"] == figures["pair.ssim"]["n"] == figures["pair.features"]["n"] == 1
        assert figures["pair.features"]["mean"] == pytest.approx(1.0)
        assert list(result["counts"]["unreadable"]) == ["b0.png"]


def test_one_person_is_whom_all_pictures_show(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for file, colour in (("1", (200, 0, 0)), ("2", (0, 200, 0))):
        Image.new("RGB", (300, 300), colour).save(folder / f"{file}.png")
    Image.new("RGB", (300, 300), "red").save(tmp_path / "me.png")
    result = evaluate(folder, tmp_path / "out", Judges({"c": Colour()}), people=read_people(tmp_path / "me.png"))
    assert [(r["person"], r["scores"]["c.own"]) for r in result["rows"]] == [("me", 1.0), ("me", 0.0)]
    assert "c.rank1" not in result["figures"]  # nobody else to be mistaken for


def test_similarity_in_parts_is_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 8)), rng.normal(size=(7, 8))
    monkeypatch.setattr(figures, "SAMPLE", 10)
    np.testing.assert_array_equal(figures.rowwise(ARCFACE_COSINE, a, b), ARCFACE_COSINE.matrix(a, b))
    rows = [Row(f"{i}.png", person="ab"[i % 2]) for i in range(50)]
    found = figures.diversity("x", ARCFACE_COSINE, rows, list(a), figures.Gallery(["a", "b"], [b[:3], b[3:]]))
    assert all(np.isfinite(v) for v in found.values())


def test_a_store_knows_contents_not_names(tmp_path):
    calls = []

    class Probe:
        key, words = "k", "w"

        def look(self, pictures):
            calls.append(len(pictures))
            return [({"v": p.getpixel((0, 0))[0]}, np.ones(2)) for p in pictures]

    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{n}.png" for n in "abc"]
    with Store(tmp_path / "s") as store:
        said = [r[0]["v"] for r in probes.run_probe(store, Probe(), files)]
    assert said == [1, 1, 2] and calls == [2]
    Image.new("RGB", (8, 8), (7, 0, 0)).save(files[0])
    files[1].rename(tmp_path / "d.png")
    with Store(tmp_path / "s") as store:
        again = probes.run_probe(store, Probe(), [files[0], tmp_path / "d.png", files[1]])
    assert calls == [2, 1] and [r and r[0]["v"] for r in again] == [7, 1, None]
    (tmp_path / "bad").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match="cannot be used as the store .* choose another --out, or delete it"):
        Store(tmp_path / "bad")


KILLED = """
import sys
from pathlib import Path
from idcore.evaluating import EvaluateRequest, run_evaluation
run_evaluation(EvaluateRequest(Path(sys.argv[1]), people="drawn:2", prompts=sys.argv[2], seeds=3))
"""


def test_killed_at_any_time_it_goes_on(tmp_path, prompts):
    """kill -9 while pictures are made, then while they are measured; the result is that of an undisturbed run."""
    out = tmp_path / "out"
    args = [sys.executable, "-c", KILLED, str(out), str(prompts)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    stages = [lambda: len(list(out.glob("pictures/*/*.png"))) > 4, lambda: _measured(out) > 2]
    for reached in stages:
        process = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not reached() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "evaluation.json").exists() or reached()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed processes: to the bit
    try:
        resumed, whole = (
            run_evaluation(EvaluateRequest(o, people="drawn:2", prompts=str(prompts), seeds=3))
            for o in (out, tmp_path / "whole")
        )
    finally:
        torch.set_num_threads(threads)
    assert resumed["rows"] == whole["rows"] and resumed["figures"] == whole["figures"]


def _measured(out: Path) -> int:
    try:
        with Store(out / "scores.sqlite") as store:
            return store._db.execute("SELECT COUNT(*) FROM results").fetchone()[0] if out.exists() else 0
    except (InputError, OSError):
        return 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1 of .* is not JSON"),
        ('{"prompt": "x"}', 'line 1 of .* has no "file_name"'),
        ('{"file_name": "../x.png"}', "lies outside of the folder"),
        ('{"file_name": "x.png", "seed": "1"}', "seed must be a whole number, got '1'"),
        ('{"file_name": "x.png", "prompt": 3}', "prompt must be a text, got 3"),
        ('{"file_name": "x.png", "labels": [1]}', "labels must be an object"),
    ],
)
def test_metadata_that_is_refused(tmp_path, line, said):
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        read_rows(tmp_path)


def test_folders_are_read_in_three_forms(tmp_path):
    for file in ("a/1.png", "2.png", "3.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    (tmp_path / "a" / "1.txt").write_text("beside\n")
    (tmp_path / "generate.json").write_text('{"request": {"prompt": "noted", "seed": 5}, "pictures": ["2.png"]}')
    rows = {r.file: r for r in read_rows(tmp_path)}
    assert rows["a/1.png"] == Row("a/1.png", "beside", "a") and rows["2.png"] == Row("2.png", "noted", "", 5)
    assert rows["3.jpg"] == Row("3.jpg")
    line = Row("a/1.png", "p", "a", 0, "2.png", {"style": "oil"})
    (tmp_path / "metadata.jsonl").write_text(line.as_json())
    assert read_rows(tmp_path) == [line]
    with pytest.raises(InputError, match="is no folder"):
        read_rows(tmp_path / "none")


def test_requests_that_are_refused(tmp_path):
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (300, 300), "blue").save(picture)
    for request, said in (
        ({}, "wanted pictures to judge .*or people"),
        ({"pictures": picture.parent, "conditioned_by": "me"}, "--conditioned-by is one of"),
        ({"pictures": picture.parent, "without": True}, "--without makes pictures"),
        ({"pictures": picture.parent, "second_faces": "embedded"}, "a second opinion needs another network"),
        ({"pictures": picture.parent, "real": picture.parent}, "need a feature network; name one with --features"),
        ({"pictures": picture.parent, "against": picture}, "cannot be read as an evaluation"),
        ({"people": "drawn:x"}, 'wanted "drawn:" with a number'),
        ({"people": str(picture), "base": "tiny-sd"}, "evaluate: nothing that ships .* then copy .* beside the photo"),
        ({"people": str(tmp_path / "nobody")}, "neither a photo nor a folder"),
    ):
        with pytest.raises(InputError, match=said):
            run_evaluation(EvaluateRequest(tmp_path / "out", **request))
    with pytest.raises(NoFaceError, match="colour finds no face in .* of 'x'; use another photo"):
        dark = tmp_path / "dark.png"
        Image.new("RGB", (300, 300)).save(dark)
        evaluate(picture.parent, tmp_path / "out", Judges({"colour": Colour()}), people=[Person("x", (dark,))])
    with pytest.raises(InputError, match="pictures show 'y', of whom there is no photo among x"):
        rows = [Row("a.png", person="y")]
        judges = Judges({"colour": Colour()})
        evaluate(picture.parent, tmp_path / "out", judges, people=[Person("x", (picture,))], rows=rows)
