"""How many kernels a call costs: ours, and PyTorch's own. Launching is left out, so no GPU is needed."""

from __future__ import annotations

import ast
import inspect
import textwrap

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
        self.calls: list[tuple] = []  # of ours, with their arguments

    def kernel(self, kernel, grid, arguments) -> None:
        self.names.append(kernel.fn.__name__)
        self.calls.append((kernel, arguments))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(f"torch.{name}")
        return func(*args, **(kwargs or {}))


def launches(call) -> list[str]:
    """Names of what `call` launches."""
    return recorded(call).names


def recorded(call) -> Launches:
    """What `call` launches."""
    from idcore.kernels import launch

    with Launches() as mode:
        token = launch.ahead_of_time.set((mode.kernel, 90))
        try:
            call()
        finally:
            launch.ahead_of_time.reset(token)
    return mode


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


def handed_on(kernel) -> set[str]:
    """Constant parameters of a kernel of which an element is the argument of a call."""
    function = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    constants = {a.arg for a in function.args.args if a.annotation and ast.unparse(a.annotation) == "tl.constexpr"}
    given = [x for call in ast.walk(function) if isinstance(call, ast.Call) for x in call.args]
    return {x.value.id for x in given if isinstance(x, ast.Subscript) and isinstance(x.value, ast.Name)} & constants


@pytest.mark.parametrize("d", [64, 160])
def test_what_kernels_hand_on_of_constant_tuples_are_numbers(modules, d):
    """Triton 3.4 to 3.6 take no tuple out of a tuple of constants as an argument; later ones and the interpreter do."""
    found = set()
    for more in ({}, dict(li=(4, 70), rows=(1, 2), scale=(1.0, 0.5))):
        a, _ = build(BASE.with_(merge="ortho_v2", d=d, **more))
        calls = recorded(lambda a=a: modules[0].forward(a)).calls
        calls += recorded(lambda a=a: modules[1].backward(a, a.q, statistics(modules, a))).calls
        for kernel, arguments in calls:
            for name in handed_on(kernel):
                found.add(name)
                assert all(isinstance(x, int) for x in arguments[name]), (kernel.fn.__name__, name, arguments[name])
    assert "TT" in found and "BI" in found
