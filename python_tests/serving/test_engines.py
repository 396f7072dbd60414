"""Requests of different people in one pass give what each gives alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.serving import DrawRequest, IdentityStore, SdxlEngine, Stopped, TinyEngine, load_engine
from idcore.serving.store import StoreFull, UnknownIdentity, identity_bytes, identity_from_bytes
from idcore.systems.base import AttentionOptions
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}


def never():
    return False


@pytest.fixture(scope="module")
def tiny():
    return TinyEngine()


@pytest.fixture(scope="module")
def sdxl():
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    return SdxlEngine(idcore.IDPipeline(stock, TinySystem(stock.unet, options=AttentionOptions("ortho_v2", 4, 3))))


def tiny_person(seed):
    g = torch.Generator().manual_seed(seed)
    return Identity(torch.randn(1, 260, 128, generator=g), None, "tiny")


def arrays(pictures):
    return [np.asarray(p).astype(int) for made in pictures for p in made]


def together_and_alone(engine, requests):
    for r in requests:
        engine.check(r)
    assert len({engine.key(r) for r in requests}) == 1
    together = arrays(engine.draw(requests, never))
    alone = [a for r in requests for a in arrays(engine.draw([r], never))]
    assert len(together) == len(alone) == sum(r.count for r in requests)
    for a, b in zip(together, alone):
        assert np.abs(a - b).max() <= 1
    for r in requests:
        if any(r.scales):
            nobody = replace(r, people=(), scales=(), regions=None)
            pair = [arrays(engine.draw([x], never))[0] for x in (r, nobody)]
            assert np.abs(pair[0] - pair[1]).max() > 1, "the person should show"
    for i, a in enumerate(alone):
        assert all(np.abs(a - b).max() > 1 for b in alone[:i]), "the requests of this test should differ"


def test_sdxl_batch_of_different_people_scales_regions_and_words(sdxl):
    me, you, third = (sdxl.pipe.system.identity(i) for i in range(3))
    common = dict(guidance=1.5, width=32, height=16, end=0.8)
    together_and_alone(
        sdxl,
        [
            DrawRequest("a dog", people=(me,), scales=(0.8,), seed=3, count=2, **common),
            DrawRequest("a cat", "bad", people=(you, me), scales=(1.2, 0.5), regions="left, right", **common),
            DrawRequest("a dog", people=(third, you), scales=(1.0, 1.0), seed=5, **common),
            DrawRequest("a bird", people=(you,), scales=(1.0,), regions="(1) 1", seed=6, **common),
        ],
    )


def test_sdxl_without_people_and_with_the_same_person(sdxl):
    me = sdxl.pipe.system.identity(0)
    together_and_alone(sdxl, [DrawRequest("a dog", seed=s) for s in (1, 2)])
    together_and_alone(sdxl, [DrawRequest("a dog", people=(me,), scales=(0.7,), seed=s) for s in (1, 2)])
    before = sdxl.pipe.system.projections
    sdxl.draw([DrawRequest("a cat", people=(me,), scales=(0.9,))], never)
    assert sdxl.pipe.system.projections == before  # known from the batch before


def test_tiny_batch_of_different_people(tiny):
    people = [tiny_person(i) for i in range(3)]
    requests = [
        DrawRequest("a photo of a person, red background", people=(p,), scales=(s,), seed=i, end=0.75)
        for i, (p, s) in enumerate(zip(people, (1.0, 0.5, 1.5)))
    ]
    requests += [
        DrawRequest("a sketch", seed=9, end=0.75),
        DrawRequest("a photo", people=(people[0],), scales=(0.0,), end=0.75),
    ]
    together_and_alone(tiny, requests)


def test_keys_part_what_cannot_share_a_pass(sdxl):
    me, long = sdxl.pipe.system.identity(0), sdxl.pipe.system.identity(1, length=9)
    plain = DrawRequest("a dog", people=(me,), scales=(1.0,))
    keys = {sdxl.key(plain), sdxl.key(DrawRequest("a dog"))}
    keys |= {sdxl.key(DrawRequest("a dog", people=(me,), scales=(1.0,), **k)) for k in (
        {"steps": 2}, {"height": 32}, {"guidance": 2.0}, {"start": 0.5}, {"end": 0.5},
    )}  # fmt: skip
    keys |= {sdxl.key(DrawRequest("a dog", people=p, scales=(1.0,) * len(p))) for p in ((long,), (me, long))}
    assert len(keys) == 9
    same = DrawRequest("a cat", "bad", people=(me, me), scales=(0.1, 0.2), seed=4, guidance=0.5, height=16, width=16)
    assert sdxl.key(same) == sdxl.key(plain)


@pytest.mark.parametrize("which", ["tiny", "sdxl"])
def test_drawing_stops_when_nobody_waits(which, tiny, sdxl):
    engine, asked = {"tiny": tiny, "sdxl": sdxl}[which], []

    def stop():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Stopped):
        engine.draw([DrawRequest("a dog", steps=8)], stop)
    assert len(asked) == 3
    a, b = (arrays(engine.draw([DrawRequest("a dog")], never))[0] for _ in range(2))
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "which, how, says",
    [
        ("tiny", {"prompt": " "}, "the prompt is empty; write what to draw"),
        ("tiny", {"width": 512}, "this model draws 64x64 pictures, got 512xNone; leave the size out"),
        ("tiny", {"negative": "bad"}, "no negative prompt and no guidance"),
        ("tiny", {"guidance": 3.0}, "no negative prompt and no guidance"),
        ("tiny", {"people": 2}, "draws one person per picture, got 2; mix identities"),
        ("sdxl", {"steps": 0}, "steps must be 1 to 100, got 0"),
        ("sdxl", {"count": 65}, "count must be 1 to 64, got 65"),
        ("sdxl", {"seed": -1}, "seed must be a whole number from 0"),
        ("sdxl", {"start": 0.5, "end": 0.5}, "start and end must be 0 <= start < end <= 1, got 0.5 and 0.5"),
        ("sdxl", {"end": float("nan")}, "start and end"),
        ("sdxl", {"guidance": float("inf")}, "guidance must be 0 to 30, got inf"),
        ("sdxl", {"people": 9}, "up to 8 people with a scale each, got 9"),
        ("sdxl", {"people": 1, "scales": ()}, "got 1 and 0 scales"),
        ("sdxl", {"people": 1, "scales": (9.0,)}, "scales of identities must be 0 to 5, got 9"),
        ("sdxl", {"width": 17}, "height and width must be multiples of 4, got 16 and 17"),
        ("sdxl", {"width": 4096}, "width and height may be up to 2048, got 4096x16"),
        ("sdxl", {"people": 1, "regions": "left, right"}, "hold 2 people, the request names 1"),
        ("sdxl", {"people": 1, "regions": "nowhere"}, "is no area"),
    ],
)
def test_wrong_requests(which, how, says, tiny, sdxl):
    engine = {"tiny": tiny, "sdxl": sdxl}[which]
    person = tiny_person(0) if which == "tiny" else sdxl.pipe.system.identity(0)
    count = how.get("people", 0)
    how = {"prompt": "a dog", "scales": (1.0,) * count} | how | {"people": (person,) * count}
    with pytest.raises(InputError) as e:
        engine.check(DrawRequest(**how))
    assert says in str(e.value)


def test_people_of_others_are_refused(tiny, sdxl):
    tiny.check_person(tiny_person(0))
    sdxl.check_person(sdxl.pipe.system.identity(0))
    wrong = [
        (tiny, sdxl.pipe.system.identity(0), "made by the system 'tiny-random'"),
        (tiny, Identity(torch.zeros(1, 5, 128), None, "tiny"), r"have \[260, 128\] tokens, got \[5, 128\]"),
        (sdxl, sdxl.pipe.system.identity(0, rows=2), "has one row, got 2"),
        (sdxl, sdxl.pipe.system.identity(0, length=1025), "up to 1024 tokens, got 1025"),
        (SdxlEngine(idcore.IDPipeline(sdxl.pipe.pipe)), sdxl.pipe.system.identity(0), "without an identity system"),
    ]
    for engine, person, says in wrong:
        with pytest.raises(InputError, match=says):
            engine.check_person(person)


def test_load_engine(tmp_path):
    assert isinstance(load_engine("tiny"), TinyEngine)
    with pytest.raises(InputError, match="an embedded model with a system of its own"):
        load_engine("tiny", system="pulid")
    with pytest.raises(WeightsError, match="has no model_index.json; wanted a folder with an SDXL pipeline"):
        load_engine(str(tmp_path))
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    stock.save_pretrained(tmp_path / "sdxl")
    with pytest.raises(WeightsError, match="pulid needs its adapter weights"):
        load_engine(str(tmp_path / "sdxl"))
    small = EncoderConfig(id_dim=8, vit_dim=8, width=8, output_dim=8)
    PuLID(PuLIDConfig.for_unet(stock.unet, small)).save(tmp_path / "pulid.safetensors")
    how = dict(weights=tmp_path / "pulid.safetensors", device="cpu")
    with pytest.raises(WeightsError, match="EVA02-CLIP-L-336: pass --vision"):
        load_engine(str(tmp_path / "sdxl"), **how)
    engine = load_engine(str(tmp_path / "sdxl"), **how, for_photos=False)
    me = Identity(torch.randn(1, 5, 8), torch.randn(1, 5, 8), "pulid-v1")
    engine.check_person(me)
    (picture,) = engine.draw([DrawRequest("a dog", people=(me,), scales=(0.8,))], never)[0]
    assert picture.size == (16, 16)


def test_the_store_and_files():
    store, me = IdentityStore(limit=2), tiny_person(0)
    names = [store.add(me) for _ in range(2)]
    assert len(set(names)) == 2 and store.get(names[0]) is me and len(store) == 2
    with pytest.raises(StoreFull, match="2 identities are enrolled, which is the limit; delete some first"):
        store.add(me)
    store.remove(names[0])
    for use in (store.get, store.remove):
        with pytest.raises(UnknownIdentity, match="is enrolled; enrol the photo"):
            use(names[0])
    again = identity_from_bytes(identity_bytes(me))
    assert torch.equal(again.tokens, me.tokens) and again.system == "tiny"
    with pytest.raises((InputError, WeightsError), match="the file"):
        identity_from_bytes(b"no identity")
