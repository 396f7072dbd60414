"""`stage_tokens`: learned word embeddings put in the places of placeholder tokens, for every stage at once."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..backends.call import constant_in_traces
from ..errors import InputError, NoBackendError

# Asked in this order. A module brings why_not(device, dtype), forward and backward as in reference_tokens.
BACKENDS = {
    "triton": "idcore.backends.triton_tokens",
    "cpu": "idcore.backends.cpu_tokens",
    "reference": "idcore.backends.reference_tokens",
}


def stage_tokens(
    embeddings: Tensor, tokens: Tensor, positions: Tensor, *, stage: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The prompt's word embeddings with rows replaced by learned tokens, one copy per stage.

    SeFi-IDE ("Beyond Inserting", arXiv 2402.00631) gives a person one token for keys and one for values in each of
    five stages of the denoising: ten stages here. DreamIdentity (arXiv 2307.00300) gives k consecutive words and one
    stage. What comes out goes through the frozen text transformer.

    Args:
        embeddings: Word embeddings of the prompts. [B, L, E], float32, bfloat16, float16 or float64.
        tokens: Learned tokens. [S, Bt, T, E], same device; Bt divides B, sample b takes row b * Bt // B. They may be
            float32 beside 16-bit embeddings, as trained ones are.
        positions: Row of each placeholder. Integer [T], [1, T] or [B, T], distinct within a sample; -1: that token is
            left out of the sample.
        stage: Only this stage: integer tensor [], [1] or [B] (one per sample). Default: all.
        backend: One of BACKENDS; default: the first that can run the call.

    Returns:
        [S, B, L, E], with `stage` [B, L, E]; dtype of `embeddings`. Gradients flow to both.

    Raises:
        InputError: shapes, dtypes, devices, positions or stages do not fit together.
        NoBackendError: the named backend cannot run this call; says why.
    """
    positions = _check(embeddings, tokens, positions)
    stage = None if stage is None else _check_stage(stage, embeddings, tokens)
    name = _choose(embeddings, backend)
    return torch.ops.idcore.stage_tokens(embeddings, tokens, positions, stage, name)


def _check(embeddings: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    if embeddings.dim() != 3 or 0 in embeddings.shape or not embeddings.is_floating_point():
        got = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise InputError(f"stage_tokens: embeddings must be floating-point [B, L, E] without a 0, got {got}")
    b, length, e = embeddings.shape
    fits = tokens.dim() == 4 and tokens.shape[3] == e and 0 not in tokens.shape and b % tokens.shape[1] == 0
    if not fits or not tokens.is_floating_point():
        want = f"[S, 1 or B, T, E] = [S, 1 or {b}, T, {e}]"
        raise InputError(f"stage_tokens: tokens must be floating-point {want}, got {tokens.dtype} {list(tokens.shape)}")
    count = tokens.shape[2]
    positions = positions[None] if positions.dim() == 1 else positions
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if positions.dim() != 2 or positions.shape[1] != count or positions.shape[0] not in (1, b) or not whole:
        want = f"integers [T] = [{count}] or [B, T] = [{b}, {count}]"
        raise InputError(f"stage_tokens: positions must be {want}, got {positions.dtype} {list(positions.shape)}")
    for name, t in (("tokens", tokens), ("positions", positions)):
        if t.device != embeddings.device:
            raise InputError(
                f"stage_tokens: {name} are on {t.device}, embeddings on {embeddings.device}; "
                "move them with .to(embeddings.device)"
            )
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_positions(positions, length)
    return positions.to(torch.int32)


def _check_positions(positions: Tensor, length: int) -> None:
    if int(positions.min()) < -1 or int(positions.max()) >= length:
        raise InputError(
            f"stage_tokens: positions must be -1 (left out) to L - 1 = {length - 1}, "
            f"got {int(positions.min())} to {int(positions.max())}"
        )
    for row in positions.tolist():
        used = [p for p in row if p >= 0]
        if len(set(used)) != len(used):
            raise InputError(f"stage_tokens: positions within a sample must be distinct, got {row}")


def _check_stage(stage: Tensor, embeddings: Tensor, tokens: Tensor) -> Tensor:
    b, count = embeddings.shape[0], tokens.shape[0]
    whole = isinstance(stage, Tensor) and not stage.is_floating_point() and stage.dtype != torch.bool
    if not whole or stage.dim() > 1 or stage.numel() not in (1, b) or stage.device != embeddings.device:
        got = f"{stage.dtype} {list(stage.shape)} on {stage.device}" if isinstance(stage, Tensor) else f"{stage!r}"
        raise InputError(
            f"stage_tokens: stage must be an integer tensor [], [1] or [B] = [{b}] on {embeddings.device}, got {got}"
        )
    if stage.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(stage.min()), int(stage.max())
        if low < 0 or high >= count:
            raise InputError(f"stage_tokens: stage must be 0 to {count - 1}, got {low} to {high}")
    return stage.reshape(-1).to(torch.int32)


def _load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


@constant_in_traces
def _first(device: str, dtype: torch.dtype, names: tuple[str, ...]) -> str:
    refusals = {}
    for name in names:
        refusals[name] = _load(name).why_not(device, dtype)
        if not refusals[name]:
            return name
    lines = "; ".join(f"{name}: {', '.join(why)}" for name, why in refusals.items())
    raise NoBackendError(f"stage_tokens: no backend can run this call ({lines})")


def _choose(embeddings: Tensor, backend: str | None) -> str:
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    names = tuple(BACKENDS) if backend is None else (backend,)
    return _first(embeddings.device.type, embeddings.dtype, names)


@torch.library.custom_op("idcore::stage_tokens", mutates_args=())
def _fwd(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, backend: str) -> Tensor:
    return _load(backend).forward(embeddings, tokens, positions, stage)


@_fwd.register_fake
def _fwd_fake(embeddings, tokens, positions, stage, backend):
    stages = () if stage is not None else (tokens.shape[0],)
    return embeddings.new_empty(*stages, *embeddings.shape)


@torch.library.custom_op("idcore::stage_tokens_bwd", mutates_args=())
def _bwd(
    g: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, backend: str, embeddings: bool
) -> list[Tensor]:
    de, dt = _load(backend).backward(g, tokens, positions, stage, embeddings=embeddings)
    return [dt, de] if embeddings else [dt]


@_bwd.register_fake
def _bwd_fake(g, tokens, positions, stage, backend, embeddings):
    like = g.shape[1:] if stage is None else g.shape
    return [
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
        *([g.new_empty(like)] if embeddings else []),
    ]


def _setup(ctx, inputs, output) -> None:
    _, tokens, positions, stage, ctx.backend = inputs
    ctx.staged = stage is not None
    ctx.save_for_backward(tokens, positions, *([stage] if ctx.staged else []))


def _backward(ctx, g):
    tokens, positions, *stage = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    dt, *de = torch.ops.idcore.stage_tokens_bwd(
        g.contiguous(), tokens, positions, stage[0] if ctx.staged else None, ctx.backend, wanted
    )
    return de[0] if wanted else None, dt, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)
