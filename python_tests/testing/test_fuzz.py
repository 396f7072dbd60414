"""Random calls of every op on every backend that a CPU can run, forward and backward, by the parity rule."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from idcore.backends import cpu, sdpa
from idcore.testing import Case, assert_gradients, fuzz
from idcore.testing.parity import check_gradients

BACKENDS = {
    "id_attention": ("cpu", "sdpa", "reference"),
    "semantic_alignment": ("cpu", "sdpa"),
    "stage_tokens": ("cpu", "reference"),
    "token_attention_loss": ("cpu", "reference"),
}
INTERPRETED = tuple(fuzz.DRAW)
PAIRS = [(op, backend) for op, backends in BACKENDS.items() for backend in backends]


@pytest.fixture(autouse=True)
def _one_thread():
    """The calls are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(op, backend, seeds):
    if backend == "cpu" and cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    tally = fuzz.fuzz(op, backend, seeds)
    assert not tally.failures, "\n\n".join(tally.failures)
    assert tally.ran > 0.9 * len(seeds), tally


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_random_calls(op, backend):
    run(op, backend, range(200))


@pytest.mark.parametrize("seed", [10477, 10723, 11032, 11702, 11867])
def test_calls_whose_alpha_shows_the_error_of_long_sums(seed):
    """One text token under many rows, very few rows, and D = 256: there alpha is a quotient of cancelling sums."""
    run("id_attention", "cpu", [seed])


@pytest.mark.parametrize("seed", [10477, 10723])
def test_sums_over_rows_lose_no_more_than_eager(seed):
    """The second look allows these ill-posed calls more; rows summed in one sequence would be off 9 and 18 times."""
    if cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    wrong = {r.what: r for r in check_gradients(fuzz.random_case(seed), "cpu", seed=seed)}["v_text"]
    assert wrong.error <= 5.0 * wrong.eager_error, wrong


@pytest.mark.nightly
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_many_random_calls(op, backend):
    run(op, backend, range(10_000, 12_000))


def interpreted(op, *options, timeout):
    """Triton decides whether to interpret when it is imported, so this takes a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "idcore.testing.fuzz", op, "--backend", "triton", *options]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    assert done.returncode == 0 and " 0 wrong" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", INTERPRETED)
def test_random_calls_of_triton_interpreted(op):
    interpreted(op, "--seeds", "0:200", "--small", "--backward-every", "4", timeout=900)


@pytest.mark.nightly
@pytest.mark.parametrize("op", INTERPRETED)
def test_many_random_calls_of_triton_interpreted(op):
    interpreted(op, "--seeds", "10000:12000", "--small", timeout=7200)


SMALL = Case("small", "test", heads=2, lq=20, lt=7, li=(3,), num_zero=2)


def test_a_wrong_gradient_is_caught_and_its_line_repeats_it(monkeypatch):
    right = sdpa.forward
    slanted = lambda a, out=None: right(a, out) + 0.01 * (a.q - a.q.detach())  # noqa: E731  (same values)
    monkeypatch.setattr(sdpa, "forward", slanted)
    with pytest.raises(AssertionError, match="q: error .*\nreproduce: from idcore.testing import Case") as found:
        assert_gradients(SMALL, "sdpa")
    line = str(found.value).split("reproduce: ")[1].splitlines()[0]
    with pytest.raises(AssertionError, match="q: error"):
        exec(line, {})  # the printed line, as a user would paste it


def test_memory_that_a_kernel_forgets_to_write_shows(monkeypatch):
    def lazy(a, out=None):
        return torch.empty_like(a.q)

    monkeypatch.setattr(sdpa, "forward", lazy)
    tally = fuzz.fuzz("id_attention", "sdpa", range(3))
    assert len(tally.failures) == 3 and "finite=False" in tally.failures[0]
    assert "python -m idcore.testing.fuzz id_attention --backend sdpa --seed 0" in tally.failures[0]


def test_expanded_and_empty_calls_are_among_the_random_ones():
    drawn = [fuzz.DRAW["id_attention"](seed) for seed in range(2000)]
    assert {c.layout for c in drawn} == {"tokens", "heads", "cut", "expanded"}
    assert any(c.batch == 0 for c in drawn) and any(c.lq == 0 for c in drawn)
    assert any(c.scale == 0 for c in drawn) and any(c.scale < 0 for c in drawn)


def test_the_command_says_how_many_and_fails_when_the_backend_runs_none(capsys):
    assert fuzz.main(["id_attention", "--backend", "cuda", "--seeds", "0:3"]) == 1
    assert "0 right, 3 refused, 0 wrong" in capsys.readouterr().out
