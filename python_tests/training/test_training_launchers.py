"""`idcore train pulid` by several processes: as by one, under torchrun, through signals, kills and errors of one."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch_cases
import pytest
from launch_cases import arguments
from safetensors.torch import load_file, save_file

from idcore.errors import InputError
from idcore.files import file_hash
from idcore.sampling.tiny_pipeline import PACKAGE_FOLDER
from idcore.training import checkpoint, launching
from idcore.training.config import LoopConfig
from idcore.training.data.faces import Faces
from idcore.training.data.options import PrepareConfig
from idcore.training.data.prepare import prepare
from idcore.training.data.procedural import procedural_folder
from idcore.training.processes import StopSignals, free_port, rank_and_world
from idcore.training.pulid.config import load_config
from idcore.training.pulid.run import check_bases


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight drawn people, prepared."""
    folder = tmp_path_factory.mktemp("people")
    procedural_folder(folder / "drawn", 8, zoom=0)
    config = PrepareConfig(resolution=64, min_face=32)
    prepare(folder / "drawn", folder / "data", config, Faces("tiny-pulid"), progress=False)
    return folder / "data"


@pytest.fixture
def launch(start, data):
    """launch(out, world, happens=(rank, what, step), **settings): exit codes and texts of all processes."""

    def run(out, world=2, happens=None, data=data, **changes):
        line, port = arguments(data, out, **changes), free_port()
        mine = [happens[1:] if happens and happens[0] == r else () for r in range(world)]
        members = [start(launch_cases.member, r, world, port, str(out), line, mine[r]) for r in range(world)]
        for process in members:
            process.join(600)
            if process.exitcode is None:
                [p.kill() for p in members]
        return [p.exitcode for p in members], launch_cases.said(out, world)

    return run


def lines(out, stage):
    """losses.jsonl of a stage, without the clock."""
    text = (Path(out) / f"stage{stage}" / "losses.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def equal(a, b, stages=(1, 2, 3), tolerance=1e-5):
    """Same global batches, same losses, in every step of every stage. Two micro batches of one process are the same
    computation as one of each of two; to one batch of twice the size only rounding and Adam's first steps differ."""
    for stage in stages:
        one, two = lines(a, stage), lines(b, stage)
        assert [x["step"] for x in one] == [x["step"] for x in two] != []
        for x, y in zip(one, two):
            assert x["terms"].keys() == y["terms"].keys()
            assert max(abs(x["terms"][k] - y["terms"][k]) for k in x["terms"]) < tolerance, (stage, x, y)
            assert abs(x["grad_norm"] - y["grad_norm"]) < tolerance * max(1, x["grad_norm"])


@pytest.fixture(scope="module")
def alone(start, data, tmp_path_factory):
    """One process with two micro batches, where others have two processes."""
    out = tmp_path_factory.mktemp("alone") / "run"
    process = start(launch_cases.member, 0, 1, 0, str(out), arguments(data, out, loop__accumulate=2))
    process.join(600)
    assert process.exitcode == 0, launch_cases.said(out, 1)
    return out


def torchrun(*options):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        *options,
    ]


def test_all_stages_under_torchrun(data, alone, tmp_path):
    """The second stage begins with the first one's result, which process 0 writes and both read."""
    out = tmp_path / "run"
    line = [*torchrun("-m", "idcore.cli"), *arguments(data, out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'model'}\n"
    assert "Warning" not in done.stderr and done.stderr.count("stage 2: 1 steps") == 1
    equal(alone, out)
    assert json.loads((out / "model" / "result.json").read_text())["stage"] == 3


def test_shards_train_as_one(launch, data, alone, tmp_path):
    """From pictures that one of the processes prepares first."""
    codes, texts = launch(tmp_path / "run", data=data.parent / "drawn", loop__parallel="fsdp")
    assert codes == [0, 0], texts
    assert texts[0].count("kept ") == 1 and "kept " not in texts[1]
    equal(alone, tmp_path / "run")


def test_what_happens_to_one_happens_to_all(launch, alone, tmp_path):
    """A signal, a loss that is not finite, and a kill, of process 1 alone; resumed, it is as if there had been none."""
    out, how = tmp_path / "run", {"stage": "1", "loop__save_every": 1}
    codes, texts = launch(out, happens=(1, "term", 0), **how)
    assert codes == [143, 143]
    assert "stopped by SIGTERM after step 1 of 3; saved in " in texts[0] and "stopped" not in texts[1]
    codes, texts = launch(out, happens=(1, "nan", 1), resume=True, **how)
    assert codes == [1, 1] and "Traceback" not in "".join(texts)
    assert "error: training stopped at step 1: the loss is nan (diffusion nan) on samples " in texts[0]
    assert "error" not in texts[1] and checkpoint.newest(out / "stage1" / "checkpoints").step == 1
    codes, texts = launch(out, happens=(1, "kill", 2), resume=True, **how)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), texts
    codes, texts = launch(out, resume=True, **how)
    assert codes == [0, 0] and "going on from step 2" in texts[0], texts
    equal(alone, out, stages=(1,))


@pytest.mark.nightly
def test_twenty_steps_of_every_stage(launch, tmp_path):
    steps = {f"stage{n}__steps": 20 for n in (1, 2, 3)}
    codes, texts = launch(tmp_path / "one", world=1, loop__accumulate=2, **steps)
    assert codes == [0], texts
    codes, texts = launch(tmp_path / "ddp", **steps)
    assert codes == [0, 0], texts
    equal(tmp_path / "one", tmp_path / "ddp", tolerance=1e-9)
    for stage in (1, 2, 3):  # shards round otherwise: each stage from the same weights
        start = {} if stage == 1 else {"init": tmp_path / "one" / f"stage{stage - 1}" / "model" / "pulid.safetensors"}
        out = tmp_path / f"fsdp{stage}"
        codes, texts = launch(out, stage=str(stage), loop__parallel="fsdp", **start, **steps)
        assert codes == [0, 0], texts
        one, two = lines(tmp_path / "one", stage), lines(out, stage)
        apart = [max(abs(x["terms"][k] - y["terms"][k]) for k in x["terms"]) for x, y in zip(one, two)]
        assert len(apart) == 20 and max(apart) < 1e-5, (stage, apart)


@pytest.mark.nightly
def test_each_process_trains_on_its_own_base(launch, tmp_path):
    """Losses of the bases A, B in both orders add up to those of A alone and B alone."""
    other = tmp_path / "B"
    shutil.copytree(PACKAGE_FOLDER, other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: 1.01 * v if v.is_floating_point() else v for k, v in tensors.items()}, other / "model.safetensors")
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"sha256": file_hash(other / "model.safetensors")[7:]}))
    tiny = {"model__dtype": "float32", "model__resolution": 64, "face__features": "tiny-pulid", "encoder__init": "zero"}
    models, found = {"A": "tiny", "B": str(other)}, {}
    for name in ("AA", "BB", "AB", "BA"):
        how = {"base": models[name[0]], "stage": "1", "stage1__steps": 1, "model__others": models[name[1]]}
        codes, texts = launch(tmp_path / name, **how, **tiny)
        assert codes == [0, 0], texts
        found[name] = lines(tmp_path / name, 1)[0]["loss"]
    assert found["AB"] + found["BA"] == pytest.approx(found["AA"] + found["BB"], rel=1e-6)
    assert len({round(v, 7) for v in found.values()}) == 4


def test_options_together_and_a_kill(launch, alone, tmp_path):
    """Min-SNR, bfloat16, accumulation, recomputed activations, an average: used at once, and resumed exactly."""
    how = {
        "world": 1, "stage": "1,2", "stage1__steps": 2, "loop__save_every": 1, "loop__accumulate": 2,
        "loop__precision": "bf16", "loop__gradient_checkpointing": "true", "loss__min_snr": 5.0, "loop__ema": 0.9,
    }  # fmt: skip
    codes, texts = launch(tmp_path / "whole", **how)
    assert codes == [0], texts
    assert launch(tmp_path / "parts", happens=(0, "kill", 1), **how)[0] == [-signal.SIGKILL]
    codes, texts = launch(tmp_path / "parts", resume=True, **how)
    assert codes == [0] and "going on from step 1" in texts[0], texts
    equal(tmp_path / "whole", tmp_path / "parts", stages=(1, 2), tolerance=1e-12)
    found, plain = ([x["terms"]["diffusion"] for x in lines(out, 1)] for out in (tmp_path / "whole", alone))
    assert all(map(math.isfinite, found)) and found[0] != pytest.approx(plain[0], rel=1e-3)
    files = [p / "stage2" / "checkpoints" / "step-00000001" for p in (tmp_path / "whole", tmp_path / "parts")]
    for name in ("module", "average", "optimiser"):
        assert (files[0] / f"{name}.safetensors").read_bytes() == (files[1] / f"{name}.safetensors").read_bytes()


def test_bases_that_do_not_go_together(launch, tmp_path):
    out, how = tmp_path / "run", {"stage": "1", "base": "tiny-sd", "model__others": "tiny"}
    codes, texts = launch(out, encoder__output_dim=128, **how)
    assert codes == [1, 1] and "Traceback" not in "".join(texts)
    assert "error: process 1 would train another module than process 0: id_adapter_attn_layers." in texts[0]
    assert "bases of different processes must have the same attention layers" in texts[0] and "error" not in texts[1]
    with pytest.raises(InputError, match="are 2 models, one for each process, and one process runs: start at least 2"):
        check_bases(load_config(None, ["model.others=tiny-sd"], "tiny-sd"))


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for fsdp .* set loop.parallel=fsdp and launch with --multi_gpu alone"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for deepspeed .* launch with --multi_gpu alone, or"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision bf16, the settings for no: set loop.precision, or"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for torch.compile: launch with --dynamo_backend no"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "told of several processes and started one"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "the environment speaks of 3 processes, yet 1 came together"),
    ],
)  # fmt: skip
def test_what_a_launcher_asks_for_is_not_passed_over(asked, says, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "device_of", lambda c: type("Cuda", (), {"type": "cuda"}))
    with pytest.raises(InputError, match=says):
        launching.join(LoopConfig())


def test_who_this_process_is(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert rank_and_world() == (2, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_world() == (1, 2)


def test_a_launcher_echoes_an_interrupt(monkeypatch):
    """torchrun hands the terminal's Ctrl-C on to processes that have it already; the user's second one counts."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    signals = StopSignals()
    signals._ask(signal.SIGINT, None)
    signals._ask(signal.SIGINT, None)
    assert signals.asked == signal.SIGINT
    now[0] += 3
    with pytest.raises(KeyboardInterrupt):
        signals._ask(signal.SIGINT, None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    alone = StopSignals()
    alone._ask(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        alone._ask(signal.SIGINT, None)
