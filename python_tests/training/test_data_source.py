"""Prepared data as a source: one order for any way to share it out, crops, caches, and what is refused."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from data_cases import RedFaces, folder, picture

from idcore.errors import InputError
from idcore.training.data.buckets import bucket_of, bucket_sizes, crop_for
from idcore.training.data.latents import cache_latents
from idcore.training.data.options import PrepareConfig
from idcore.training.data.order import Order, shuffled
from idcore.training.data.prepare import prepare
from idcore.training.data.source import PreparedSource, SourceConfig

SIZES = ((96, 96), (160, 96), (96, 160), (110, 96))


class Halves:
    """A base whose latents are the means of 8x8 pixels, times a factor."""

    def __init__(self, factor=1.0, name="halves"):
        self.factor, self.name, self.seen = factor, name, 0

    def encode_pictures(self, pixels):
        self.seen += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8) * self.factor


def prepared(root, count=13, sizes=SIZES, **options):
    data = folder(root / "data", count, sizes)
    config = PrepareConfig(**{**dict(resolution=64, multiple=16, min_face=16, chunk=3, max_upscale=4.0), **options})
    prepare(data, root / "out", config, RedFaces(), progress=False)
    return root / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("source"), flip=True)


def together(source, step, world, size, count, seed=5):
    """The global batch of a step, put together from all ranks by places."""
    rows = {}
    for rank in range(world):
        for b in source.micro_batches(step, seed, rank, world, size, count):
            assert len(b) == size
            for i, place in enumerate(b.places.tolist()):
                assert place not in rows
                rows[place] = (b.ids[i], b.prompts[i], b.pixels[i], b.sizes[i], b.face["x"][i], b.extra["landmarks"][i])
    assert sorted(rows) == list(range(world * size * count))
    return [rows[p] for p in sorted(rows)]


def test_any_way_to_share_a_step_out_gives_the_same_global_batch(out):
    source = PreparedSource(out, SourceConfig(crop="random", flip=0.5))
    for step in (0, 1, 7):
        first = together(source, step, 1, 4, 1)
        for world, size, count in ((1, 1, 4), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2)):
            other = together(source, step, world, size, count)
            for a, b in zip(first, other):
                assert a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2:], b[2:]))
        assert len({row[2].shape for row in first}) == 1  # one bucket
    assert [r[0] for r in together(source, 3, 1, 4, 1)] != [r[0] for r in together(source, 3, 1, 4, 1, seed=6)]


def test_resuming_equals_going_through(out):
    whole = [together(PreparedSource(out), step, 1, 3, 1) for step in range(9)]
    again = PreparedSource(out, SourceConfig(threads=1))
    for step in (8, 2, 5):
        for a, b in zip(whole[step], together(again, step, 1, 3, 1)):
            assert a[:2] == b[:2] and torch.equal(a[2], b[2])


def test_every_record_is_seen_equally_often():
    """Four buckets, one smaller than a batch: after epochs that fill whole batches of each, all counts are equal."""
    buckets = [np.arange(0, 10), np.arange(10, 12), np.arange(12, 33), np.arange(33, 37)]
    order = Order(buckets, 3, 4)
    steps = 4 * 37 // 4  # four epochs: every bucket's records times 4 are whole batches
    drawn = [order.at(s) for s in range(steps)]
    assert set(Counter(np.concatenate(drawn).tolist()).values()) == {4}
    assert all(len({next(i for i, b in enumerate(buckets) if r in b) for r in batch.tolist()}) == 1 for batch in drawn)
    assert [order.epoch_of(s) for s in range(steps)] == sorted(order.epoch_of(s) for s in range(steps))
    assert order.epoch_of(steps - 1) == 3 and order.epoch_of(steps) == 4
    kinds = [int(b[0]) for b in drawn]
    assert kinds != sorted(kinds) and np.array_equal(Order(buckets, 3, 4).at(20), drawn[20])


def test_the_shuffle_is_pinned():
    assert shuffled(8, 1, 2, 3).tolist() == shuffled(8, 1, 2, 3).tolist() != shuffled(8, 1, 2, 4).tolist()
    assert shuffled(6, 0).tolist() == [0, 3, 5, 1, 2, 4]  # other orders would break resuming across versions


def test_bucket_grid():
    sizes = bucket_sizes(1024, 64, 2.0)
    assert {(1024, 1024), (896, 1152), (1152, 896), (832, 1216), (768, 1344), (1344, 768)} <= set(sizes)
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 1024 * 1024 and max(w, h) <= 2 * min(w, h) for w, h in sizes)
    assert bucket_sizes(64, 64, 2.0) == ((64, 64),)
    assert bucket_of(3000, 2000, sizes) == (1216, 832) or math.isclose(3000 / 2000, 1216 / 832, rel_tol=0.03)
    assert bucket_of(500, 500, sizes) == (1024, 1024)


@pytest.mark.parametrize("where", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
def test_the_face_stays_inside_of_the_crop(where):
    crop = crop_for((400, 200), (64, 64), (300, 60, 340, 110), where)
    x0, y0, x1, y1 = crop.box(np.array([300, 60, 340, 110]), (400, 200))
    assert 0 <= x0 and x1 <= 63 and 0 <= y0 and y1 <= 63 and (crop.width, crop.height) == (128, 64)
    assert crop_for((400, 200), (64, 64), (0, 0, 9, 9), where, mode="centre").left == 32
    wide = crop_for((400, 200), (64, 64), (100, 0, 390, 199), where)  # larger than the crop: its middle
    assert abs((wide.box(np.array([100, 0, 390, 199]), (400, 200))[[0, 2]].sum()) / 2 - 31.5) < 1


def test_landmarks_and_features_follow_the_picture(tmp_path):
    """A face's first red pixel and eyes lie in the crop where box and landmarks say; mirrored, too."""
    out = prepared(tmp_path, 6, ((160, 96), (120, 96)), flip=True)
    for flip in (0.0, 1.0):
        source = PreparedSource(out, SourceConfig(flip=flip, crop="random"))
        for step in range(4):
            (b,) = source.micro_batches(step, 0, 0, 1, 2, 1)
            for i, name in enumerate(b.ids):
                record = next(r for r in source.records if r.id == name)
                red = (b.pixels[i, 0] > 0.5) & (b.pixels[i, 1] < -0.5)
                ys, xs = torch.nonzero(red, as_tuple=True)
                x0, y0, x1, y1 = b.extra["boxes"][i].tolist()
                w, h = b.pixels.shape[-1], b.pixels.shape[-2]
                found = [xs.min(), ys.min(), xs.max(), ys.max()]
                told = [max(x0, 0), max(y0, 0), min(x1, w - 1), min(y1, h - 1)]
                assert all(abs(float(f) - t) <= 1.0 for f, t in zip(found, told)), (name, flip)
                marks = b.extra["landmarks"][i]
                assert marks[0, 0] < marks[1, 0] and marks[3, 0] < marks[4, 0] and marks[2, 1] > marks[0, 1]
                mirrored_x = record.size[0] - 1 - record.box[2]
                assert float(b.face["x"][i]) == pytest.approx(mirrored_x if flip else record.box[0], abs=0.5)
                assert b.sizes[i].tolist()[:2] == record.size[::-1] and b.sizes[i].tolist()[4:] == [h, w]
            assert b.pixels.dtype == torch.float32 and b.pixels.is_contiguous()


def test_latents_are_encoded_once_and_taken(tmp_path):
    out = prepared(tmp_path, 7)
    base = Halves()
    assert cache_latents(out, base, batch=2, progress=False) == 7
    seen = base.seen
    assert cache_latents(out, base, progress=False) == 0 and base.seen <= seen + 2  # the probes
    source = PreparedSource(out)
    source.check_base(base)
    plain = PreparedSource(out, SourceConfig(latents=False, crop="centre"))
    (a,) = source.micro_batches(0, 0, 0, 1, 2, 1)
    (b,) = plain.micro_batches(0, 0, 0, 1, 2, 1)
    assert a.ids == b.ids and a.pixels is None and b.latents is None and a.latents.dtype == torch.float32
    assert a.latents.shape[-2:] == (b.pixels.shape[-2] // 8, b.pixels.shape[-1] // 8)
    record = next(r for r in source.records if r.id == a.ids[0])
    crop = crop_for(record.size, record.bucket, record.box)
    assert a.sizes[0].tolist()[2:4] == [crop.top, crop.left]
    assert source.state() != plain.state()
    with pytest.raises(InputError, match="latents of 'halves', 'other' has another autoencoder; prepare the data for"):
        source.check_base(Halves(2.0, "other"))
    with pytest.raises(InputError, match="holds latents of 'halves', 'halves' has another autoencoder; prepare for it"):
        cache_latents(out, Halves(2.0), progress=False)
    with pytest.raises(InputError, match="resolution and flip cannot be set beside them"):
        PreparedSource(out, SourceConfig(resolution=128))


def test_latents_after_an_interruption_and_a_new_picture(tmp_path):
    out = prepared(tmp_path, 7)

    class Stops(Halves):
        def encode_pictures(self, pixels):
            if self.seen >= 4:
                raise KeyboardInterrupt
            return super().encode_pictures(pixels)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(out, Stops(), batch=1, progress=False)
    with pytest.raises(InputError, match="not all pictures of .* are encoded by 'halves'; run `idcore prepare` with"):
        PreparedSource(out)
    assert 0 < cache_latents(out, Halves(), progress=False) < 7
    PreparedSource(out)
    picture(77).save(tmp_path / "data" / "new.png")
    (tmp_path / "data" / "new.txt").write_text("new")
    config = PrepareConfig(resolution=64, multiple=16, min_face=16, chunk=3, max_upscale=4.0)
    prepare(tmp_path / "data", out, config, RedFaces(), progress=False)
    with pytest.raises(InputError, match="not all pictures"):
        PreparedSource(out)
    assert 0 < cache_latents(out, Halves(), progress=False) < 8
    assert len(PreparedSource(out)) == 8
    picture(5).save(tmp_path / "data" / "new.png")
    (out / "latents" / f"{PreparedSource(out).records[0].chunk}.safetensors").unlink()
    with pytest.raises(InputError, match="new.png .new.png. has changed since it was prepared; run `idcore prepare`"):
        cache_latents(out, Halves(), progress=False)
    picture(77).save(tmp_path / "data" / "new.png")
    with pytest.raises(Exception, match="gave NaN or infinity for .*; encode in float32"):
        (out / "latents.json").unlink()
        [p.unlink() for p in (out / "latents").iterdir()]
        cache_latents(out, Halves(math.inf), progress=False)


def test_other_resolution_and_moved_pictures(tmp_path):
    out = prepared(tmp_path, 4, ((96, 96),))
    (b,) = PreparedSource(out, SourceConfig(resolution=32)).micro_batches(0, 0, 0, 1, 2, 1)
    assert b.pixels.shape == (2, 3, 32, 32)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="data/p00.*cannot be read: No such file.*Run `idcore prepare` again"):
        next(PreparedSource(out).micro_batches(0, 0, 0, 1, 2, 1))
    moved = PreparedSource(out, data=tmp_path / "moved")
    next(moved.micro_batches(0, 0, 0, 1, 2, 1))
    for i in range(4):
        picture(50 + i).save(tmp_path / "moved" / f"p{i:03d}.png")
    with pytest.raises(InputError, match="has changed since it was prepared; run `idcore prepare` again"):
        next(moved.micro_batches(0, 0, 0, 1, 2, 1))


def test_refusals(out, tmp_path):
    with pytest.raises(InputError, match="holds no prepared data; make it with `idcore prepare DATA --out"):
        PreparedSource(tmp_path)
    with pytest.raises(InputError, match="faces system = None, wanted 'pulid'; prepare the data for this run"):
        PreparedSource(out, wanted={"faces system": "pulid"})
    with pytest.raises(InputError, match="a rank below world, got world 2, size 1, count 1, rank 2, step 0"):
        next(PreparedSource(out).micro_batches(0, 0, 2, 2, 1, 1))
    plain = prepared(tmp_path / "plain", 3)
    with pytest.raises(InputError, match="prepared without mirrored face features, so flip must be 0, got 0.5"):
        PreparedSource(plain, SourceConfig(flip=0.5))
    index = plain / "index.jsonl"
    index.write_text(index.read_text().replace("number 1", "number 9"))
    with pytest.raises(InputError, match="is not the one that was prepared; run `idcore prepare` again"):
        PreparedSource(plain)
    (plain / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json is damaged: .*; run `idcore prepare` again"):
        PreparedSource(plain)


def test_lost_features_and_empty_data(tmp_path):
    out = prepared(tmp_path, 3, ((96, 96),))
    for p in (out / "faces").iterdir():
        p.unlink()
    with pytest.raises(InputError, match="does not hold the face features of .*run `idcore prepare` again"):
        next(PreparedSource(out).micro_batches(0, 0, 0, 1, 1, 1))
    (tmp_path / "none").mkdir()
    picture(0, faces=()).save(tmp_path / "none" / "a.png")
    (tmp_path / "none" / "a.txt").write_text("a")
    prepare(tmp_path / "none", tmp_path / "o2", PrepareConfig(resolution=64), RedFaces(), progress=False)
    with pytest.raises(InputError, match=r"holds no picture: all 1 were dropped \(no face 1\)"):
        PreparedSource(tmp_path / "o2")
    assert json.loads((tmp_path / "o2" / "manifest.json").read_text())["records"] == 0
