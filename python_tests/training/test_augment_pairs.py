"""An augmented data set as a source of the training loop."""

import json

import numpy as np
import pytest
import torch
from augment_cases import COLOURS
from test_augment import job

from idcore.encoders.images import load_image
from idcore.errors import InputError
from idcore.training.augment.run import augment
from idcore.training.data.pairs import PairSource


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    augment(["ada", "bea", "cy"], folder, job(), progress=False)
    return folder


def batch_of(source, step=0, size=6, rank=0, world=1, count=1, seed=3):
    return list(source.micro_batches(step, seed, rank, world, size, count))


def test_a_batch_is_source_face_prompt_and_edited_picture(made):
    source = PairSource(made, size=32, crop=16, placeholder="V*")
    pairs = {p.id: p for p in source.pairs}
    (b,) = batch_of(source, size=18)
    assert sorted(b.ids) == sorted(pairs) and b.pixels.shape == (18, 3, 32, 32) and b.latents is None
    for i, name in enumerate(b.ids):
        p = pairs[name]
        assert b.prompts[i] == p.prompt.replace("{person}", "V*")
        want = np.asarray(load_image(made / p.edited), np.float32) / 127.5 - 1
        assert torch.equal(b.pixels[i], torch.from_numpy(want).permute(2, 0, 1))
        # The face is cut out of the source picture, whose middle has the person's colour.
        middle = b.face["crop"][i][:, 6:10, 6:10].mean((1, 2))
        assert (middle - torch.tensor(COLOURS[p.name])).abs().max() < 0.03
    assert b.face["crop"].shape == (18, 3, 16, 16)
    assert set(source.prompts()) == {"V* on the left", "V* on the right", "V* as a painting"}


def test_faces_move_with_the_size(made):
    small, large = PairSource(made, size=32, crop=16), PairSource(made, size=64, crop=16)
    (a,), (b,) = batch_of(small), batch_of(large)
    assert a.ids == b.ids and b.pixels.shape[-1] == 64
    for key in ("landmarks", "boxes"):
        assert torch.allclose(b.extra[key], (a.extra[key] + 0.5) * 2 - 0.5, atol=1e-4)


def test_the_order_hangs_on_the_step_alone(made):
    source = PairSource(made, size=32, crop=16)
    (whole,) = batch_of(source, step=5, size=8)
    for world, count in ((2, 2), (4, 1), (1, 4)):
        size = 8 // world // count
        found = {}
        for rank in range(world):
            for b in batch_of(source, step=5, size=size, rank=rank, world=world, count=count):
                found |= dict(zip(b.places.tolist(), b.ids))
        assert [found[i] for i in range(8)] == whole.ids
    epoch = [i for step in range(3) for i in batch_of(source, step=step, size=6)[0].ids]
    assert len(set(epoch)) == 18
    assert batch_of(source, step=0, seed=4)[0].ids != epoch[:6]


def test_the_fingerprint_names_the_pairs(made):
    state = PairSource(made, size=32, crop=16).state()
    assert state == PairSource(made, size=32, crop=16, threads=1).state() and json.dumps(state)
    assert state != PairSource(made, size=32, crop=16, placeholder="V*").state()


def test_changed_pictures_are_noticed(tmp_path):
    augment(["ada"], tmp_path, job(), progress=False)
    source = PairSource(tmp_path, size=32, crop=16)
    file = tmp_path / source.pairs[0].edited
    file.write_bytes((tmp_path / source.pairs[0].source).read_bytes())
    with pytest.raises(InputError, match="has changed since it was made; remove it and run the same `idcore augment`"):
        batch_of(source, size=6)
    assert len(batch_of(PairSource(tmp_path, size=32, crop=16, verify=False), size=6)[0]) == 6
    file.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        batch_of(source, size=6)


def test_what_is_no_data_set_is_refused(tmp_path, made):
    with pytest.raises(InputError, match="holds no pairs; make them with `idcore augment --out"):
        PairSource(tmp_path, size=32, crop=16)
    (tmp_path / "manifest.json").write_text('{"index": "x", "settings": {}}')
    with pytest.raises(InputError, match="it is of format None, wanted 'idcore-pairs'"):
        PairSource(tmp_path, size=32, crop=16)
    augment(["ada"], tmp_path / "begun", job(), progress=False)
    (tmp_path / "begun" / "manifest.json").unlink()
    with pytest.raises(InputError, match="not made to the end; run the same `idcore augment` again to go on"):
        PairSource(tmp_path / "begun", size=32, crop=16)
    augment(["ada"], tmp_path / "begun", job(), progress=False)
    with open(tmp_path / "begun" / "index.jsonl", "a") as f:
        f.write("\n")
    with pytest.raises(InputError, match="index.jsonl is not the one that was made"):
        PairSource(tmp_path / "begun", size=32, crop=16)
    augment(["blank"], tmp_path / "none", job(), progress=False)
    with pytest.raises(InputError, match="holds no pair; its dropped.jsonl says why"):
        PairSource(tmp_path / "none", size=32, crop=16)
    with pytest.raises(InputError, match="a template of .*arcface.* got size 32, crop 0"):
        PairSource(made, size=32, crop=0)
    with pytest.raises(InputError, match="a rank below world, got world 1, size 1, count 1, rank 1"):
        batch_of(PairSource(made, size=32, crop=16), size=1, rank=1)
