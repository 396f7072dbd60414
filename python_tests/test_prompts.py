"""Prompt sets: what ships, what a user brings, and what is refused."""

import json

import pytest

from idcore import prompts
from idcore.errors import InputError
from idcore.metrics import gate


@pytest.mark.parametrize("name", prompts.names())
def test_every_shipped_set_names_its_source(name):
    found = prompts.load(name)
    assert found.name == name and found.source and found.about
    assert len(found) == len(found.labels) == len(set(found)) and all(p == p.strip() and p for p in found)
    assert not any("{" in p for p in found)


def test_the_papers_sets_have_the_papers_sizes():
    assert len(prompts.load("pulid-evaluation")) == 20 and len(prompts.load("pulid-alignment")) == 15
    assert prompts.load("pulid-alignment")[0] == prompts.load("pulid-id-loss")[0] == "portrait, color, cinematic"
    assert all(p.startswith("portrait") for p in (*prompts.load("pulid-evaluation"), *prompts.load("pulid-alignment")))


def test_the_sets_of_the_word_systems_name_a_person_by_placeholder():
    for name, who in (("dreamidentity-edits", "S*"), ("sefi-ide-edits", "V*"), ("sefi-ide-training", "V*")):
        assert all(who in p for p in prompts.load(name)) and all("A*" in p for p in prompts.load(name, person="A*"))
    edits = prompts.load("dreamidentity-edits")
    assert edits.texts[:2] == ("S* as nurse", "Watercolor style, S* face") and len(edits.where(kind="scene")) == 4
    kinds = {labels["kind"] for labels in prompts.load("sefi-ide-edits").labels}
    assert kinds == {"scene", "action", "expression", "attribute"}
    assert all(len(n.split()) == 2 for n in prompts.load("dreamidentity-names"))


def test_the_gate_reads_its_prompts_from_the_set():
    tiny = prompts.load("tiny")
    assert gate.PROMPTS == tuple((t, labels["background"]) for t, labels in zip(tiny, tiny.labels))
    assert len(gate.PROMPTS) == 8 and gate.PROMPTS[0] == ("a photo of a person, blue background", "blue")
    assert {labels["style"] for labels in tiny.labels} == {"photo", "pencil", "oil", "cartoon", "sepia", "night"}


def test_placeholders_are_filled_and_labels_select():
    found = prompts.load("multi-styleforge-training", person_style="sks style")
    assert found.texts == ("A sks style", "A [W] style", "style")
    assert found.where(role="aux") == ("style",)
    with pytest.raises(InputError, match="no placeholder 'styl'; it has .*person_style"):
        prompts.load("styleforge-training", styl="x")


def test_a_users_own_files(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("a dog {running}\n\n  a cat  \n")
    assert prompts.load(text).texts == ("a dog {running}", "a cat")
    data = tmp_path / "mine.json"
    body = {"format": "idcore-prompts", "prompts": ["a dog", {"text": "a cat", "style": "oil"}]}
    data.write_text(json.dumps(body))
    assert prompts.load(str(data)).labels == ({}, {"style": "oil"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "another form; wanted"),
        ("{", "is not JSON"),
        ('{"format": "idcore-prompts", "prompts": []}', "holds no prompts"),
        ('{"format": "idcore-prompts", "prompts": [3]}', "entry 1 .* wanted a text"),
        ('{"format": "idcore-prompts", "placeholders": {"a": "b"}, "prompts": ["{c}"]}', "placeholder 'c'"),
    ],
)
def test_what_is_refused(tmp_path, content, said):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        prompts.load(path)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="none of the shipped sets: .*pulid-alignment"):
        prompts.load("pulid-alignement")
