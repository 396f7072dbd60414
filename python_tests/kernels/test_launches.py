"""How many kernels a call costs: ours, and PyTorch's own. Launching is left out, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
FREE = {
    "empty",
    "empty_like",
    "transpose",
    "select",
    "unbind",
    "slice",
    "view",
    "permute",
    "detach",
    "expand",
    "unsqueeze",
}
BASE = Case(dtype=torch.float16, lq=1024)


class Launches(TorchDispatchMode):
    """Names of kernels in the order of their launches; PyTorch's begin with "torch."."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def kernel(self, kernel, grid, arguments) -> None:
        self.names.append(kernel.fn.__name__)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(f"torch.{name}")
        return func(*args, **(kwargs or {}))


def launches(call) -> list[str]:
    """What `call` launches."""
    from idcore.kernels import launch

    with Launches() as mode:
        token = launch.ahead_of_time.set((mode.kernel, 90))
        try:
            call()
        finally:
            launch.ahead_of_time.reset(token)
    return mode.names


@pytest.fixture(scope="module")
def modules():
    from idcore.kernels import launch, launch_bwd, launch_semantic, launch_token_loss, launch_tokens

    if launch.INTERPRETED:
        pytest.skip("needs compiled kernels, TRITON_INTERPRET=1 is set")
    return launch, launch_bwd, launch_semantic, launch_token_loss, launch_tokens


@pytest.mark.parametrize("stats", [False, True])
def test_forward_is_one_launch_and_ortho_two(modules, stats):
    run = modules[0].forward_stats if stats else modules[0].forward
    for merge, expected in (("add", ["forward_kernel"]), ("ortho_v2", ["forward_kernel", "merge_kernel"])):
        for more in ({}, dict(stages=5), dict(li=(4, 32), rows=(1, 2), scale=(1.0, 0.5), mask=True)):
            a, _ = build(BASE.with_(merge=merge, **more))
            assert launches(lambda a=a: run(a)) == expected


def statistics(modules, a):
    """The tensors of `Stats`, values left as they come."""
    found = []
    launches(lambda: found.append(modules[0].forward_stats(a)[1]))
    return found[0]


@pytest.mark.parametrize("text_kv", [False, True])
def test_backward(modules, text_kv):
    keys = ["keys_kernel", "fold_kernel"]
    for merge, first in (("add", []), ("ortho_v2", ["coupling_kernel", "quotient_kernel"])):
        a, _ = build(BASE.with_(merge=merge))
        kept = statistics(modules, a)
        expected = [*first, "rows_kernel", "torch.sum", *(keys if text_kv else []), *keys]
        assert launches(lambda a=a, s=kept: modules[1].backward(a, a.q, s, text_kv=text_kv)) == expected


def test_the_other_ops(modules):
    _, _, semantic, token_loss, tokens = modules
    a, _ = build(BASE)
    out, lse = torch.empty_like(a.k_text), torch.empty(2, 2, 77)
    assert launches(lambda: semantic.forward(a.q, a.k_text)) == ["gather_kernel", "join_kernel"]
    assert launches(lambda: semantic.backward(a.q, a.k_text, out, out, lse)) == ["text_kernel", "fold_kernel"]
    weight = torch.ones(2, 77)
    assert launches(lambda: token_loss.forward(a.q, a.k_text, a.k_text, weight)) == ["loss_kernel", "torch.sum"]
    rows, factor = torch.empty(3, 2, 2, 1024), torch.ones(())
    backward = launches(lambda: token_loss.backward(a.q, a.k_text, a.k_text, weight, rows, factor))
    assert backward == ["loss_keys_kernel", "fold_kernel"]
    words, learned, at = torch.empty(2, 77, 768), torch.empty(10, 1, 2, 768), torch.zeros(1, 2, dtype=torch.int32)
    assert launches(lambda: tokens.forward(words, learned, at, None)) == ["tokens_kernel"]
    both = ["tokens_grad_kernel", "embeddings_grad_kernel"]
    assert launches(lambda: tokens.backward(torch.empty(10, 2, 77, 768), learned, at, None)) == both
