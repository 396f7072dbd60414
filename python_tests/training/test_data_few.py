"""Few pictures as a source: groups by share, an order without memory, prompts and captions, and every error's text."""

import numpy as np
import pytest
import torch
from PIL import Image

from idcore.errors import InputError
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.sd15 import SD15Base
from idcore.training.data.few import FewPictures, Group, turns


def picture(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


def all_ids(source, steps, seed=0, batch=4, parts=(1, 1)):
    world, count = parts
    size = batch // (world * count)
    out = []
    for step in range(steps):
        ranks = [list(source.micro_batches(step, seed, r, world, size, count)) for r in range(world)]
        out += [i for m in range(count) for r in range(world) for i in ranks[r][m].ids]
    return out


def test_turns_keep_to_the_shares_and_do_not_remember():
    shares = (0.5, 0.3, 0.2)
    row = turns(shares, 0, 400)
    for n in range(1, 400):
        for k, s in enumerate(shares):
            assert abs(sum(g == k for g, _ in row[:n]) - s * n) <= len(shares)
    for k in range(3):
        assert [j for g, j in row if g == k] == list(range(sum(g == k for g, _ in row)))
    assert [turns(shares, first, 7) for first in range(0, 350, 7)] == [row[i : i + 7] for i in range(0, 350, 7)]
    assert turns((2 / 3, 1 / 3), 10**9 * 3, 3) == turns((2 / 3, 1 / 3), 10**9 * 3, 30)[:3]


def test_every_batch_has_the_shares_and_every_picture_comes_once_an_epoch(folder):
    source = FewPictures([Group(folder, ("a", "b"), share=3), Group([picture(7), picture(8)], ("c",))], 16)
    for step in range(6):
        batch = next(source.micro_batches(step, 5, 0, 1, 4, 1))
        assert batch.extra["group"].tolist().count(1) == 1
        assert batch.pixels.shape == (4, 3, 16, 16) and batch.pixels.abs().max() <= 1
        assert set(batch.prompts) <= {"a", "b", "c"}
        assert all((p == "c") == (g == 1) for p, g in zip(batch.prompts, batch.extra["group"].tolist()))
    ids = [i for i in all_ids(source, 4) if i.startswith("group0")]
    assert [sorted(ids[n : n + 3]) for n in range(0, 12, 3)] == [[f"group0/{i}.png" for i in range(3)]] * 4
    assert len(source) == 5 and source.shares == (0.75, 0.25) and source.prompts() == ["a", "b", "c"]


@pytest.mark.parametrize("parts", [(2, 1), (1, 4), (2, 2)])
def test_the_order_is_the_same_for_every_division_of_the_batch(folder, parts):
    make = lambda: FewPictures([Group(folder, ("a",)), Group([picture(9)], ("c",))], 16, flip=0.5, crop="random")  # noqa: E731
    assert all_ids(make(), 5, parts=parts) == all_ids(make(), 5) != all_ids(make(), 5, seed=1)
    whole = next(make().micro_batches(2, 0, 0, 1, 4, 1))
    last = list(make().micro_batches(2, 0, parts[0] - 1, parts[0], 4 // (parts[0] * parts[1]), parts[1]))[-1]
    assert (
        torch.equal(whole.pixels[-len(last) :], last.pixels)
        and whole.places.tolist()[-len(last) :] == last.places.tolist()
    )
    assert torch.equal(whole.sizes[-len(last) :], last.sizes)


def test_captions_lie_beside_or_are_given(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"caption {i}\n")
    batch = next(FewPictures([Group(folder)], 16).micro_batches(0, 0, 0, 1, 3, 1))
    assert all(p == f"caption {i[-5]}" for i, p in zip(batch.ids, batch.prompts))
    given = FewPictures([Group([folder / "1.png", picture(4)], captions=["one", "two"])], 16)
    batch = next(given.micro_batches(0, 0, 0, 1, 2, 1))
    assert dict(zip(batch.ids, batch.prompts)) == {"group0/0-1.png": "one", "group0/1": "two"}


def test_scaled_to_cover_cut_and_mirrored():
    x = np.zeros((32, 64, 3), np.uint8)
    x[:, 24:40] = 255  # the middle
    x[:, 40:] = 100
    source = FewPictures([Group([Image.fromarray(x)], ("p",))], (16, 16))
    batch = next(source.micro_batches(0, 0, 0, 1, 1, 1))
    assert batch.sizes.tolist() == [[32, 64, 0, 8, 16, 16]]
    assert batch.pixels[0, 0, 8].ge(0.8).sum() == 8
    mirrored = next(FewPictures([Group([Image.fromarray(x)], ("p",))], 16, flip=1.0).micro_batches(0, 0, 0, 1, 1, 1))
    assert torch.equal(mirrored.pixels, batch.pixels.flip(-1))


def test_kept_latents_are_those_of_the_samples(folder):
    base = SD15Base(tiny_pipeline("sd"))
    source = FewPictures([Group(folder, ("a",))], 16, flip=0.5)
    batches = [b for step in range(4) for b in source.keep_latents(base).micro_batches(step, 0, 0, 1, 3, 1)]
    for b in batches:
        torch.testing.assert_close(b.latents, base.encode_pictures(b.pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match='crop is "random"'):
        FewPictures([Group(folder, ("a",))], 16, crop="random").keep_latents(base)


def test_state_knows_pictures_prompts_and_settings(folder):
    state = lambda **how: FewPictures([Group(folder, (how.pop("prompt", "a"),))], 16, **how).state()  # noqa: E731
    assert state() == state() and state()["counts"] == {"group0": 3}
    assert len({str(s) for s in (state(), state(prompt="b"), state(flip=0.5), state(crop="random"))}) == 4
    before = state()
    picture(99).save(folder / "0.png")
    assert state() != before


def test_errors_say_what_and_what_to_do(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ([], {}, "no group"),
        ([Group(empty, ("a",), name="style")], {}, r"style: there is no picture in"),
        ([Group(tmp_path / "nowhere", ("a",))], {}, "is no folder"),
        ([Group([], ("a",))], {}, "an empty list"),
        ([Group(folder)], {}, r"3 of 3 pictures have no caption: 0.png, 1.png, 2.png; put .txt"),
        ([Group([picture(0)], captions=["a", "b"])], {}, "2 captions for 1 pictures"),
        ([Group(folder, ("a",), share=0)], {}, "share must be above 0, got 0"),
        ([Group(folder, "a photo")], {}, "prompts is a sequence of texts, got 'a photo'"),
        ([Group(folder, ("a",))], {"flip": 2}, "flip is a share from 0 to 1, got 2"),
        ([Group(folder, ("a",))], {"crop": "face"}, 'crop is "centre" or "random"'),
        ([Group(folder, ("a",))], {"size": 0}, "size is a positive number"),
    ]
    for groups, how, text in cases:
        with pytest.raises(InputError, match=text):
            FewPictures(groups, **{"size": 16} | how)
    (folder / "0.png").write_bytes(b"GIF89a")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"2 of 3 cannot be used: 0.png: .*GIF.*2.png.*Remove or replace"):
        FewPictures([Group(folder, ("a",))], 16)
    with pytest.raises(InputError, match="rank below world"):
        next(FewPictures([Group([picture(0)], ("a",))], 16).micro_batches(0, 0, 2, 2, 1, 1))
