"""Launches the forward kernels of `id_attention` for validated arguments (`idcore.backends.call.Args`)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

import triton

from ..backends.call import Stats, stats_shapes
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
        self.lt, self.n = a.text_length, len(a.k_id)
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
        stage_strides, bank_strides = self.stage_strides()
        return dict(
            Q=a.q, KT=a.k_text, VT=a.v_text, KI=a.k_id or None, VI=a.v_id or None, STAGE=a.stage,
            BIAS=a.text_bias, SCALE=(a.scale or None) if not from_tensor else a.scale, MASK=a.mask,
            sq=a.q.stride(), skt=a.k_text.stride()[-4:], svt=a.v_text.stride()[-4:],
            ski=tuple(k.stride() for k in a.k_id) or None, svi=tuple(v.stride() for v in a.v_id) or None,
            sstage=stage_strides, sbank=bank_strides, sbias=self.bias_strides(),
            sscale=a.scale.stride() if from_tensor else None, smask=mask_strides,
            DIVT=(self.b // a.k_text.shape[-4], self.b // a.v_text.shape[-4]),
            DIVI=tuple(self.b // k.shape[0] for k in a.k_id) or None,
            LQ=self.lq, LT=self.lt, LI=tuple(k.shape[2] for k in a.k_id) or None, NZ=a.num_zero,
            NG=a.num_global,
            N=self.n, MERGE=self.merge, D=self.d, BD=self.bd, ROOT=float(self.d) ** 0.5, UPCAST=self.upcast,
        )  # fmt: skip

    def stage_strides(self) -> tuple[tuple[int, int] | None, tuple[int, int]]:
        """(stride of the stage index, number of stages), and elements from stage to stage in keys and values."""
        a = self.a
        if a.stage is None:
            return None, (0, 0)
        per_sample = a.stage.stride(0) if a.stage.shape[0] > 1 else 0
        return (per_sample, a.k_text.shape[0]), (a.k_text.stride(0), a.v_text.stride(0))

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
    return _forward(Plan(a), new_out(a.q) if out is None else out, Stats(*[None] * 6))


def forward_stats(a, out: Tensor | None = None) -> tuple[Tensor, Stats]:
    """`forward` and what `launch_bwd.backward` needs of it."""
    make = torch.empty if a.q.numel() else torch.zeros
    shapes = stats_shapes(a)
    stats = Stats(*(None if s is None else make(s, dtype=torch.float32, device=a.q.device) for s in shapes))
    return _forward(Plan(a), new_out(a.q) if out is None else out, stats), stats


def _forward(p: Plan, out: Tensor, s: Stats) -> Tensor:
    """Fills `out` and the tensors of `s`."""
    t = p.tile("forward" if p.a.text_bias is None else "forward_bias")
    tiles = triton.cdiv(p.lq, t.rows)
    two = p.merge != kernels.ADD
    ht = p.empty(p.b, p.h, p.lq, p.d, dtype=p.between) if two else None
    it = torch.empty_like(ht) if two and p.between != out.dtype else out
    share = p.empty(p.n, p.b, p.h, p.lq) if p.merge == kernels.ORTHO_V2 else None
    part = p.empty(tiles, p.n, 2, p.b, p.h, p.d) if two else None
    if p.a.q.numel():
        start(
            kernels.forward_kernel, (tiles, p.h, p.b), dict(num_warps=t.warps, num_stages=t.stages),
            **p.common(), **p.key_tiles(t.keys), OUT=it, HT=ht, SHARE=share, PART=part, LSE_T=s.lse_text,
            LSE_I=s.lse_id, LSE_U=s.lse_unscaled, so=it.stride(), sh=None if ht is None else ht.stride(), BM=t.rows,
        )  # fmt: skip
        if two:
            _merge(p, out, it, ht, share, part, s)
    return out


def _merge(p: Plan, out: Tensor, it: Tensor, ht: Tensor, share: Tensor | None, part: Tensor, s: Stats) -> None:
    c, t = p.common(), p.tile("merge")
    take = "SCALE MASK sscale smask LQ N MERGE D BD".split()
    start(
        kernels.merge_kernel, (triton.cdiv(p.lq, t.rows), p.h, p.b), dict(num_warps=t.warps),
        **{name: c[name] for name in take}, OUT=out, IT=it, HT=ht, SHARE=share, PART=part, MEAN=s.share,
        ALPHA=s.alpha, DEN=s.den, so=out.stride(), si=it.stride(), sh=ht.stride(), tiles=part.shape[0], BM=t.rows,
        BT=16, BH=4,
    )  # fmt: skip
