"""Seeded random calls of every op on a backend, judged by the parity rule.

    python -m idcore.testing.fuzz id_attention --backend cpu --seeds 0:2000
    python -m idcore.testing.fuzz semantic_alignment --backend triton --seed 17

Each failure prints the line that repeats it. `triton` runs in Triton's interpreter where there is no GPU, on calls with
fewer rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NoBackendError
from .cases import random_case
from .loss_cases import random_semantic_case, random_token_loss_case
from .parity import assert_gradients, assert_parity
from .stage_cases import random_stage_case

DRAW: dict[str, Callable[[int], Any]] = {
    "id_attention": random_case,
    "semantic_alignment": random_semantic_case,
    "stage_tokens": random_stage_case,
    "token_attention_loss": random_token_loss_case,
}


@dataclass
class Tally:
    """What became of some seeds."""

    ran: int = 0
    refused: int = 0  # the backend says that it cannot run such calls
    failures: list[str] = field(default_factory=list)
    left_out: int = 0  # for want of time


def smaller(case: Any) -> Any:
    """At most two samples, two heads and about 65 rows: what an interpreter runs in a fraction of a second."""
    if case.op == "stage_tokens":  # small as it is; Triton's interpreter cuts to bfloat16 where a GPU rounds
        return case.with_(dtype="fp16") if case.dtype == "bf16" else case
    batch = min(case.batch, 2)
    changes = {"batch": batch, "heads": min(case.heads, 2), "lq": min(case.lq, 66), "lt": min(case.lt, 78)}
    for name in ("text_batch", "id_batch", "ref_batch"):
        if hasattr(case, name):
            changes[name] = min(getattr(case, name), batch) or 1
    return case.with_(**changes)


def _gradients_mean_something(case: Any, backend: str) -> bool:
    """An ill-posed call says nothing of a backend that rounds to 16 bit on the way."""
    return backend in ("cpu", "reference") or not getattr(case, "ill_posed", False)


def fuzz(
    op: str, backend: str, seeds: Iterable[int], *, device: str = "cpu", small: bool = False, backward_every: int = 1,
    seconds: float = float("inf"),
) -> Tally:  # fmt: skip
    """Run random calls of an op forward and, for every `backward_every`th seed, backward.

    Args:
        op: a name in `DRAW`.
        small: cut the calls down by `smaller`.
        backward_every: 0 leaves gradients out.
        seconds: no call begins later than so long after the first.
    """
    tally, end = Tally(), time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            tally.left_out += 1
            continue
        case = DRAW[op](seed)
        case = smaller(case) if small else case
        try:
            assert_parity(case, backend, seed=seed, device=device)
            if backward_every and seed % backward_every == 0 and _gradients_mean_something(case, backend):
                assert_gradients(case, backend, seed=seed, device=device)
            tally.ran += 1
        except NoBackendError:
            tally.refused += 1
        except Exception as e:  # a crash is a finding too, and the other seeds still count
            again = f"python -m idcore.testing.fuzz {op} --backend {backend} --seed {seed}" + " --small" * small
            tally.failures.append(f"{e if isinstance(e, AssertionError) else repr(e)}\nor: {again}")
    return tally


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a call failed, or when the backend ran none."""
    parser = argparse.ArgumentParser(prog="python -m idcore.testing.fuzz", description=__doc__)
    parser.add_argument("op", choices=tuple(DRAW))
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--seeds", "--seed", type=_seeds, default=range(200), help="one seed, or first:end")
    parser.add_argument("--small", action="store_true", help="fewer rows, heads and samples")
    parser.add_argument("--backward-every", type=int, default=1, help="gradients of every nth seed; 0: none")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no call later than so long after")
    options = parser.parse_args(argv)
    gpu = options.backend in ("cuda", "triton") and torch.cuda.is_available()
    if options.backend == "triton" and not gpu:
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported, and PyTorch has imported it
            command = [sys.executable, "-W", "ignore", "-m", "idcore.testing.fuzz", *(argv or sys.argv[1:])]
            return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    tally = fuzz(
        options.op, options.backend, options.seeds, device="cuda" if gpu else "cpu", small=options.small,
        backward_every=options.backward_every, seconds=options.seconds,
    )  # fmt: skip
    print(*tally.failures, sep="\n\n")
    late = f", {tally.left_out} left out for want of time" if tally.left_out else ""
    counts = f"{tally.ran} right, {tally.refused} refused, {len(tally.failures)} wrong"
    print(f"{options.op}, {options.backend}: {counts}{late}")
    return 1 if tally.failures or not tally.ran else 0


if __name__ == "__main__":
    sys.exit(main())
