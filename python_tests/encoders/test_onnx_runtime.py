"""Sessions: the provider is what it says, nothing falls back in silence, files are checked."""

import importlib.metadata
import json
import sys
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest

from idcore.encoders import onnx_runtime
from idcore.encoders.onnx_runtime import CPU, CUDA, OnnxModel, asset, check_file, installed_runtimes, runtime_problems
from idcore.errors import InputError, MissingDependencyError, NoBackendError, WeightsError


class FakeRuntime:
    """An onnxruntime that offers some providers and really starts only some of them."""

    def __init__(self, offered, working):
        self.offered, self.working, self.options = offered, working, None

    def get_available_providers(self):
        return self.offered

    def SessionOptions(self):  # noqa: N802
        self.options = SimpleNamespace(entries={})
        self.options.add_session_config_entry = self.options.entries.__setitem__
        return self.options

    def InferenceSession(self, path, options, providers):  # noqa: N802
        active = [name for name in providers if name in self.working] or [CPU]
        item = SimpleNamespace(name="x", shape=[1, 3, 8, 8])
        return SimpleNamespace(get_providers=lambda: active, get_inputs=lambda: [item], get_outputs=lambda: [item])


@pytest.fixture
def fake(monkeypatch):
    def make(offered, working, driver=True):
        runtime = FakeRuntime(offered, working)
        monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: runtime)
        monkeypatch.setattr(onnx_runtime, "has_nvidia_driver", lambda: driver)
        return runtime

    return make


MODEL = onnx_runtime.ASSETS / "pnet.onnx"


def test_real_session_names_its_provider():
    model = OnnxModel(MODEL, "cpu", threads=1)
    assert model.provider == CPU and model.reason == "asked for"
    assert model.inputs == ["input_1"] and len(model.outputs) == 2
    offsets, faceness = model.run({"input_1": np.zeros((1, 12, 12, 3), np.float32)})
    assert offsets.shape == (1, 1, 1, 4) and faceness.sum() == pytest.approx(1, abs=1e-5)


def test_auto_says_what_it_took(fake):
    fake([CUDA, CPU], [CUDA, CPU])
    assert OnnxModel(MODEL).provider == CUDA
    fake([CUDA, CPU], [CPU])
    model = OnnxModel(MODEL)
    assert model.provider == CPU and "CUDA did not start" in model.reason and "cuDNN" in model.reason
    fake([CUDA, CPU], [CUDA, CPU], driver=False)
    model = OnnxModel(MODEL)
    assert model.provider == CPU and "no NVIDIA driver" in model.reason
    fake([CPU], [CPU])
    model = OnnxModel(MODEL)
    assert model.provider == CPU and "no CUDA in it" in model.reason


def test_cuda_that_is_asked_for_is_there_or_refused(fake):
    fake([CUDA, CPU], [CUDA, CPU])
    assert OnnxModel(MODEL, "cuda").provider == CUDA
    fake([CPU], [CPU])
    with pytest.raises(
        NoBackendError, match=r"CUDAExecutionProvider was asked for but this onnxruntime has only CPU.*idcore\[gpu\]"
    ):
        OnnxModel(MODEL, "cuda")
    fake([CUDA, CPU], [CPU], driver=False)
    with pytest.raises(NoBackendError, match=r"no NVIDIA driver on this machine. Use providers='cpu'"):
        OnnxModel(MODEL, "cuda")
    # The runtime lists CUDA, starts without it and only writes a line into its log.
    fake([CUDA, CPU], [CPU])
    with pytest.raises(NoBackendError, match=r"pnet.onnx would run on CPUExecutionProvider.*CUDA 13, cuDNN 9"):
        OnnxModel(MODEL, [CUDA, CPU])


def test_session_options(fake):
    runtime = fake([CPU], [CPU])
    OnnxModel(MODEL, "cpu", threads=3)
    assert runtime.options.intra_op_num_threads == 3 and runtime.options.inter_op_num_threads == 1
    assert runtime.options.entries["session.intra_op.allow_spinning"] == "0"
    OnnxModel(MODEL, "cpu")
    assert 1 <= runtime.options.intra_op_num_threads <= 4


@pytest.mark.parametrize("providers", ["GPU!", "", [], ["cpu", 3]], ids=["name", "none", "list", "number"])
def test_unknown_providers(providers):
    with pytest.raises(InputError, match="Unknown ONNX Runtime providers.*wanted 'auto', one of cpu, cuda"):
        OnnxModel(MODEL, providers)


def test_bad_threads_and_files(tmp_path):
    with pytest.raises(InputError, match="threads must be at least 1.*got 0"):
        OnnxModel(MODEL, threads=0)
    with pytest.raises(WeightsError, match="No model file at .*none.onnx"):
        OnnxModel(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="broken.onnx cannot be loaded as an ONNX model"):
        OnnxModel(broken, "cpu")


def test_missing_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'idcore\[cpu\]'.*'idcore\[gpu\]'.*Not both"):
        OnnxModel(MODEL)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    with pytest.raises(MissingDependencyError, match="empty folder.*force-reinstall"):
        OnnxModel(MODEL)


def test_two_runtimes_are_noticed(monkeypatch):
    files = {"onnxruntime": "onnxruntime/__init__.py", "onnxruntime-gpu": "onnxruntime/__init__.py"}

    def distribution(name):
        if name not in files:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version="1.31.1", files=[PurePosixPath(files[name])])

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert installed_runtimes() == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    (problem,) = runtime_problems()
    assert "side by side" in problem and "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    assert problem.endswith("onnxruntime-gpu==1.31.1.")
    # An empty stand-in that only satisfies a requirement does no harm.
    files["onnxruntime"] = "onnxruntime-1.31.1.dist-info/METADATA"
    assert list(installed_runtimes()) == ["onnxruntime-gpu"] and runtime_problems() == []


def test_shipped_files_are_the_ones_that_were_meant():
    entries = json.loads((onnx_runtime.ASSETS / "SHA256SUMS.json").read_text())
    assert set(entries) == {"pnet.onnx", "rnet.onnx", "onet.onnx", "dlib_resnet.onnx"}
    for name, entry in entries.items():
        path = asset(name)
        assert path.stat().st_size == entry["bytes"]
        assert (path.parent / entry["license_file"]).is_file()
    with pytest.raises(InputError, match="No shipped face model is called 'retina.onnx'"):
        asset("retina.onnx")


def test_changed_files_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"one")
    digest = onnx_runtime.sha256_of(path)
    assert check_file(path, digest) == path
    path.write_bytes(b"another")
    with pytest.raises(WeightsError, match=rf"SHA-256 .*, wanted {digest}.*reinstall idcore"):
        check_file(path, digest)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="Git LFS pointer.*git lfs pull"):
        check_file(path, digest)
    with pytest.raises(WeightsError, match="No model file at"):
        check_file(tmp_path / "gone.onnx", digest)
