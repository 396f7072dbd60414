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


def test_the_page_of_two_thousand_pictures_stays_small(tmp_path):
    for i in range(4):
        Image.new("RGB", (512, 512), (60 * i, 90, 200)).save(tmp_path / f"{i}.png")
    rows = [Row(f"{i % 4}.png", f"a photo of somebody in place {i % 20}", f"p{i % 10}", i) for i in range(2000)]
    result = evaluate(tmp_path, tmp_path / "out", Judges({"embedded": EmbeddedAnalyzer()}), rows=rows)
    page = tmp_path / "out" / "index.html"
    assert page.stat().st_size < 3e6 and result["counts"]["pictures"] == 2000
    text = page.read_text()
    assert text.count("<img") <= 300 and "286 of 2000 pictures, evenly chosen" in text and "<script" not in text
    if chromium.BINARY is None:
        return
    with chromium.Chromium(tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=page.as_uri())
        browser.wait("document.readyState == 'complete'")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
        assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.width <= 140)")
        assert all(r.startswith(("file:", "data:")) for r in browser.requests)


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
