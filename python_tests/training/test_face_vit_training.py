"""Training of the face ViT: ArcFace's formula, people in folders, drawn people, the command line."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from idcore.cli import app
from idcore.encoders.face_vit import FaceViT
from idcore.errors import InputError
from idcore.metrics.gate import gate_person
from idcore.results import read_result
from idcore.systems.dreamidentity import DreamIdentity
from idcore.training.data.drawn import DrawnPeople
from idcore.training.data.mixed import Mixed, WithCrops
from idcore.training.face_vit.config import load_config
from idcore.training.face_vit.data import FaceFolders, drawn_exam, open_data
from idcore.training.face_vit.run import load_vit, train_face_vit
from idcore.training.face_vit.task import arcface_loss, identification
from idcore.training.tiny.pool import TRAIN_SEED, render_person, write_shard

SIZES = [
    "vit.image_size=16", "vit.patch_size=8", "vit.width=32", "vit.heads=2", "vit.depth=2", "vit.mlp_dim=32",
    "vit.id_dim=8", "loop.steps=2", "loop.batch=4", "loop.warmup=1", "loop.trackers=", "loop.ema=0.5",
    "loop.validate_every=2", "loop.lr=0.01",
]  # fmt: skip
DRAWN = [*SIZES, "drawn.people=5", "exam.people=3"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Nine drawn people, twice each."""
    folder = tmp_path_factory.mktemp("pool")
    write_shard(folder, 0, people=9, size=48)
    return folder


def drawn(folder, *changes):
    return load_config(None, [*DRAWN, f"drawn.folder={folder}", *changes], drawn=True)


@pytest.fixture(autouse=True)
def no_more_people(monkeypatch):
    """A pool of nine is enough: 500 more would take seconds."""
    monkeypatch.setattr("idcore.training.data.drawn.SHARD", 9)


def naive_arcface(cosines, person, scale, margin):
    """Float64, one angle after the other."""
    total = 0.0
    for row, own in zip(cosines.double().tolist(), person.tolist()):
        angle = math.acos(row[own])
        wide = math.cos(angle + margin) if angle + margin <= math.pi else row[own] - margin * math.sin(margin)
        logits = [scale * (wide if j == own else c) for j, c in enumerate(row)]
        total += math.log(sum(math.exp(v - max(logits)) for v in logits)) + max(logits) - logits[own]
    return total / len(cosines)


@pytest.mark.parametrize("scale, margin", [(64.0, 0.5), (10.0, 0.0)])
def test_the_loss_is_arcface_s(scale, margin):
    g = torch.Generator().manual_seed(1)
    cosines = torch.rand(6, 5, generator=g) * 1.98 - 0.99
    cosines[0, 2] = -0.98  # angle + margin beyond pi
    person = torch.tensor([2, 0, 1, 4, 3, 2])
    cosines.requires_grad_(True)
    loss = arcface_loss(cosines, person, scale, margin)
    assert loss.item() == pytest.approx(naive_arcface(cosines.detach(), person, scale, margin), rel=1e-5)
    loss.backward()
    assert (cosines.grad.gather(1, person[:, None]) <= 0).all() and cosines.grad.isfinite().all()


def test_identification_counts_the_nearest_other_picture():
    v = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.95, 0.0], [-1.0, 0.0]])
    made = identification(v, torch.tensor([0, 0, 1, 1, 2]))
    assert made["rank1"] == pytest.approx(0.25)  # person 2 has one picture; [0.95, 0] lies on [1, 0]
    assert made["same"] == pytest.approx(float(torch.nn.functional.cosine_similarity(v[0], v[1], 0) / 2), abs=1e-6)


def test_drawn_people_hang_on_seed_step_and_place_alone(pool):
    source = WithCrops(DrawnPeople(pool, 7, size=32, styles={"photo": 1, "pencil": 1}, flip=0.5), 16, "head")
    whole = next(source.micro_batches(3, 5, 0, 1, 8, 1))
    parts = [b for rank in (0, 1) for b in source.micro_batches(3, 5, rank, 2, 2, 2)]
    for b in parts:
        for i, place in enumerate(b.places.tolist()):
            assert b.ids[i] == whole.ids[place] and b.prompts[i] == whole.prompts[place]
            assert torch.equal(b.pixels[i], whole.pixels[place])
            assert torch.equal(b.face["crop"][i], whole.face["crop"][place])
    seen = [i for step in range(7) for b in source.micro_batches(step, 5, 0, 1, 4, 1) for i in b.ids]
    assert sorted(seen) == sorted(4 * [f"person{i}" for i in range(7)]), "everybody as often"
    assert whole.pixels.shape == (8, 3, 32, 32) and -1 <= whole.pixels.min() and whole.pixels.max() <= 1
    assert not torch.equal(whole.pixels, next(source.micro_batches(3, 6, 0, 1, 8, 1)).pixels)


def test_mirrored_landmarks_stand_on_the_mirrored_face(pool):
    plain, turned = (DrawnPeople(pool, 4, size=64, flip=f) for f in (0.0, 1.0))
    a, b = (next(s.micro_batches(0, 0, 0, 1, 4, 1)) for s in (plain, turned))
    assert torch.equal(a.pixels.flip(-1), b.pixels)
    left = a.extra["landmarks"][0]
    right = b.extra["landmarks"][0]
    assert torch.allclose(63 - right[[1, 0, 2, 4, 3], 0], left[:, 0]) and right[0, 0] < right[1, 0]


def test_mixed_sources_keep_their_shares_and_every_division_of_a_step(pool):
    one = WithCrops(DrawnPeople(pool, 3, size=16), 16, "head", prompts=["a photo of S*"])
    two = WithCrops(DrawnPeople(pool, 3, first=4, size=16), 16, "head")
    mixed = Mixed([one, two], [3, 1])
    whole = next(mixed.micro_batches(2, 1, 0, 1, 8, 1))
    assert whole.extra["group"].tolist().count(1) == 2
    assert [p == "a photo of S*" for p in whole.prompts] == [g == 0 for g in whole.extra["group"].tolist()]
    parts = [b for rank in (0, 1) for b in mixed.micro_batches(2, 1, rank, 2, 2, 2)]
    order = torch.cat([b.places for b in parts]).argsort()
    assert torch.equal(torch.cat([b.pixels for b in parts])[order], whole.pixels)
    groups = [g for s in range(5) for b in mixed.micro_batches(s, 1, 0, 1, 1, 1) for g in b.extra["group"].tolist()]
    assert groups.count(1) in (1, 2), "shares hold from batch to batch too"
    assert len(next(Mixed([one, two], [1, 0]).micro_batches(0, 0, 0, 1, 4, 1))) == 4
    with pytest.raises(InputError, match="2 sources need as many shares"):
        Mixed([one, two], [1])
    other = WithCrops(DrawnPeople(pool, 3, size=24), 16, "head")
    with pytest.raises(InputError, match="one size, got 16x16 and 24x24; prepare the data with max_aspect=1"):
        list(Mixed([one, other], [1, 1]).micro_batches(0, 0, 0, 1, 2, 1))


def test_drawn_people_are_learned_and_the_vit_begins_an_encoder(pool, tmp_path):
    changes = ["loop.steps=24", "loop.batch=8", "arcface.scale=8", "arcface.margin=0.1", "loop.validate_every=24"]
    config = drawn(pool, *changes, "drawn.styles=false", "loop.lr=0.003", "loop.schedule=constant")
    model = train_face_vit(config, "drawn", tmp_path / "run")
    lines = [json.loads(t) for t in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])
    measures = json.loads((tmp_path / "run/measures.jsonl").read_text().splitlines()[-1])["measures"]
    assert set(measures) == {"rank1", "same", "different"}
    assert read_result(model).system == "face-vit" and "ArcFace, 5 people" in (model / "README.md").read_text()
    vit = load_vit(model / "face_vit.safetensors")
    assert vit.config == config.vit.sizes()
    exam = drawn_exam(pool, 5, 3, 16, "head")
    assert [len(b) for b in exam] == [3, 3] and exam[0].ids == ["person5", "person6", "person7"]
    made = DreamIdentity.from_vit(vit, (32,))
    assert torch.equal(made.vit.head.weight, vit.head.weight)


def test_a_resumed_run_has_the_losses_that_it_would_have_had(pool, tmp_path):
    whole = train_face_vit(drawn(pool, "loop.steps=4"), "drawn", tmp_path / "a")
    train_face_vit(drawn(pool, "loop.steps=4", "loop.stop_at=2"), "drawn", tmp_path / "b")
    again = train_face_vit(drawn(pool, "loop.steps=4"), "drawn", tmp_path / "b", resume=True)
    a, b = (load_vit(m / "face_vit.safetensors").state_dict() for m in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def person_folders(root, people=4):
    for i in range(people):
        views, _ = render_person(TRAIN_SEED - 500 + i, 160)
        for j, view in enumerate(views):
            cover = view[..., 3:] / 255
            path = root / f"p{i}" / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((view[..., :3] * cover + 128 * (1 - cover)).astype("uint8")).save(path)
    return root


def test_folders_of_people_by_the_command_line(tmp_path):
    data = person_folders(tmp_path / "people", 5)
    arguments = ["train", "face-vit", "--data", str(data), "--out", str(tmp_path / "run"),
                 *(a for s in [*SIZES, "prepare.resolution=128", "exam.share=0.4"] for a in ("--set", s))]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    model = tmp_path / "run/model"
    assert isinstance(load_vit(model / "face_vit.safetensors"), FaceViT)
    config = load_config(None, SIZES)
    kept = FaceFolders(tmp_path / "run/prepared", config.data, held_out=0.4)
    away = FaceFolders(tmp_path / "run/prepared", config.data, held_out=0.4, exam=True)
    assert len(away.people) == 2 and not set(kept.people) & set(away.people)
    batch = next(kept.micro_batches(0, 0, 0, 1, 4, 1))
    assert [kept.people[n] for n in batch.extra["person"]] == [i.split("/")[0] for i in batch.ids]


def test_errors_say_what_to_do(tmp_path, pool):
    data = person_folders(tmp_path / "people", 2)
    config = load_config(None, [*SIZES, "exam.share=0.2", "prepare.resolution=128"])
    with pytest.raises(InputError, match="at least two people, and 2 more that are held out; found 2"):
        open_data(str(data), tmp_path / "run", config, print)
    views, _ = render_person(3, 160)
    Image.fromarray(views[0][..., :3]).save(data / "alone.png")
    with pytest.raises(InputError, match=r"each person needs a folder of pictures, PERSON/\*.jpg.*alone.png"):
        open_data(str(data), tmp_path / "other", config, print)
    with pytest.raises(InputError, match="leave data.flip at 0"):
        load_config(None, ["data.flip=0.5"])
    with pytest.raises(InputError, match="styles are photo, pencil"):
        DrawnPeople(pool, 2, styles={"fresco": 1})
    with pytest.raises(InputError, match="at least 1 person from 0 on, got 0 from 0"):
        DrawnPeople(pool, 0)
    result = CliRunner().invoke(app, ["train", "face-vit", "--out", str(tmp_path)])
    assert result.exit_code != 0 and "--data FOLDER (or drawn) is missing" in result.output + str(result.exception)


def test_people_with_one_picture_each_have_no_rank_and_the_card_is_written_all_the_same(tmp_path):
    for i in range(6):
        (tmp_path / "people" / f"p{i}").mkdir(parents=True)
        gate_person(1_000 + i).save(tmp_path / "people" / f"p{i}" / "a.png")
    out = tmp_path / "run"
    config = load_config(None, [*SIZES, "prepare.min_face=8", "exam.share=0.3"])
    train_face_vit(config, tmp_path / "people", out)
    measures = [json.loads(x)["measures"] for x in (out / "measures.jsonl").read_text().splitlines()]
    assert all(set(m) == {"different"} for m in measures)
    assert "| different | " in (out / "model" / "README.md").read_text()
