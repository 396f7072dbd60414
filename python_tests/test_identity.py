"""Identity: saved and read back, batched, mixed; what does not fit is named."""

import pytest
import torch

from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.weights import describe, write_safetensors


def identity(seed=0, rows=1, length=6, width=4, uncond=True, **meta):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(1, length, width, generator=torch.Generator().manual_seed(99)) if uncond else None
    return Identity(torch.randn(rows, length, width, generator=g), u, "pulid-v1", {"encoder": "sha256:1", **meta})


def test_saved_and_read_back_bit_by_bit(tmp_path):
    one = identity(rows=2, photos=3, parsing=None, antialias=False)
    one.save(tmp_path / "me.safetensors")
    back = Identity.load(tmp_path / "me.safetensors")
    assert torch.equal(back.tokens, one.tokens) and torch.equal(back.uncond_tokens, one.uncond_tokens)
    assert (back.system, back.meta) == (one.system, one.meta)
    assert describe(tmp_path / "me.safetensors").layout == "identity"
    identity(uncond=False).save(tmp_path / "no.safetensors")
    assert Identity.load(tmp_path / "no.safetensors").uncond_tokens is None


def test_repr_is_short_and_says_what_counts():
    assert repr(identity(photos=3)) == "Identity(pulid-v1, 1 x 6 tokens x 4, with uncond, 3 photos)"


def test_tokens_become_float32_and_keep_their_gradient():
    tokens = torch.randn(1, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    one = Identity(tokens, None, "x")
    assert one.tokens.dtype == torch.float32
    one.tokens.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize("make,text", [
    (lambda: Identity(torch.zeros(6, 4), None, "s"), r"tokens must be a floating tensor \[Bi, L, E\].*got \[6, 4\]"),
    (lambda: Identity(torch.zeros(1, 0, 4), None, "s"), r"none of them 0, got \[1, 0, 4\]"),
    (lambda: Identity(torch.zeros(1, 6, 4, dtype=torch.int64), None, "s"), "floating tensor.*int64"),
    (lambda: Identity([[1.0]], None, "s"), "got list"),
    (lambda: Identity(torch.full((1, 2, 2), float("nan")), None, "s"), "tokens hold NaN or infinity"),
    (lambda: Identity(torch.zeros(1, 2, 2), torch.full((1, 2, 2), float("inf")), "s"), "uncond_tokens hold NaN"),
    (lambda: Identity(torch.zeros(4, 2, 2), torch.zeros(2, 2, 2), "s"), r"\[1 or 4, 2, 2\].*got \[2, 2, 2\]"),
    (lambda: Identity(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2), "s"), r"got \[1, 3, 2\]"),
    (lambda: Identity(torch.zeros(1, 2, 2), None, ""), "system must be the name"),
    (lambda: Identity(torch.zeros(1, 2, 2), None, "s", None), "meta must be a dictionary"),
])  # fmt: skip
def test_what_is_no_identity_is_named(make, text):
    with pytest.raises(InputError, match=text):
        make()


def test_require_system():
    identity().require_system("pulid-v1")
    with pytest.raises(InputError, match="made by the system 'pulid-v1', 'tiny' cannot read"):
        identity().require_system("tiny")


def test_files_that_are_no_identity_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"tokens": torch.zeros(1, 2, 2)})
    with pytest.raises(InputError, match="no saved identity .*idcore encode"):
        Identity.load(path)
    head = {"format": "idcore-identity", "system": "s", "meta": "{}"}
    write_safetensors(path, {"tokens": torch.zeros(1, 2, 2)}, {**head, "format_version": "2"})
    with pytest.raises(InputError, match="identity format '2', this idcore reads 1"):
        Identity.load(path)
    write_safetensors(path, {"tokens": torch.zeros(1, 2, 2)}, {**head, "format_version": "1", "meta": "{"})
    with pytest.raises(WeightsError, match="meta is damaged"):
        Identity.load(path)
    write_safetensors(path, {"tokens": torch.full((1, 2, 2), float("nan"))}, {**head, "format_version": "1"})
    with pytest.raises(InputError, match="tokens hold NaN"):
        Identity.load(path)
    identity().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="identity: .* is truncated"):
        Identity.load(path)
    with pytest.raises(WeightsError, match="identity: .*torch pickle|does not exist"):
        Identity.load(tmp_path / "none.safetensors")


def test_meta_that_json_cannot_hold_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="meta must hold plain values"):
        identity(x=torch.zeros(1)).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_batch_is_one_row_per_sample_in_order():
    a, b = identity(1, photos=2), identity(2, photos=3)
    both = Identity.batch([a, b, a])
    assert torch.equal(both.tokens, torch.cat([a.tokens, b.tokens, a.tokens]))
    assert torch.equal(both.uncond_tokens, a.uncond_tokens)  # the same for all: kept once
    assert both.meta == {"encoder": "sha256:1", "batch_of": 3} and len(both) == 3
    b.uncond_tokens = b.uncond_tokens + 1
    both = Identity.batch([a, b])
    assert torch.equal(both.uncond_tokens, torch.cat([a.uncond_tokens, b.uncond_tokens]))
    pair = identity(3, rows=2)  # two people with one row of unconditional tokens between them
    three = Identity.batch([pair, b])
    assert torch.equal(three.uncond_tokens, torch.cat([a.uncond_tokens, a.uncond_tokens, b.uncond_tokens]))


def test_mix_is_the_weighted_mean():
    a, b = identity(1), identity(2)
    mixed = Identity.mix([a, b], [3, 1])
    torch.testing.assert_close(mixed.tokens, 0.75 * a.tokens + 0.25 * b.tokens)
    torch.testing.assert_close(mixed.uncond_tokens, a.uncond_tokens)
    assert mixed.meta["mix_weights"] == [0.75, 0.25]
    torch.testing.assert_close(Identity.mix([a, b]).tokens, (a.tokens + b.tokens) / 2)
    torch.testing.assert_close(Identity.mix([a, b], [2, -1]).tokens, 2 * a.tokens - b.tokens)


@pytest.mark.parametrize("join", [Identity.batch, Identity.mix])
def test_identities_that_do_not_go_together_are_named(join):
    with pytest.raises(InputError, match="at least one Identity"):
        join([])
    with pytest.raises(InputError, match=r"same shape, got \[1, 6, 4\] and \[1, 7, 4\]"):
        join([identity(), identity(length=7)])
    with pytest.raises(InputError, match="different encoder weights"):
        join([identity(), identity(encoder="sha256:2")])
    with pytest.raises(InputError, match="some have none"):
        join([identity(), identity(uncond=False)])
    other = identity()
    other.system = "tiny"
    with pytest.raises(InputError, match="made by the system 'tiny'"):
        join([identity(), other])


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_mix_weights_that_make_no_mean_are_named(weights):
    with pytest.raises(InputError, match="wanted 2 finite weights with a sum above 0"):
        Identity.mix([identity(1), identity(2)], weights)
