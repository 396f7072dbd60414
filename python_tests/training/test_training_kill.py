"""Trainings that are killed, stopped by signals or meet a full or read-only disk; what comes after is exact."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import kill_cases
import pytest
from loop_cases import losses

from idcore.training import checkpoint

MOMENTS = int(os.environ.get("IDCORE_KILLS", 20))  # half of them during saves; nightly: 50


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(kill_cases.run, str(out))
    process.join(60)
    assert process.exitcode == 0
    return out


def go_on(start, out, whole):
    """Resume after a kill; everything is as if there had been none."""
    stood = checkpoint.folders(out / "checkpoints")
    found = checkpoint.newest(out / "checkpoints")
    assert not stood or found is not None
    process = start(kill_cases.run, str(out))
    process.join(60)
    assert process.exitcode == 0, Path(f"{out}.err").read_text()
    assert losses(out) == losses(whole)
    assert (out / "measures.jsonl").read_text() == (whole / "measures.jsonl").read_text()
    last = checkpoint.newest(out / "checkpoints")
    for name in ("module", "average", "optimiser", "random"):
        file = f"checkpoints/{last.folder.name}/{name}.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes(), name
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{kill_cases.STEPS:08d}"]
    return found


def killed(start, out, draw):
    """Kill a run somewhere between its first checkpoint and its last steps; whether it was still running."""
    process = start(kill_cases.run, str(out), 0, 0.002)
    lines, records = draw.randrange(kill_cases.STEPS - 3), out / "losses.jsonl"
    while process.is_alive() and not checkpoint.folders(out / "checkpoints"):
        time.sleep(0.002)
    while process.is_alive() and records.read_bytes().count(b"\n") < lines:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))  # as long as a save takes here
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_at_random_moments(start, whole, tmp_path):
    draw, steps, moments = random.Random(7), set(), 0
    for i in range(3 * MOMENTS):  # a run may be over before the signal comes
        out = tmp_path / str(i)
        if killed(start, out, draw):
            steps.add(go_on(start, out, whole).step)
            moments += 1
        if moments == MOMENTS // 2:
            break
        shutil.rmtree(out)
    assert moments == MOMENTS // 2 and len(steps) > 1


def test_killed_during_saves(start, whole, tmp_path):
    draw, count = random.Random(8), int((whole / "operations").read_text())
    for die_at in draw.sample(range(1, count + 1), MOMENTS - MOMENTS // 2):
        out = tmp_path / str(die_at)
        process = start(kill_cases.run, str(out), die_at)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        go_on(start, out, whole)
        shutil.rmtree(out)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(start, whole, tmp_path, number, code):
    process = start(kill_cases.signalled, str(tmp_path / "run"), number, 6)
    process.join(60)
    assert process.exitcode == code
    text = (tmp_path / "run.txt").read_text()
    assert f"TrainingStopped: stopped by {number.name} after step 7 of 20; saved in " in text and "--resume" in text
    assert go_on(start, tmp_path / "run", whole).step == 7


def test_a_second_interrupt_stops_at_once_and_harms_nothing(start, whole, tmp_path):
    process = start(kill_cases.signalled, str(tmp_path / "run"), signal.SIGINT, 6, 2)
    process.join(60)
    assert process.exitcode == 1 and (tmp_path / "run.txt").read_text() == "KeyboardInterrupt: "
    assert go_on(start, tmp_path / "run", whole).step == 4


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_that_cannot_be_written(start, whole, tmp_path):
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o711)
    (tmp_path / "new").mkdir(0o755)
    shutil.copytree(whole, tmp_path / "old")
    for name in ("new", "old"):
        process = start(kill_cases.as_nobody, str(tmp_path / name), name == "old")
        process.join(60)
        assert process.exitcode == 1
        text = (tmp_path / f"{name}.txt").read_text()
        assert text.startswith(
            f"IdcoreError: cannot write into {tmp_path / name}: Permission denied; make it writable, or"
        )
    assert checkpoint.newest(tmp_path / "old" / "checkpoints").step == kill_cases.STEPS
