"""Random calls of `id_attention` for the kernel tests, their float64 truth, and the rule of comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from idcore.backends import reference, reference_bwd, sdpa
from idcore.backends.call import Args
from idcore.backends.checks import normalize

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
FEW = 8  # image tokens
BETWEEN = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """A call by its numbers; `str(case)` rebuilds it."""

    merge: str = "add"
    dtype: torch.dtype = torch.float32
    b: int = 2
    h: int = 2
    lq: int = 33
    lt: int = 77
    d: int = 64
    li: tuple[int, ...] = (32,)
    rows: tuple[int, ...] = (2,)  # batch of each identity
    text_rows: int = 2
    zero: int = 8
    num_global: int = 5
    scale: object = 0.8  # float, tuple, or "tensor"
    mask: bool = False
    bias: bool = False
    # packed: [B, L, H*D]; plain: contiguous; holes: head dim inside a wider one; cut: from a longer L
    layout: str = "packed"
    stages: int = 0  # of a bank of text keys and values; 0: no bank
    stage_rows: int = 1  # indices into it: 1 or b
    seed: int = 0

    def with_(self, **changes) -> Case:
        return replace(self, **changes)


def _tensor(c: Case, generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
    """[batch, H, length, D] float32, values that the dtype holds exactly."""
    x = torch.randn(batch, c.h, length, c.d, generator=generator)
    return x.to(c.dtype).float()


def _text(c: Case, generator: torch.Generator) -> torch.Tensor:
    """[text_rows, H, Lt, D], or a bank [stages, text_rows, H, Lt, D]."""
    one = [_tensor(c, generator, c.text_rows, c.lt) for _ in range(max(1, c.stages))]
    return torch.stack(one) if c.stages else one[0]


def _lay_out(c: Case, x: torch.Tensor) -> torch.Tensor:
    """The same values in the case's strides; whatever lies around them is NaN."""
    if x.dim() == 5:
        return _lay_out(c, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    b, h, n, d = x.shape
    nan = float("nan")
    if c.layout == "packed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if c.layout == "holes":
        wide = x.new_full((b, h, n, d + 3), nan)
        wide[..., 1 : d + 1] = x
        return wide[..., 1 : d + 1]
    if c.layout == "cut":
        long = x.new_full((b, n + 2, h, d), nan)
        long[:, 1 : n + 1] = x.transpose(1, 2)
        return long[:, 1 : n + 1].transpose(1, 2)
    return x.contiguous()


def build(c: Case) -> tuple[Args, Args]:
    """The call in the case's dtype and layout, and in float64."""
    g = torch.Generator().manual_seed(c.seed)
    q, kt, vt = _tensor(c, g, c.b, c.lq), _text(c, g), _text(c, g)
    stage = (torch.arange(c.stage_rows) * 2 + 1) % c.stages if c.stages else None
    ks = [_tensor(c, g, r, n) for r, n in zip(c.rows, c.li)]
    vs = [_tensor(c, g, r, n) for r, n in zip(c.rows, c.li)]
    scale = torch.randn(len(c.li), c.b, generator=g) if c.scale == "tensor" else c.scale
    mask = torch.rand(len(c.li), c.b, c.lq, generator=g) if c.mask else None
    bias = torch.randn(1, c.h, c.lq, c.lt, generator=g).to(c.dtype).float() if c.bias else None

    def args(put) -> Args:
        return normalize(
            put(q), put(kt), put(vt), [put(k) for k in ks], [put(v) for v in vs], id_scale=scale,
            id_mask=mask,
            merge=c.merge, num_zero=c.zero, num_global=c.num_global,
            text_bias=None if bias is None else bias.clone(), stage=stage,
        )  # fmt: skip

    return args(lambda x: _lay_out(c, x.to(c.dtype))), args(lambda x: x.double())


def poisoned(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A result tensor full of NaN inside a NaN frame, and the frame."""
    b, h, lq, d = q.shape
    frame = torch.full((b, lq + 2, h, d), float("nan"), dtype=q.dtype)
    return frame[:, 1 : lq + 1].transpose(1, 2), frame


def few(c: Case) -> bool:
    """Whether alpha is a quotient of few terms, so that it matters what a rounding of the inputs does."""
    return c.merge != "add" and c.lq <= FEW


def check_forward(c: Case, got: torch.Tensor, a: Args, truth_args: Args, *, between: bool = False) -> None:
    """err <= 2 err(eager) + floor against float64.

    Args:
        between: the kernel keeps X = h + sum s w i in the call's dtype between its passes, also for few rows, where X
            may be far larger than the result; the floor is then that of `BETWEEN` relative to X.
    """
    truth = reference.forward(truth_args)
    eager = sdpa.forward(a)
    assert torch.isfinite(got).all(), f"not finite: {c}"
    if not truth.numel():
        return
    size, floor = max(1.0, truth.abs().max().item()), FLOOR[c.dtype]
    if between:
        size = max(size, reference.forward(truth_args._replace(merge="add")).abs().max().item())
        floor = BETWEEN[c.dtype]
    limit = 2 * (eager - truth).abs().max().item() + floor * size
    if few(c):
        limit += 4 * (reference.forward(jogged(truth_args, c.dtype)) - truth).abs().max().item()
    error = (got - truth).abs().max().item()
    assert error <= limit, f"error {error:.3e} above {limit:.3e}: {c}"


def eager_gradients(a: Args, g: torch.Tensor):
    """Autograd through PyTorch's own attention in the call's dtype,
    in the order of `reference_bwd.backward`."""
    leaf = [t.detach().requires_grad_() for t in (a.q, a.k_text, a.v_text, *a.k_id, *a.v_id)]
    scale = torch.as_tensor(a.scale, dtype=torch.float32)
    scale = (scale[:, None].expand(-1, a.q.shape[0]) if scale.dim() == 1 else scale).clone().requires_grad_()
    n = len(a.k_id)
    again = a._replace(q=leaf[0], k_text=leaf[1], v_text=leaf[2], k_id=tuple(leaf[3 : 3 + n]),
                       v_id=tuple(leaf[3 + n :]), scale=scale)  # fmt: skip
    grads = torch.autograd.grad(sdpa.forward(again), (*leaf, scale), g, allow_unused=True)
    grads = [torch.zeros_like(t) if x is None else x for x, t in zip(grads, (*leaf, scale))]
    return grads[0], grads[1], grads[2], grads[3 : 3 + n], grads[3 + n : 3 + 2 * n], grads[-1]


def jogged(a: Args, dtype: torch.dtype) -> Args:
    """The float64 call with every input moved by about a rounding of the dtype."""
    g = torch.Generator().manual_seed(7)
    step = torch.finfo(dtype).eps / 2

    def move(t: torch.Tensor) -> torch.Tensor:
        return t * (1 + step * torch.randn(t.shape, generator=g, dtype=t.dtype))

    k_id, v_id = tuple(map(move, a.k_id)), tuple(map(move, a.v_id))
    return a._replace(q=move(a.q), k_text=move(a.k_text), v_text=move(a.v_text), k_id=k_id, v_id=v_id)


def check_backward(c: Case, got, a: Args, truth_args: Args, g: torch.Tensor) -> None:
    """err <= 3 err(eager) + floor + what a rounding of the inputs does, for every gradient.

    The last term matters for 16-bit dq and dscale, where eager's error may happen to be small: another arithmetic
    must be allowed what the rounding of its inputs does. It vanishes for float32.
    """
    truth = reference_bwd.backward(truth_args, g.double())
    eager = eager_gradients(a, g)
    # A gradient may be the difference of terms as large as the others (it is 0 for the key of an only token), so the
    # floor is relative to the largest of them.
    largest = max([1.0, *(t.abs().max().item() for n, t in zip(NAMES, flat(truth)) if t.numel() and n != "dscale")])
    roundings = 4 if few(c) else 1
    moved = flat(reference_bwd.backward(jogged(truth_args, c.dtype), g.double()))
    for name, x, y, z, m in zip(NAMES, flat(got), flat(truth), flat(eager), moved):
        assert x.shape == y.shape, f"{name}: {x.shape} instead of {y.shape}: {c}"
        if not y.numel():
            continue
        assert torch.isfinite(x).all(), f"{name} not finite: {c}"
        size = max(largest, y.abs().max().item())
        if name == "dscale":  # a sum of so many terms, whose roundings add up
            size = max(size, (c.h * c.lq * c.d) ** 0.5)
        limit = 3 * (z - y).abs().max().item() + FLOOR[c.dtype] * size + roundings * (m - y).abs().max().item()
        error = (x - y).abs().max().item()
        assert error <= limit, f"{name}: error {error:.3e} above {limit:.3e}: {c}"


NAMES = ["dq", "dk_text", "dv_text", "dscale", *[f"identity {i}" for i in range(64)]]


def flat(grads) -> list[torch.Tensor]:
    dq, dkt, dvt, dks, dvs, dscale = grads
    return [dq, dkt, dvt, dscale, *dks, *dvs]
