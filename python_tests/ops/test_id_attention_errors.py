"""Bad arguments of `id_attention`: the text says what was wanted, what came, and what to do."""

import pytest
import torch

from idcore.backends.call import facts
from idcore.backends.checks import normalize
from idcore.errors import InputError, NoBackendError
from idcore.ops import explain, id_attention


def good(**over):
    args = dict(
        q=torch.randn(2, 2, 5, 8),
        k_text=torch.randn(2, 2, 4, 8),
        v_text=torch.randn(2, 2, 4, 8),
        k_id=torch.randn(1, 2, 3, 8),
        v_id=torch.randn(1, 2, 3, 8),
    )
    args.update(over)
    return args


@pytest.mark.parametrize(
    "over, text",
    [
        (dict(q=torch.randn(2, 5, 16)), r"q must be \[B, H, Lq, D\], got \[2, 5, 16\]"),
        (dict(q=[1, 2]), "q must be a torch tensor, got list"),
        (dict(q=torch.ones(2, 2, 5, 8, dtype=torch.int64)), "q must be float32, .* got torch.int64"),
        (dict(v_text=torch.randn(2, 2, 3, 8)), r"v_text must be .* = \[1 or 2, 2, 4, 8\], got \[2, 2, 3, 8\]"),
        (dict(k_id=torch.randn(3, 2, 3, 8)), r"batch of k_id\[0\] must divide q's batch 2 .* got 3"),
        (dict(k_id=torch.randn(1, 2, 3, 8).half()), r"k_id\[0\] has dtype torch.float16, q has torch.float32; cast"),
        (dict(v_id=()), "same number of identities, got 1 and 0"),
        (dict(k_text=torch.randn(2, 2, 0, 8), v_text=torch.randn(2, 2, 0, 8)), "at least one token, got Lt = 0"),
        (dict(merge="sum"), "merge must be one of add, ortho, ortho_v2, got 'sum'"),
        (dict(num_zero=-1), "num_zero must be an integer >= 0, got -1"),
        (dict(num_global=0), "num_global must be an integer >= 1, got 0"),
        (dict(k_id=torch.randn(1, 2, 0, 8), v_id=torch.randn(1, 2, 0, 8)), "needs num_zero >= 1"),
        (dict(id_scale=(1.0, 2.0)), "1 identities need 1 values of id_scale, got 2"),
        (dict(id_scale=torch.ones(3)), r"id_scale must be \[\], \[n\] = \[1\] or \[n, B\] = \[1, 2\], got \[3\]"),
        (dict(id_mask=torch.ones(1, 4)), r"id_mask of identity 0 must be .* = \[1 or 2, 5\], got \[1, 4\]"),
        (dict(id_mask=[None, None]), "1 identities need 1 masks"),
        (dict(text_bias=torch.ones(2, 4)), r"text_bias must be broadcastable to .* = \[2, 2, 5, 4\], got \[2, 4\]"),
        (dict(backend="magic"), "backend must be one of cuda, triton, cpu, sdpa, reference or None, got 'magic'"),
        (dict(out=torch.empty(2, 2, 5, 4)), r"out must be \[2, 2, 5, 8\] torch.float32 on cpu, got \[2, 2, 5, 4\]"),
    ],
)
def test_refusals_name_both_sides(over, text):
    with pytest.raises(InputError, match=text):
        id_attention(**good(**over))


def test_out_that_shares_memory():
    q = torch.randn(2, 2, 5, 8)
    with pytest.raises(InputError, match="out must not share memory"):
        id_attention(**good(q=q, out=q))


def test_out_with_gradients():
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    with pytest.raises(InputError, match="out= cannot be used while gradients are recorded"):
        id_attention(**good(q=q, out=torch.empty(2, 2, 5, 8)))


def test_wrong_device():
    with pytest.raises(InputError, match=r"k_text is on meta, q on cpu; move it"):
        id_attention(**good(k_text=torch.empty(2, 2, 4, 8, device="meta")))


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(NoBackendError, match=r"(?s)backend 'sdpa' cannot run this call.*float64.*fix:"):
        id_attention(**{k: v.double() for k, v in good().items()}, backend="sdpa")
    with pytest.raises(NoBackendError, match="(?s)backend 'cuda' cannot run this call.*cuda: .+"):
        id_attention(**good(), backend="cuda")


def test_explain_lists_refusals_until_the_pick():
    a = normalize(**good(), id_scale=1.0, id_mask=None, merge="add", num_zero=0, num_global=5, text_bias=None)
    text = explain(facts(a))
    assert text.splitlines()[0].startswith("cuda: ") and text.splitlines()[-1].endswith("runs this call")


def bank(**changes):
    return good(k_text=torch.randn(3, 2, 2, 4, 8), v_text=torch.randn(3, 2, 2, 4, 8)) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stage=3), r"stage must be 0 to 2 for this bank, got 3"),
        (dict(stage=torch.tensor([0, 7])), r"stage must be 0 to 2 for this bank, got 0 to 7"),
        (dict(stage=torch.tensor(0.5)), r"integer tensor \[\], \[1\] or \[B\], got torch.float32"),
        (dict(stage=torch.tensor([0, 1, 2])), r"1 or B = 2 numbers, got 3"),
        (dict(stage="first"), r"an int or an integer tensor, got str"),
        (dict(stage=torch.empty((), dtype=torch.int32, device="meta")), r"stage is on meta, q on cpu; move it"),
        (dict(stage=0, k_text=torch.randn(2, 2, 4, 8)), r"banks \[S, Bt, H, Lt, D\] of the same S >= 1, got \[2, 2"),
        (dict(stage=0, v_text=torch.randn(2, 2, 2, 4, 8)), r"banks .* of the same S >= 1"),
    ],
)
def test_wrong_stages(changes, message):
    with pytest.raises(InputError, match=message):
        id_attention(**bank(**changes))
