"""The page of `idcore evaluate` in headless Chromium: pictures and changes show, nothing comes from elsewhere."""

from dataclasses import replace
from pathlib import Path

import chromium
import pytest
from PIL import Image

import idcore
from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.metrics.against import compare
from idcore.metrics.evaluate import Judges, evaluate
from idcore.metrics.people import read_people
from idcore.metrics.report import write_page
from idcore.metrics.rows import Row

PHOTO = Path(idcore.__file__).parent / "assets/photos/astronaut.png"


@pytest.mark.skipif(chromium.BINARY is None, reason="no chromium on this machine")
def test_a_style_against_the_same_without(tmp_path):
    photo = Image.open(PHOTO).convert("RGB")
    for look, made in (("plain", photo), ("styled", photo.point(lambda v: v // 2))):
        (tmp_path / look).mkdir()
        for seed in range(3):
            made.save(tmp_path / look / f"{seed}.png")
    rows = [Row(f"{s}.png", "a photo of <b>S*</b>", "astronaut", s) for s in range(3)]
    people, judges = read_people(PHOTO), Judges({"embedded": EmbeddedAnalyzer()})
    before, after = (
        evaluate(tmp_path / look, tmp_path / f"{look}-out", judges, people=people, rows=[replace(r) for r in rows])
        for look in ("plain", "styled")
    )
    after["changes"] = [{"key": c.key, "words": str(c)} for c in compare(before, after)]
    page = write_page(after, tmp_path / "styled-out" / "index.html", tmp_path / "styled", {"astronaut": PHOTO})
    with chromium.Chromium(tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=page.as_uri())
        browser.wait("document.readyState == 'complete'")
        text = browser.text()
        assert "Against the earlier evaluation" in text and "embedded.own " in text and "3 pairs: worse" in text
        assert "a photo of <b>S*</b>" in text and browser.evaluate("document.querySelectorAll('b').length") > 0
        shown = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
        assert browser.evaluate(shown) == browser.evaluate("document.images.length") == 4
        assert all(r.startswith(("file:", "data:")) for r in browser.requests)
