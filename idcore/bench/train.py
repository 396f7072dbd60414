"""Memory and work of one training step through four steps of SDXL, with and without recomputation.

On fake tensors: real code on shapes alone, every storage counted from the operation that makes it until nothing refers
to it (`live_memory`). Weights, their gradients and the optimiser's state are not counted: they are the same for all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..attention.types import AttentionOptions
from ..encoders.arcface_torch import SIZE
from ..errors import InputError
from ..training.bases.trailing import trailing_steps
from ..training.injection import Injection
from ..training.losses.alignment import AlignmentOptions, alignment_loss
from ..training.losses.faces import Recogniser
from ..training.through_steps import Through, through_steps
from . import fakes
from .arguments import count
from .live_memory import LiveMemory
from .train_check import validation

MERGES = {"add": AttentionOptions(), "ortho_v2": AttentionOptions("ortho_v2", num_zero=8)}
STAGES = {"2": "L_id", "3": "L_id and L_align"}
PAPER = {"GB": {"1": 41, "2": 49, "3": 56, "4": 63}, "seconds": {"1": 2.6, "2": 2.9, "3": 3.1, "4": 3.3}}
PAPER_SAYS = (
    "PuLID, arXiv 2404.16022, table 3: memory and time of an iteration by the number of last steps with gradients, "
    "768x768, A100 80 GB, weights and optimiser included, no checkpointing; batch size and precision are not stated"
)
BAR = 0.4  # of the eager processors without checkpointing
OPS = torch.ops.idcore


class Way(NamedTuple):
    """One row: whose processors, and what is recomputed."""

    name: str
    eager: bool
    steps: bool = False
    unet: bool = False
    decode: bool = False

    def options(self, gradient_steps: int) -> Through:
        return Through(4, gradient_steps, self.steps, self.unet, self.decode)


WAYS = (
    Way("eager", True),
    Way("ours", False),
    Way("ours, decode recomputed", False, decode=True),
    Way("ours, UNet blocks recomputed", False, unet=True, decode=True),
    Way("ours, steps recomputed", False, steps=True),
    Way("ours, steps and decode recomputed", False, steps=True, decode=True),
    Way("ours, steps, UNet blocks and decode recomputed", False, steps=True, unet=True, decode=True),
)
LAST = (WAYS[0], WAYS[1], WAYS[5])  # also for fewer steps with gradients, beside the paper's figures


class Rig:
    """A fake SDXL with a fake PuLID and recogniser; inside of `fakes.without_numbers()`."""

    def __init__(self, scheduler: Any, size: int, merge: str) -> None:
        self.size, self.options = size, MERGES[merge]
        with unset_fake_temporarily():
            self.few = trailing_steps(scheduler.config, 4, "dpmpp_2m")
        self.base = fakes.fake_sdxl(scheduler)
        self.found = dict(self.base.unet.attn_processors)
        self.pulid, self.features = fakes.fake_pulid()
        self.recogniser = Recogniser(fakes.fake_arcface(), "arcface", "bilinear", "cosine")
        self.noise = torch.empty(self.base.latent_shape(size, size))[None]
        self.wanted = torch.empty(1, 512)
        self.text = fakes.fake_text(self.base, 1, size)

    def step(self, way: Way, stage: str, gradient_steps: int, mark: Callable[[], None]) -> None:
        """Forward, `mark()`, backward."""
        options = way.options(gradient_steps)
        align = None
        if stage == "3":
            align = AlignmentOptions(backend="sdpa" if way.eager else "cpu")
        if way.eager:
            injection: Any = fakes.EagerInjection(self.base.unet, self.pulid, self.options)
        else:
            injection = Injection(self.base.unet, self.pulid, options=self.options, backend="cpu")
        try:
            self._loss(injection, options, align, mark).backward()
        finally:
            if way.eager:
                self.base.unet.set_attn_processor(dict(self.found))
            else:
                injection.remove()

    def _loss(self, injection: Any, options: Through, align: AlignmentOptions | None, mark: Callable[[], None]):
        person = injection.person(self.pulid(self.features))
        walk = through_steps(self.base, injection, person, self.text, self.noise, options, align=align, few=self.few)
        pictures = self.base.decode(walk.latents, checkpoint=options.checkpoint_decode)
        # Where the face is cannot be told without numbers: the middle, half as wide as the picture.
        side = slice(self.size // 4, self.size * 3 // 4)
        chips = F.interpolate(pictures[:, :, side, side], size=(SIZE, SIZE), mode="bilinear")
        loss = self.recogniser.distance(self.recogniser.network(chips), self.wanted).mean()
        if align is not None:
            loss = loss + alignment_loss(walk.alignment, align)
        del walk, pictures, chips
        mark()
        return loss

    def row(self, way: Way, stage: str, gradient_steps: int) -> dict[str, Any]:
        """Bytes of one step: kept after forward, and the most at any time."""
        kept = 0
        memory = LiveMemory()

        def mark() -> None:
            nonlocal kept
            kept = memory.now

        with torch.enable_grad(), memory:
            self.step(way, stage, gradient_steps, mark)
        return {
            "stage": stage, "way": way.name, "gradient_steps": gradient_steps, "kept_gb": round(kept / 1e9, 2),
            "peak_gb": round(memory.peak / 1e9, 2),
        }  # fmt: skip

    def work(self, way: Way, stage: str, gradient_steps: int) -> float:
        """Floating point operations of the same step, 1e12. Apart from `row`: the counter keeps tensors alive."""
        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        with torch.enable_grad(), counter:
            self.step(way, stage, gradient_steps, lambda: None)
        return round(counter.get_total_flops() / 1e12, 1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All ways through both stages, and the last 1 to 3 steps of some."""
    if options.size % 64:
        raise InputError(f"bench train: the size must be a multiple of 64 pixels, got {options.size}")
    scheduler = _scheduler()
    rows = []
    with fakes.without_numbers():
        rig = Rig(scheduler, options.size, options.merge)
        plans = [(w, stage, 4) for stage in options.stages for w in WAYS]
        plans += [(w, "2", n) for n in (3, 2, 1) for w in LAST if "2" in options.stages]
        for i, plan in enumerate(plans):
            print(f"{i + 1}/{len(plans)} stage {plan[1]}, {plan[2]} steps, {plan[0].name}", file=sys.stderr, flush=True)
            rows.append(rig.row(*plan))
            if plan[2] == 4:
                rows[-1]["tflop"] = rig.work(*plan)
    _relate(rows)
    return {
        "size": options.size, "merge": options.merge, "dtype": "bf16", "batch": 1, "bar": BAR,
        "reached": all(r["of_eager"] <= BAR for r in rows if r["way"] == WAYS[5].name and r["gradient_steps"] == 4),
        "rows": rows, "paper": PAPER, "paper_says": PAPER_SAYS, "check": validation(),
    }  # fmt: skip


def _relate(rows: list[dict[str, Any]]) -> None:
    """Each row's share of the eager peak, and its work over that without recomputation."""
    for row in rows:
        like = [r for r in rows if (r["stage"], r["gradient_steps"]) == (row["stage"], row["gradient_steps"])]
        by_name = {r["way"]: r for r in like}
        row["of_eager"] = round(row["peak_gb"] / by_name["eager"]["peak_gb"], 3)
        if "tflop" in row:
            row["work"] = round(row["tflop"] / by_name["ours"]["tflop"], 3)


def _scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def _formulas() -> dict[Any, Callable[..., int]]:
    """Multiplications and additions of what PyTorch's counter does not know."""

    def id_attention(q: Any, k_text: Any, v_text: Any, k_id: Any, *_: Any, **__: Any) -> int:
        b, h, lq, d = q
        return 4 * b * h * lq * d * (k_text[-2] + sum(k[-2] for k in k_id))

    def id_attention_grad(grad: Any, stats: Any, q: Any, k_text: Any, v_text: Any, k_id: Any, *_: Any, **__: Any):
        b, h, lq, d = q  # of the frozen text: logits, their gradient, dq; of the identity also dk and dv
        return 2 * b * h * lq * d * (3 * k_text[-2] + 5 * sum(k[-2] for k in k_id))

    def semantic(q: Any, k: Any, *_: Any, **__: Any) -> int:
        b, h, lq, d = q
        return 4 * b * h * lq * d * k[-2]

    def semantic_grad(q: Any, k: Any, *_: Any, **__: Any) -> int:
        b, h, lq, d = q
        return 10 * b * h * lq * d * k[-2]

    def flash(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def flash_grad(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    return {
        OPS.id_attention: id_attention,
        OPS.id_attention_for_training: id_attention,
        OPS.id_attention_grad: id_attention_grad,
        OPS.semantic_fwd: semantic,
        OPS.semantic_bwd: semantic_grad,
        aten._scaled_dot_product_flash_attention_for_cpu: flash,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_grad,
    }


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(n for n in text.split(",") if n)
    if not names or any(n not in STAGES for n in names):
        raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(STAGES)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench train`."""
    parser.add_argument("--size", type=count, default=768, help="pixels, a multiple of 64 (default: the paper's 768)")
    parser.add_argument("--merge", choices=tuple(MERGES), default="add", help="how the identity joins (default: add)")
    parser.add_argument("--stages", type=_stages, default=tuple(STAGES), help="2 (L_id), 3 (and L_align), or both")
