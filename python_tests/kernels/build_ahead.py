"""Compile Triton kernels for GPU generations and print one JSON line a kernel. Used by test_resources.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import conftest  # noqa: E402, F401  (finds idcore.kernels)
import torch  # noqa: E402
from idcore.kernels import ahead, launch, launch_bwd, launch_semantic, launch_token_loss, launch_tokens  # noqa: E402

from idcore.backends.checks import normalize  # noqa: E402


def arguments(dtype: torch.dtype, head_dim: int, merge: str, variant: str):
    """A call shaped as in SDXL, values left as they come.

    Args:
        variant: "bank": a stage bank, bias, two identities, scales as numbers, no mask; "long": 150 text tokens;
            "few": 64 image tokens; "": none of these.
    """

    def heads(length: int, batch: int = 2) -> torch.Tensor:
        return torch.empty(batch, length, 2, head_dim, dtype=dtype).transpose(1, 2)

    i, lq, lt = heads(32), 64 if variant == "few" else 1024, 150 if variant == "long" else 77
    if variant == "bank":
        k = heads(lt, 10).unflatten(0, (5, 2))
        more = dict(id_scale=(0.8, 0.4), id_mask=None, text_bias=torch.empty(1, 1, 1, lt), stage=torch.zeros(1).int())
        return normalize(heads(lq), k, k, [i, i], [i, i], merge=merge, num_zero=8, num_global=5, **more)
    k = heads(lt)
    more = dict(id_scale=torch.empty(1, 2), id_mask=torch.empty(1, lq), text_bias=None)
    return normalize(heads(lq), k, k, i, i, merge=merge, num_zero=8, num_global=5, **more)


def token_loss(a) -> None:
    """Forward and backward of `token_attention_loss`."""
    weight = torch.empty(2, a.k_text.shape[2])
    _, rows = launch_token_loss.forward(a.q, a.k_text, a.k_text, weight)
    launch_token_loss.backward(a.q, a.k_text, a.k_text, weight, rows, torch.empty(()))


def semantic(a) -> None:
    """Forward and backward of `semantic_alignment`."""
    out, lse = launch_semantic.forward(a.q, a.k_text)
    launch_semantic.backward(a.q, a.k_text, out, out, lse)


def stage_tokens(a) -> None:
    """Forward and backward of `stage_tokens` with float32 tokens, of all stages and of one."""
    words = torch.empty(2, 77, 12 * a.q.shape[3], dtype=a.q.dtype)
    tokens, positions = torch.empty(10, 1, 2, words.shape[2]), torch.empty(2, 2, dtype=torch.int32)
    for stage in (None, torch.empty(2, dtype=torch.int32)):
        out = launch_tokens.forward(words, tokens, positions, stage)
        launch_tokens.backward(out, tokens, positions, stage)


OTHER_OPS = {"stage_tokens": stage_tokens, "token_loss": token_loss, "semantic": semantic}


def main() -> None:
    for job in sys.argv[1:]:
        dtype, head_dim, what, capability, *variant = job.split(",")
        variant = variant[0] if variant else ""
        a = arguments(getattr(torch, dtype), int(head_dim), "add" if what in OTHER_OPS else what, variant)
        with ahead.recording(int(capability)) as kernels:
            if what in OTHER_OPS:
                OTHER_OPS[what](a)
            elif variant == "forward":
                launch.forward(a)
            else:
                launch_bwd.backward(a, a.q, launch.forward_stats(a)[1])
        for kernel in {k.asm["ptx"]: k for k in kernels}.values():  # a kernel may be launched twice
            built = dataclasses.asdict(ahead.read(kernel, int(capability)))
            print(json.dumps({**built, "instructions": sorted(built["instructions"]), "dtype": dtype, "job": job}))


if __name__ == "__main__":
    main()
