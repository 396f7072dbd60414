"""Training on the compiled CPU backend: the forward's statistics and the closed-form gradients against float64."""

import math

import pytest
import torch

from idcore.backends import cpu
from idcore.backends import reference as ref
from idcore.backends.checks import normalize
from idcore.testing import ODD_CASES, make_inputs

_C = pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")
ISAS = _C.compiled_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in _C.usable_isas():
        pytest.skip(f"this machine has no {request.param}")
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")


def doubled(a):
    """The call in float64."""
    wide = a._replace(q=a.q.double(), k_text=a.k_text.double(), v_text=a.v_text.double())
    return wide._replace(k_id=tuple(k.double() for k in a.k_id), v_id=tuple(v.double() for v in a.v_id))


def true_stats(a):
    """The statistics by their definitions, in the order of `Stats`; None where the merge has none."""
    h, _ = ref.text_attention(a)
    logits = a.q @ ref.text_rows(a, a.k_text).mT * a.q.shape[-1] ** -0.5
    if a.text_bias is not None:
        logits = logits + a.text_bias.double()
    rows = {name: [] for name in ("id", "unscaled", "share", "alpha", "den")}
    for j in range(len(a.k_id)):
        i, _, raw = ref.branch(a, j)
        zeros = raw.new_zeros(*raw.shape[:-1], a.num_zero)
        scaled = raw * a.q.shape[-1] ** -0.5
        alpha, den = ref.ratio(h, i, ref.weight(a, j))
        rows["id"].append(torch.cat([scaled, zeros], -1).logsumexp(-1) / math.log(2))
        rows["unscaled"].append(torch.cat([raw, zeros], -1).logsumexp(-1) / math.log(2))
        rows["share"].append(ref.global_share(a, raw)[0][:, 0, :, 0])
        rows["alpha"].append(alpha[:, :, 0])
        rows["den"].append(den[:, :, 0])
    kept = {"add": 1, "ortho": 5, "ortho_v2": 5}[a.merge] if a.k_id else 0
    found = [torch.stack(values) if n < kept else None for n, values in enumerate(rows.values())]
    if a.merge == "ortho":
        found[1] = found[2] = None
    return [logits.logsumexp(-1) / math.log(2), *found]


@pytest.mark.parametrize("case", ODD_CASES, ids=lambda c: c.name)
def test_statistics_are_what_they_say(case, isa):
    for merge in ("none", "add", "ortho", "ortho_v2"):
        for dtype in ("fp32", "fp16"):
            a = normalize(**make_inputs(case.with_(merge=merge, dtype=dtype), 1))
            out, stats = cpu.forward_stats(a)
            assert torch.equal(out, cpu.forward(a))
            for got, want in zip(stats, true_stats(doubled(a)), strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
