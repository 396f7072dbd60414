"""Two processes (gloo) against one: the same global batch, the same losses; checkpoints fit any number of processes."""

import json
import socket
from pathlib import Path

import kill_cases
import pytest
import torch
from loop_cases import Denoise, Rows, config, losses

from idcore.training import checkpoint
from idcore.training.loop import train

CHANGES = {"steps": 20, "accumulate": 2, "validate_every": 10, "save_every": 10}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(start, out, world=2, code=0, bases=(1.0, 1.0), resume=False, stop_in=None, **changes):
    """Train in several processes; all must end with `code`. Returns what each says of its end."""
    port, settings = free_port(), CHANGES | {"batch": 8 // world} | changes
    members = [
        start(kill_cases.member, r, world, port, str(out), settings, bases, resume, stop_in) for r in range(world)
    ]
    texts = []
    for rank, process in enumerate(members):
        process.join(150)
        if process.exitcode is None:
            [p.kill() for p in members]
        text = Path(f"{out}.{rank}.txt")
        texts.append(text.read_text() if text.exists() else "")
        assert process.exitcode == code, Path(f"{out}.{rank}.err").read_text() + texts[-1]
    return texts


def close(a, b, tolerance):
    a, b = losses(a), losses(b)
    assert a.keys() == b.keys() and len(a) == 20
    worst = max(abs(a[s]["loss"] - b[s]["loss"]) for s in a)
    assert worst < tolerance, worst
    assert all(abs(a[s]["grad_norm"] - b[s]["grad_norm"]) < 1e-4 * max(1, a[s]["grad_norm"]) for s in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(Denoise(), Rows(), config(**CHANGES, batch=8), out)
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(start, alone, tmp_path, parallel):
    out = tmp_path / "run"
    together(start, out, parallel=parallel)
    close(alone, out, 1e-5)
    one, two = (checkpoint.newest(p / "checkpoints") for p in (alone, out))
    for name in ("module", "average", "optimiser"):
        a, b = one.tensors(name), two.tensors(name)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a), name
    weights = sum(p.numel() for p in Denoise().module.parameters())
    held = two.state["task_state"]["held"]  # by process 0, between two steps
    assert held < 0.6 * weights if parallel == "fsdp" else held == weights
    both = [json.loads(Path(f"{out}.{r}.json").read_text()) for r in (0, 1)]
    assert both[0] == both[1] and both[0].keys() == Denoise().module.state_dict().keys()
    facts = json.loads((out / "model" / "facts.json").read_text())
    assert facts["processes"] == 2 and facts["samples"] == 20 * 16
    measures = [(p / "measures.jsonl").read_text().splitlines() for p in (alone, out)]
    pairs = [[json.loads(line)["measures"]["weight"] for line in lines] for lines in measures]
    assert len(pairs[1]) == 3 and pairs[0] == pytest.approx(pairs[1], rel=1e-4)


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(start, alone, tmp_path):
    out = tmp_path / "run"
    together(start, out, parallel="fsdp", stop_at=6)
    train(Denoise(3), Rows(), config(**CHANGES, batch=8, stop_at=13), out, resume=True)
    together(start, out, parallel="ddp", resume=True)
    close(alone, out, 1e-5)


def test_each_process_may_have_a_base_of_its_own(start, tmp_path):
    """Process 0 and process 1 each with a frozen model of their own: the loss is the mean over both halves."""
    found = {}
    for name, bases in (("both", (1.0, 1.0)), ("first", (1.0, 0.0)), ("second", (0.0, 1.0))):
        together(start, tmp_path / name, steps=2, bases=bases)
        found[name] = losses(tmp_path / name)[1]["loss"]
    assert found["first"] + found["second"] == pytest.approx(found["both"], rel=1e-6)
    assert found["first"] > 0 and found["second"] > 0


def test_what_one_process_meets_ends_all_of_them(start, tmp_path):
    texts = together(start, tmp_path / "nan", code=1, bases=(1.0, float("nan")))
    for text in texts:
        assert "training stopped at step 0: the loss is nan (noise nan, size nan) on samples row" in text
    for text in together(start, tmp_path / "run", code=143, stop_in=1):
        assert "stopped by SIGTERM after step 4 of 20" in text
    together(start, tmp_path / "run", resume=True)
    assert len(losses(tmp_path / "run")) == 20
