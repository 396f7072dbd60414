"""`idcore evaluate` on an SD 1.5 folder: people that act through the prompt, and what a style changes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import idcore
from idcore.attention.sites import find_sites
from idcore.errors import InputError
from idcore.evaluating import EvaluateRequest, run_evaluation
from idcore.identity import Identity
from idcore.lora_files import Layer, Lora, write_lora
from idcore.metrics.making import naming
from idcore.systems.sefi_files import save_tokens
from idcore.systems.sefi_ide import SeFiTokens, class_word_embeddings
from idcore.testing.tiny_models import tiny_pipeline

PHOTO = Path(idcore.__file__).parent / "assets/photos/astronaut.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An SD 1.5 folder, one person by words and one by stages with a photo each, prompts, and a style."""
    folder = tmp_path_factory.mktemp("words")
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(folder / "base")
    (folder / "people").mkdir()
    torch.manual_seed(0)
    for name in "ab":
        Image.open(PHOTO).save(folder / "people" / f"{name}.png")
    Identity(torch.randn(1, 2, 32), None, "dreamidentity", {}).save(folder / "people" / "a.safetensors")
    tokens = SeFiTokens(class_word_embeddings(pipe, "a"), 5)
    for p in tokens.parameters():
        torch.nn.init.normal_(p, std=0.5)
    save_tokens(folder / "people" / "b.safetensors", tokens.identity("a"))
    layers = {
        ("unet", f"{s.path}.to_v"): Layer(torch.randn(2, 32) * 0.3, torch.randn(s.hidden, 2) * 0.3, 2.0)
        for s in find_sites(pipe.unet)
    }
    write_lora(Lora(layers), folder / "style.safetensors", "kohya", family="sd15")
    (folder / "prompts.txt").write_text("a photo of a person\na person in a garden\n")
    return folder


def request(made, out, **over):
    values = dict(
        out=out, people=str(made / "people"), prompts=str(made / "prompts.txt"), seeds=1, base=str(made / "base"),
        steps=1, width=16, height=16,
    )  # fmt: skip
    return EvaluateRequest(**values | over)


def test_words_and_a_style_against_the_same_without(made, tmp_path):
    plain = run_evaluation(request(made, tmp_path / "plain", without=True))
    assert plain["counts"]["pictures"] == 6 and plain["figures"]["pair.pixel"]["mean"] > 0.001
    assert [r["prompt"] for r in plain["rows"]][:2] == ["a photo of a person"] * 2, "prompts as they were asked for"
    files = {r["person"]: (tmp_path / "plain/pictures" / r["file"]).read_bytes() for r in plain["rows"] if r["person"]}
    assert len(set(files.values())) == 2, "two people, two pictures"
    before = tmp_path / "plain" / "evaluation.json"
    styled = run_evaluation(
        request(made, tmp_path / "styled", without=True, styles=(made / "style.safetensors",), against=before)
    )
    changed = [c["words"] for c in styled["changes"] if c["key"] == "pair.pixel"]
    assert len(changed) == 1 and "4 pairs" in changed[0]
    page = (tmp_path / "styled" / "index.html").read_text()
    assert "Against the earlier evaluation" in page and "pair.pixel" in page
    assert "Against the earlier" not in (tmp_path / "plain" / "index.html").read_text()
    with pytest.raises(InputError, match="made with other settings: style_scale None, now 2.0, styles None"):
        run_evaluation(
            request(made, tmp_path / "plain", without=True, styles=(made / "style.safetensors",), style_scale=2.0)
        )


def test_prompts_must_have_a_place_for_the_person(made, tmp_path):
    assert naming("a photo of a person", "S*") == "a photo of S*" and naming("a cat", None) == "a cat"
    assert naming("S* and a person", "S*") == "S* and a person" and naming("a man", "S*", "a man") == "S*"
    (tmp_path / "cats.txt").write_text("a cat\n")
    with pytest.raises(InputError, match="'a cat' says neither S. nor 'a person'; write S. into the prompts"):
        run_evaluation(request(made, tmp_path / "o", prompts=str(tmp_path / "cats.txt")))
    with pytest.raises(InputError, match='--style: base "tiny" takes none; give --base tiny-sd'):
        run_evaluation(request(made, tmp_path / "p", base="tiny", styles=(made / "style.safetensors",)))
