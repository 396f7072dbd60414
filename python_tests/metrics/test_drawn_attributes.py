"""Judges of drawn pictures: right on people they never saw, and strict where a picture is not what was asked."""

import pytest
from PIL import Image

from idcore import prompts
from idcore.errors import InputError
from idcore.metrics.drawn_attributes import AttributeJudge, DrawnExam, check_labels, drawn_photo, table_people
from idcore.training.tiny.people import EXPRESSIONS, POSES
from idcore.training.tiny.prompts import COLOURS, STYLES

FIRST = 5_600_000  # neither the judges' own people nor the tables'


def test_attributes_are_read_on_unseen_people():
    wanted = [
        dict(expression=EXPRESSIONS[i % 3], pose=POSES[i // 3 % 3], style=STYLES[i % 6], background=COLOURS[i % 10])
        for i in range(72)
    ]
    judge = AttributeJudge()
    seen = judge([drawn_photo(FIRST + i, **w) for i, w in enumerate(wanted)])
    for name, least in (("background", 0.98), ("style", 0.85), ("expression", 0.85), ("pose", 0.95)):
        assert sum(getattr(s, name) == w[name] for s, w in zip(seen, wanted)) >= least * len(wanted), name
    assert judge.right["expression"] > 0.9 and judge.right["pose"] > 0.97 and judge([]) == []


def test_a_score_is_high_for_what_was_asked_and_low_for_what_was_not():
    seeds, exam = table_people(4)
    asked = prompts.load("tiny-edits")
    who = [i % 4 for i in range(len(asked))]
    right = [drawn_photo(seeds[i], number=5, **labels) for i, labels in zip(who, asked.labels)]
    good = exam.score(right, who, asked.labels)
    others = exam.score(right, [(i + 1) % 4 for i in who], asked.labels[::-1])
    assert good["rank1"] >= 0.75 and good["adherence"] > 0.9 and good["found"] >= 0.75
    assert others["rank1"] <= 0.25 and others["adherence"] < 0.5 and others["distance"] > good["distance"] + 0.1
    nobody = exam.score([Image.new("RGB", (64, 64), "gray")] * 2, [0, 1], [{"background": "gray"}] * 2)
    assert nobody == {"distance": 1.5, "rank1": 0, "found": 0, "adherence": 1, "background": 1}


def test_a_person_is_the_same_in_every_picture_and_the_seed_decides():
    first = drawn_photo(FIRST)
    assert first.size == (64, 64) and first.tobytes() == drawn_photo(FIRST).tobytes()
    assert first.tobytes() != drawn_photo(FIRST, number=1).tobytes() != drawn_photo(FIRST + 1).tobytes()
    _, exam = table_people(3)
    assert exam.distances(Image.new("RGB", (64, 64))) is None


def test_what_cannot_be_judged_is_said():
    exam = DrawnExam([drawn_photo(s) for s in table_people(2)[0]])
    with pytest.raises(InputError, match="style must be one of photo, pencil, .*, got 'fresco'"):
        drawn_photo(FIRST, style="fresco")
    with pytest.raises(InputError, match="a prompt must ask for one of background, style, .*, got {'kind': 'x'}"):
        check_labels({"kind": "x"})
    with pytest.raises(InputError, match="got 1 pictures, 2 people, 1 labels"):
        exam.score([drawn_photo(FIRST)], [0, 1], [{"pose": "left"}])
    with pytest.raises(InputError, match="references of 2 people, got person 2"):
        exam.score([drawn_photo(FIRST)], [2], [{"pose": "left"}])
    with pytest.raises(InputError, match="references of two people or more, got 1"):
        DrawnExam([drawn_photo(FIRST)])
    with pytest.raises(InputError, match="no face is found in reference 1"):
        DrawnExam([drawn_photo(FIRST), Image.new("RGB", (64, 64))])
