"""What is remembered of a call must not hide a difference: the key holds every fact that backends or checks see."""

import pytest
import torch

from idcore.backends.call import facts
from idcore.backends.checks import normalize
from idcore.errors import InputError
from idcore.ops import id_attention, known_calls
from idcore.testing import make_inputs
from idcore.testing.cases import Case

NAMES = ("q", "k_text", "v_text", "k_id", "v_id")
BASE = Case("known", "test", batch=2, heads=2, lq=9, lt=5, head_dim=16, li=(4,), num_zero=1)
OTHERS = (
    dict(lq=10), dict(lt=6), dict(li=(3,)), dict(li=(4, 2)), dict(merge="add"), dict(merge="none", num_zero=0),
    dict(num_zero=0), dict(dtype="bf16"), dict(batch=4), dict(text_batch=2), dict(mask=True), dict(bias="full"),
    dict(tensor_scale=True),
)  # fmt: skip


def options(case):
    given = make_inputs(case)
    tensors = [given.pop(name) for name in NAMES]
    return tensors, {**dict(id_scale=1.0, id_mask=None, text_bias=None, stage=None, num_global=5), **given}


@pytest.fixture(autouse=True)
def nothing_known():
    known_calls._known.clear()
    yield
    known_calls._known.clear()


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_the_second_call_gets_the_facts_of_the_second_call(changes):
    for case in (BASE, BASE.with_(**changes), BASE):
        tensors, rest = options(case)
        for _ in range(2):
            a, call = known_calls.checked(*tensors, **rest)
            want = normalize(*tensors, **rest)
            assert call == facts(want) and type(a.scale) is type(want.scale)
            assert len(a.k_id) == len(want.k_id) and all(x is y for x, y in zip(a.k_id, want.k_id, strict=True))


def test_gradients_and_strides_are_facts():
    tensors, rest = options(BASE)
    _, plain = known_calls.checked(*tensors, **rest)
    q = tensors[0]
    _, strided = known_calls.checked(torch.stack([q, q], dim=-1)[..., 0], *tensors[1:], **rest)
    _, wanted = known_calls.checked(q.clone().requires_grad_(), *tensors[1:], **rest)
    with torch.no_grad():
        _, unrecorded = known_calls.checked(q.clone().requires_grad_(), *tensors[1:], **rest)
    assert plain.dense_last_dim and not strided.dense_last_dim
    assert wanted.needs_grad and not unrecorded.needs_grad and not plain.needs_grad


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_zero=1.0), "num_zero must be an integer"),
        (dict(num_global=5.0), "num_global must be an integer"),
        (dict(id_scale=(1.0, 2.0)), "need 1 values of id_scale, got 2"),
        (dict(merge="sum"), "merge must be one of"),
    ],
)
def test_a_known_call_with_a_wrong_number_is_still_refused(wrong, message):
    tensors, rest = options(BASE)
    id_attention(*tensors, **rest)
    with pytest.raises(InputError, match=message):
        id_attention(*tensors, **{**rest, **wrong})


def staged(stages=3, batch=2):
    tensors, rest = options(BASE.with_(merge="none", num_zero=0, batch=batch))
    q, k, v, *others = tensors
    bank = [torch.stack([t * (i + 1) for i in range(stages)]) for t in (k, v)]
    return [q, *bank, *others], {**rest, "stage": torch.tensor([1], dtype=torch.int32)}


def test_a_stage_is_known_by_its_form_and_its_value_looked_at_each_time():
    tensors, rest = staged()
    outs = [id_attention(*tensors, **rest | {"stage": torch.tensor([i], dtype=torch.int32)}) for i in (0, 1, 2, 1)]
    assert len(known_calls._known) == 1
    plain = options(BASE)[1] | {k: v for k, v in rest.items() if k != "stage"}
    for i, out in zip((0, 1, 2, 1), outs):
        one = id_attention(tensors[0], tensors[1][i], tensors[2][i], *tensors[3:], **plain)
        assert torch.allclose(out, one, atol=1e-6)
    with pytest.raises(InputError, match="stage must be 0 to 2 for this bank, got 3 to 3"):
        id_attention(*tensors, **rest | {"stage": torch.tensor([3], dtype=torch.int32)})
    with pytest.raises(InputError, match="must hold 1 or B = 2 numbers, got 3"):
        id_attention(*tensors, **rest | {"stage": torch.zeros(3, dtype=torch.int32)})
    with pytest.raises(InputError, match=r"k_text must be"):
        id_attention(*tensors, **rest | {"stage": None})
    more, rest4 = staged(stages=4)
    a, call = known_calls.checked(*more, **rest4)
    assert call == facts(normalize(*more, **rest4)) and call.stages == 4 and torch.equal(a.stage, rest4["stage"])
    a, _ = known_calls.checked(*more, **rest4)
    assert a.stage is rest4["stage"]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(known_calls, "MOST", 3)
    for lq in range(1, 9):
        tensors, rest = options(BASE.with_(lq=lq))
        known_calls.checked(*tensors, **rest)
    assert len(known_calls._known) <= 3
