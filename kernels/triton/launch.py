"""Launches the forward kernels of `id_attention` for validated arguments (`idcore.backends.call.Args`)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

import triton

from ..backends.call import Stats
from . import id_attention as kernels
from . import tuning

MERGE_CODE = {"add": kernels.ADD, "ortho": kernels.ORTHO, "ortho_v2": kernels.ORTHO_V2}
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)
# up to so many image tokens h is kept in float32 between passes: with few, ortho's terms may cancel (our choice)
EXACT_ROWS = 256
# (what to do instead of launching, GPU generation) while `ahead` compiles without a GPU
ahead_of_time: ContextVar[tuple[Callable, int] | None] = ContextVar("ahead_of_time", default=None)


def start(kernel, grid: tuple[int, ...], config: dict, **arguments) -> None:
    """Every launch goes through here, so that `ahead` can compile instead of running."""
    ahead = ahead_of_time.get()
    if ahead is not None:
        return ahead[0](kernel, grid, {**arguments, **config})
    on = arguments["Q" if "Q" in arguments else "OUT"].device
    if on.type == "cuda" and on.index != torch.cuda.current_device():
        with torch.cuda.device(on):  # Triton launches on the current device
            kernel[grid](**arguments, **config)
    else:
        kernel[grid](**arguments, **config)


def capability(device: torch.device) -> int:
    """80, 90, 100, ...; 0 where there is no GPU (interpreter)."""
    ahead = ahead_of_time.get()
    if ahead is not None:
        return ahead[1]
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


class Plan:
    """Everything that the kernels of one call share: letters, strides, padded head dim, merge code."""

    def __init__(self, a):
        self.a = a
        self.b, self.h, self.lq, self.d = a.q.shape
        self.lt, self.n = a.k_text.shape[2], len(a.k_id)
        self.bd = tuning.padded(self.d)
        self.merge = MERGE_CODE[a.merge] if self.n else kernels.ADD
        self.cap = capability(a.q.device)
        self.between = torch.float32 if self.lq <= EXACT_ROWS else a.q.dtype  # of what is kept from pass to pass
        self.upcast = INTERPRETED and a.q.dtype == torch.bfloat16

    def tile(self, kernel: str) -> tuning.Tile:
        """This call's entry of the tuning table."""
        return tuning.tile(kernel, self.cap, self.a.q.element_size(), self.bd, INTERPRETED)

    def common(self) -> dict:
        """Arguments that every kernel with q and the keys takes."""
        a = self.a
        wide = a.mask is not None and a.mask.shape[1] == 1
        mask_strides = None if a.mask is None else (a.mask.stride(0), 0 if wide else a.mask.stride(1), a.mask.stride(2))
        from_tensor = isinstance(a.scale, Tensor)
        return dict(
            Q=a.q, KT=a.k_text, VT=a.v_text, KI=a.k_id or None, VI=a.v_id or None,
            BIAS=a.text_bias, SCALE=(a.scale or None) if not from_tensor else a.scale, MASK=a.mask,
            sq=a.q.stride(), skt=a.k_text.stride(), svt=a.v_text.stride(),
            ski=tuple(k.stride() for k in a.k_id) or None, svi=tuple(v.stride() for v in a.v_id) or None,
            sbias=self.bias_strides(), sscale=a.scale.stride() if from_tensor else None, smask=mask_strides,
            DIVT=(self.b // a.k_text.shape[0], self.b // a.v_text.shape[0]),
            DIVI=tuple(self.b // k.shape[0] for k in a.k_id) or None,
            LQ=self.lq, LT=self.lt, LI=tuple(k.shape[2] for k in a.k_id) or None, NZ=a.num_zero,
            NG=a.num_global,
            N=self.n, MERGE=self.merge, D=self.d, BD=self.bd, ROOT=float(self.d) ** 0.5, UPCAST=self.upcast,
        )  # fmt: skip

    def bias_strides(self) -> tuple[int, ...] | None:
        """Strides of text_bias, 0 where it is broadcast."""
        bias = self.a.text_bias
        return None if bias is None else tuple(s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape))

    def key_tiles(self, block: int) -> dict:
        """How text and identity keys are cut into blocks."""
        if not (INTERPRETED or tuning.unrolled(self.a.q.element_size(), self.bd)):
            blocks = self.key_blocks(block)
            return dict(TT=(blocks["BT"], -1, 0), TI=tuple((n, -1, 0) for n in blocks["BI"] or ()) or None)
        id_tiles = tuple(tuning.split(k.shape[2], block) for k in self.a.k_id)
        return dict(TT=tuning.split(self.lt, block), TI=id_tiles or None)

    def key_blocks(self, block: int) -> dict:
        """Size of a key block for text and for each identity."""
        id_blocks = tuple(min(block, tuning.padded(k.shape[2])) for k in self.a.k_id)
        return dict(BT=min(block, tuning.padded(self.lt)), BI=id_blocks or None)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch memory."""
        return torch.empty(shape, dtype=dtype, device=self.a.q.device)


def new_out(q: Tensor) -> Tensor:
    """[B, H, Lq, D] as a view of memory order B, Lq, H, D."""
    b, h, lq, d = q.shape
    return torch.empty(b, lq, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)


def forward(a, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q."""
    return _forward(Plan(a), new_out(a.q) if out is None else out, want_stats=False)[0]


def forward_stats(a, out: Tensor | None = None) -> tuple[Tensor, Stats]:
    """`forward` and what `backward` can use of it."""
    return _forward(Plan(a), new_out(a.q) if out is None else out, want_stats=True)


def stats(a) -> Stats:
    """Only the statistics, where forward did not keep them."""
    return _forward(Plan(a), None, want_stats=True)[1]


def _forward(p: Plan, out: Tensor | None, want_stats: bool) -> tuple[Tensor | None, Stats | None]:
    t = p.tile("forward")
    tiles = triton.cdiv(p.lq, t.rows)
    two = p.merge != kernels.ADD
    v2 = p.merge == kernels.ORTHO_V2
    ht = p.empty(p.b, p.h, p.lq, p.d, dtype=p.between) if two and out is not None else None
    it = out if ht is None or p.between == out.dtype else torch.empty_like(ht)
    share = p.empty(p.n, p.b, p.h, p.lq) if v2 else None
    part = p.empty(tiles, p.n, 2, p.b, p.h, p.d) if two else None
    lse_t = p.empty(p.b, p.h, p.lq) if want_stats else None
    lse_i = p.empty(p.n, p.b, p.h, p.lq) if want_stats and p.n else None
    lse_u = p.empty(p.n, p.b, p.h, p.lq) if want_stats and v2 else None
    if p.a.q.numel():
        start(
            kernels.forward_kernel, (tiles, p.h, p.b), dict(num_warps=t.warps, num_stages=t.stages),
            **p.common(), **p.key_tiles(t.keys), OUT=it, HT=ht, SHARE=share, PART=part, LSE_T=lse_t,
            LSE_I=lse_i,
            LSE_U=lse_u, so=None if it is None else it.stride(), sh=None if ht is None else ht.stride(),
            BM=t.rows,
        )  # fmt: skip
        if two and out is not None:
            _merge(p, out, it, ht, share, part, tiles)
    return out, _stats(p, lse_t, lse_i, lse_u, share, part) if want_stats else None


def _merge(p: Plan, out: Tensor, it: Tensor, ht: Tensor, share: Tensor | None, part: Tensor, tiles: int) -> None:
    c = p.common()
    rows = tuning.INTERPRETED.rows if INTERPRETED else tuning.MERGE_ROWS
    start(
        kernels.merge_kernel, (triton.cdiv(p.lq, rows), p.h, p.b), dict(num_warps=4),
        OUT=out, IT=it, HT=ht, SHARE=share, PART=part, SCALE=c["SCALE"], MASK=c["MASK"], so=out.stride(),
        si=it.stride(), sh=ht.stride(),
        sscale=c["sscale"], smask=c["smask"], LQ=p.lq, tiles=tiles, N=p.n, MERGE=p.merge, D=p.d, BD=p.bd,
        BM=rows,
        BT=16, BH=4,
    )  # fmt: skip


def _stats(p: Plan, lse_t, lse_i, lse_u, share, part) -> Stats:
    mean = None if share is None else share.mean(2)
    if part is None:
        return Stats(lse_t, lse_i, lse_u, mean, None, None)
    num, den = part.sum(0).unbind(1)
    zero = den == 0
    alpha = torch.where(zero, 0.0, num / torch.where(zero, 1.0, den))
    return Stats(lse_t, lse_i, lse_u, mean, alpha, den)
