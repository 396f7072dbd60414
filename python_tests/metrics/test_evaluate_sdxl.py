"""`idcore evaluate` on a random tiny SDXL folder with PuLID, with two recognisers, and over thousands of pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import Colour

import idcore
from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.errors import InputError
from idcore.evaluating import EvaluateRequest, run_evaluation
from idcore.identity import Identity
from idcore.metrics.evaluate import Judges, evaluate
from idcore.metrics.people import read_people
from idcore.metrics.probes import recogniser_key
from idcore.metrics.rows import Row
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import tiny_pipeline

PHOTO = Path(idcore.__file__).parent / "assets" / "photos" / "astronaut.png"


def test_an_sdxl_folder_with_pulid_makes_the_pictures(tmp_path):
    pipe = tiny_pipeline("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    system = PuLID(PuLIDConfig.for_unet(pipe.unet, EncoderConfig("v1", output_dim=32)))
    system.save(tmp_path / "pulid.safetensors")
    (tmp_path / "people").mkdir()
    Image.open(PHOTO).save(tmp_path / "people" / "me.png")
    tokens = torch.randn(1, 10, 32) * 3
    Identity(tokens, torch.zeros(1, 10, 32), system.name, {}).save(tmp_path / "people" / "me.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    request = EvaluateRequest(
        tmp_path / "out", people=str(tmp_path / "people"), prompts=str(tmp_path / "prompts.txt"), seeds=2, without=True,
        base=str(tmp_path / "base"), weights=tmp_path / "pulid.safetensors", steps=2, width=16, height=16,
    )  # fmt: skip
    result = run_evaluation(request)
    assert result["counts"] == {"pictures": 8, "people": 1, "prompts": 2, "unreadable": {}}
    assert result["figures"]["pair.pixel"]["mean"] > 0.001  # the identity does something
    assert result["figures"]["face_found"]["mean"] == 0 and result["figures"]["embedded.own_counted"]["mean"] == 1.5
    assert result["recognisers"]["embedded"]["circular"] == "unknown"  # the identity was made elsewhere
    again = run_evaluation(EvaluateRequest(**{**vars(request), "out": tmp_path / "again"}))
    files = [r["file"] for r in result["rows"]]
    assert [r["file"] for r in again["rows"]] == files
    for file in files:
        a, b = ((tmp_path / o / "pictures" / file).read_bytes() for o in ("out", "again"))
        assert a == b
    with pytest.raises(InputError, match="made with other settings: id_scale 1.0, now 0.5"):
        run_evaluation(EvaluateRequest(**{**vars(request), "id_scale": 0.5}))
    tiny_pipeline("sdxl", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="made with other settings: files '"):
        run_evaluation(request)


def test_a_second_recogniser_is_told_from_the_circular_one(tmp_path):
    (tmp_path / "in").mkdir()
    Image.open(PHOTO).save(tmp_path / "in" / "a.png")
    first = EmbeddedAnalyzer()
    judges = Judges({"embedded": first, "colour": Colour()}, conditioned_by=recogniser_key(first))
    people = read_people(PHOTO)
    result = evaluate(tmp_path / "in", tmp_path / "out", judges, people=people)
    assert {k: r["circular"] for k, r in result["recognisers"].items()} == {"embedded": "yes", "colour": "no"}
    assert result["figures"]["embedded.own"]["mean"] == 0 and result["figures"]["colour.own"]["mean"] == 1
    assert not any("No independent recogniser" in c for c in result["caveats"])
    assert (tmp_path / "out" / "index.html").read_text().count('class="mark">circular<') > 0


def test_thousands_of_pictures(tmp_path):
    """2,000 pictures of 20 people: a second run reads what is there, and the page holds an even choice of them."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    (tmp_path / "people").mkdir()
    rows = []
    for p in range(20):
        (folder / f"p{p}").mkdir(parents=True)
        colour = rng.integers(60, 256, 3)
        Image.new("RGB", (8, 8), tuple(map(int, colour))).save(tmp_path / "people" / f"p{p}.png")
        for i in range(100):
            near = (colour + rng.integers(-50, 51, 3)).clip(0, 255)
            Image.new("RGB", (8, 8), tuple(map(int, near))).save(folder / f"p{p}" / f"{i}.png")
            rows.append(Row(f"p{p}/{i}.png", f"prompt {i % 10}", f"p{p}", i))
    judges, people = Judges({"colour": Colour()}), read_people(tmp_path / "people")
    first = evaluate(folder, tmp_path / "out", judges, people=people, rows=rows)
    second = evaluate(folder, tmp_path / "out", judges, people=people, rows=rows)
    assert second["figures"] == first["figures"] and first["figures"]["colour.rank1"]["n"] == 2000
    page = (tmp_path / "out" / "index.html").read_text()
    assert "286 of 2000 pictures, evenly chosen" in page and page.count("<img") == 286 + 20 + 12
