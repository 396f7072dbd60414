"""The torch recogniser against the ONNX session, and its gradients against finite differences."""

import numpy as np
import onnxruntime
import pytest
import torch

from idcore.encoders.dlib_torch import DEFAULT_WEIGHTS, DlibRecogniser
from idcore.encoders.onnx_file import read_onnx
from idcore.errors import InputError, WeightsError


@pytest.fixture(scope="module")
def network():
    return DlibRecogniser()


def test_matches_the_onnx_session(network):
    chips = np.random.default_rng(0).uniform(0, 255, (3, 3, 150, 150)).astype(np.float32)
    names = ["embedding"] + [f"feat{i}" for i in range(5)]
    truth = onnxruntime.InferenceSession(str(DEFAULT_WEIGHTS)).run(names, {"input": chips})
    got = network(torch.from_numpy(chips) / 255)
    shapes = [(3, 32, 35, 35), (3, 64, 17, 17), (3, 128, 8, 8), (3, 256, 4, 4), (3, 256, 2, 2)]
    assert [tuple(f.shape) for f in got.feats] == shapes
    for ours, theirs in zip((got.embedding, *got.feats), truth, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4, rtol=0)


def test_gradient_agrees_with_finite_differences():
    network = DlibRecogniser().double()
    torch.manual_seed(0)
    chips = torch.rand(1, 3, 150, 150, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(128, dtype=torch.float64)

    def value(x):
        return (network(x).embedding @ weights).sum()

    (gradient,) = torch.autograd.grad(value(chips), chips)
    # Random directions, so that every pixel has its part; small steps, as the ReLUs make it piecewise smooth.
    for seed in range(3):
        direction = torch.randn(chips.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-8
        with torch.no_grad():
            numeric = (value(chips + step * direction) - value(chips - step * direction)) / (2 * step)
        assert float(numeric) == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-5)


def test_weights_are_frozen_and_inputs_get_gradients(network):
    assert not any(p.requires_grad for p in network.parameters())
    chips = torch.rand(1, 3, 150, 150, requires_grad=True)
    network(chips).embedding.sum().backward()
    assert chips.grad.abs().sum() > 0


@pytest.mark.parametrize("chips", [torch.zeros(1, 3, 112, 112), torch.zeros(1, 3, 150, 150, dtype=torch.uint8)])
def test_wrong_chips_are_named(network, chips):
    with pytest.raises(InputError, match=r"float RGB chips \[N,3,150,150\].*got .*Align"):
        network(chips)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(WeightsError, match="No model file at .*nothing.onnx"):
        read_onnx(tmp_path / "nothing.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(DEFAULT_WEIGHTS.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not an ONNX file that can be read"):
        read_onnx(broken)
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    with pytest.raises(WeightsError, match="holds no weights"):
        DlibRecogniser(empty)
    other = DEFAULT_WEIGHTS.with_name("rnet.onnx")
    with pytest.raises(WeightsError, match="lacks 'stem.weight'.*dlib_to_onnx"):
        DlibRecogniser(other)
