"""Writes behind the end of a tensor, on purpose: .ci/sanitize checks that the sanitizer stops it."""

import torch

from idcore.backends.checks import normalize
from idcore.backends.cpu import _load
from idcore.backends.native import call_tuples
from idcore.testing import Case, make_inputs

case = Case("behind the end", "probe", heads=1, lq=64, layout="heads")
a = normalize(**make_inputs(case))
out = torch.empty(a.q.shape)
tuples = list(call_tuples(a, out)[0])
pointer, *rest = tuples[4]
tuples[4] = (pointer + 4 * out.numel() - 64, *rest)  # the last 16 numbers of the result, and 4,080 behind them
_load()[0].id_attention_cpu(*tuples)
