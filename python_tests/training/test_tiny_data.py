"""The procedural world of the embedded model: determinism, ranges, and what the batches promise."""

import numpy as np
import pytest
import torch

from idcore.errors import InputError
from idcore.training.tiny import people, renderer, styles, textures
from idcore.training.tiny.data import TinyData
from idcore.training.tiny.pool import TRAIN_SEED, Pool, make_pool, render_person, write_shard
from idcore.training.tiny.prompts import BACKGROUNDS, STYLES, write_prompt


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    make_pool(folder, shards=2, people=6)
    return folder


def test_same_seed_same_bytes_and_other_seed_other_person():
    a, labels = render_person(5)
    b, _ = render_person(5)
    c, _ = render_person(6)
    assert a.shape == (2, 96, 96, 4) and a.dtype == np.uint8 and labels.shape == (2, 2)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_renderer_puts_the_eyes_where_the_aligner_wants_them():
    """The renderer's own landmarks, moved by its alignment, lie near the recogniser's template."""
    from idcore.encoders.align import template

    want = template("dlib", 1, 0.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        person = people.sample_person(rng)
        head = renderer._Head(person, people.sample_view(rng, "neutral", "front"), 96, renderer.SPAN / 96)
        points = head.points() * head.scale + [head.dx, head.dy] + [0.49, 0.0]
        assert np.abs(points - want).max() < 0.1


def test_person_covers_the_middle_and_leaves_the_corners():
    for seed in range(10):
        cover = render_person(seed)[0][0, ..., 3]
        assert cover[48, 48] == 255
        assert cover[2, 2] < 128 and cover[2, -3] < 128


def test_expressions_and_poses_change_the_picture():
    rng = np.random.default_rng(0)
    person = people.sample_person(rng)
    front = people.sample_view(np.random.default_rng(1), "neutral", "front")
    base = renderer.render(person, front).astype(int)
    for change in ({"expression": "smiling", "strength": 1.0, "open": 1.0}, {"pose": "left", "yaw": -0.35}):
        assert np.abs(renderer.render(person, {**front, **change}).astype(int) - base).mean() > 1.0


def test_pool_reads_back_what_was_rendered(pool):
    p = Pool(pool)
    assert len(p) == 12
    pictures, labels = p.get(np.array([7, 0]))
    for k, index in enumerate((7, 0)):
        wanted, wanted_labels = render_person(TRAIN_SEED + index)
        assert np.array_equal(pictures[k], wanted) and np.array_equal(labels[k], wanted_labels)


def test_a_finished_shard_is_not_rendered_again_and_no_part_is_left(pool):
    before = (pool / "people_0000.npy").stat().st_mtime_ns
    write_shard(pool, 0, 6)
    assert (pool / "people_0000.npy").stat().st_mtime_ns == before
    assert not list(pool.glob("*.part"))


def test_pool_errors_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="render a pool first"):
        Pool(tmp_path)
    with pytest.raises(InputError, match="at least one shard"):
        make_pool(tmp_path, shards=0)


def test_batches_are_a_function_of_seed_and_step(pool):
    a, b = TinyData(pool, seed=3, textures=8).batch(4, 5), TinyData(pool, seed=3, textures=8).batch(4, 5)
    c = TinyData(pool, seed=3, textures=8).batch(5, 5)
    assert torch.equal(a.ref, b.ref) and torch.equal(a.target, b.target) and a.prompts == b.prompts
    assert not torch.equal(a.ref, c.ref)
    assert a.ref.shape == (5, 3, 96, 96) and a.target.shape == (5, 3, 64, 64)
    for x in (a.ref, a.target, c.ref, c.target):
        assert float(x.min()) >= 0 and float(x.max()) <= 1 and torch.isfinite(x).all()


def test_target_shows_the_background_that_its_prompt_names(pool):
    batch = TinyData(pool, seed=0, textures=8).batch(1, 40)
    checked = 0
    for k, prompt in enumerate(batch.prompts):
        names = [n for n in BACKGROUNDS if n in prompt.replace("grey", "gray").split() or f"{n}," in prompt.split()]
        open_wall = batch.face[k, 0] < 0.02
        if len(names) != 1 or int(open_wall.sum()) < 40:
            continue
        colour = batch.target[k][:, open_wall].median(1).values * 255
        want = torch.tensor(BACKGROUNDS[names[0]]).float()
        assert float((colour - want).abs().max()) < 70
        checked += 1
    assert checked > 15


def test_prompts_name_what_they_are_asked_to_name():
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = write_prompt(rng, "photo", "blue", None, "left")
        assert "blue" in prompt and "left" in prompt and "smil" not in prompt


@pytest.mark.parametrize("name", STYLES)
def test_styles_stay_in_range_and_touch_only_their_own_row(name):
    x = torch.rand(3, 3, 64, 64)
    y = styles.stylise(x, ["photo", name, "photo"])
    assert torch.equal(y[0], x[0]) and torch.equal(y[2], x[2])
    assert float(y.min()) >= 0 and float(y.max()) <= 1
    assert torch.equal(y[1], x[1]) == (name == "photo")


def test_textures_are_deterministic_and_various():
    a, b = textures.texture_bank(6, 32), textures.texture_bank(6, 32)
    assert np.array_equal(a, b) and a.shape == (6, 32, 32, 3)
    assert len({t.tobytes() for t in a}) == 6
