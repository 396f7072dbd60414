"""Captions encoded once: the same numbers as without, none encoded again, and other text encoders refused."""

import json

import pytest
import torch
from test_data_source import prepared

from idcore.errors import IdcoreError, InputError
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.data.source import PreparedSource, SourceConfig
from idcore.training.data.texts import cache_texts, key_of


def base(kind="sd", seed=0):
    return (SD15Base if kind == "sd" else SDXLBase)(tiny_pipeline(kind, seed), name=f"{kind}{seed}")


def batches(source, count=4):
    return [next(iter(source.micro_batches(s, 1, 0, 1, 4, 1))) for s in range(count)]


def counted(model):
    """The model, and the prompts that it really encodes from now on."""
    seen, real = [], model.texts._encode
    model.texts._encode = lambda prompts: (seen.extend(prompts), real(prompts))[1]
    return seen


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_texts_from_disk_are_those_of_the_encoders(tmp_path, kind):
    out = prepared(tmp_path, 5, ((96, 96),))
    assert cache_texts(out, base(kind), progress=False) == 5
    source = PreparedSource(out)
    fresh, kept = base(kind), base(kind)
    kept.use_texts(source.texts)
    seen = counted(kept)
    for batch in batches(source):
        a, b = (m.text(batch.prompts, 16, 16) for m in (fresh, kept))
        assert torch.equal(a.embeds, b.embeds)
        assert (a.pooled is None and b.pooled is None) or torch.equal(a.pooled, b.pooled)
    assert not seen
    assert torch.equal(kept.text(["", "no caption"], 16, 16).embeds, fresh.text(["", "no caption"], 16, 16).embeds)
    assert seen == ["", "no caption"]


def test_a_second_run_encodes_what_is_missing(tmp_path):
    out = prepared(tmp_path, 7, ((96, 96),))
    cache_texts(out, base(), progress=False)
    assert cache_texts(out, base(), progress=False) == 0
    files = sorted((out / "texts").glob("*.safetensors"))
    gone = files[0].read_bytes()
    files[0].unlink()
    assert 0 < cache_texts(out, base(), progress=False) < 7 and files[0].read_bytes() == gone
    said = json.loads((out / "texts.json").read_text())
    assert said["base"] == "sd0" and said["dtype"] == "float32"


def test_captions_of_several_pictures_are_kept_once(tmp_path):
    from idcore.training.data.texts import _captions

    records = PreparedSource(prepared(tmp_path, 5, ((96, 96),))).records
    for r in records[1:]:
        r.caption = "the same"
    found = _captions(records)
    assert sorted(c for rows in found.values() for c in rows) == sorted({records[0].caption, "the same"})
    assert "the same" in found[records[-1].chunk]


def test_other_text_encoders_are_refused(tmp_path):
    out = prepared(tmp_path, 3, ((96, 96),))
    cache_texts(out, base(), progress=False)
    source = PreparedSource(out)
    for other in (base(seed=1), base("sdxl")):
        with pytest.raises(InputError, match=f"holds texts of 'sd0', '{other.name}' has other text encoders; prepare"):
            source.check_base(other)
        with pytest.raises(InputError, match="other text encoders"):
            other.use_texts(source.texts)
        with pytest.raises(InputError, match="other text encoders"):
            cache_texts(out, other, progress=False)
    half = base()
    half.to("cpu", torch.bfloat16)
    with pytest.raises(InputError, match="holds texts in float32, 'sd0' encodes in bfloat16"):
        half.use_texts(source.texts)
    with pytest.raises(InputError, match="halves has no text encoders whose work is kept; leave --texts out"):
        from test_data_source import Halves

        cache_texts(out, Halves(), progress=False)
    assert PreparedSource(out, SourceConfig(texts=False)).texts is None


def test_what_is_not_whole_is_told(tmp_path):
    out = prepared(tmp_path, 3, ((96, 96),))
    cache_texts(out, base(), progress=False)
    source = PreparedSource(out)
    caption = source.records[0].caption
    path = out / "texts" / f"{source.records[0].chunk}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="does not hold the text of .* run `idcore prepare` with --base and --texts"):
        source.texts(caption)
    said = json.loads((out / "texts.json").read_text())
    (out / "texts.json").write_text(json.dumps({**said, "index": None}))
    with pytest.raises(
        InputError, match="not all captions of .* are encoded by 'sd0'; run `idcore prepare` with --base"
    ):
        PreparedSource(out)
    (out / "texts.json").write_text("{")
    with pytest.raises(InputError, match="texts.json is damaged or missing"):
        PreparedSource(out)


def test_nan_is_never_kept(tmp_path):
    out = prepared(tmp_path, 2, ((96, 96),))
    broken = base()
    caption = PreparedSource(out).records[0].caption
    real = broken.texts._encode
    broken.texts._encode = lambda p: (real(p)[0] * (float("nan") if p == [caption] else 1), None)
    with pytest.raises(IdcoreError, match="sd0 gave NaN or infinity for .*; encode in float32"):
        cache_texts(out, broken, progress=False)
    assert not list((out / "texts").glob(f"*{key_of(caption)}*"))
