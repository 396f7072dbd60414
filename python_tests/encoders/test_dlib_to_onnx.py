"""The converter: a small .dat written here in dlib's form, and the converted network against a naive one."""

import struct
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from idcore.encoders.dlib_torch import DlibRecogniser
from idcore.errors import WeightsError
from idcore.tools import dlib_to_onnx
from idcore.tools.dlib_dat import read_layers

SIZE, EMBEDDING = 31, 5
# Channels, and whether a block halves the picture; 31 -> conv 13 -> pool 6 -> 6 -> down 3 (the main path has 2).
STEM, BLOCKS = 4, ((4, False), (6, True), (6, False))


def integer(value):
    size = max(1, (abs(value).bit_length() + 7) // 8)
    return bytes([size | (0x80 if value < 0 else 0)]) + abs(value).to_bytes(size, "little")


def real(value):
    mantissa, exponent = np.frexp(value)
    return integer(int(mantissa * 2**24)) + integer(int(exponent) - 24)


def string(text):
    return integer(len(text)) + text.encode()


def tensor(values, shape):
    assert np.size(values) == np.prod(shape)
    head = integer(2) + b"".join(integer(n) for n in shape)
    return head + np.asarray(values, "<f4").tobytes()


def conv_bytes(weight, bias, stride, padding):
    params = np.concatenate([weight.ravel(), bias])
    numbers = (len(weight), *weight.shape[2:], stride, stride, padding, padding)
    alias = integer(1) + b"".join(integer(n) for n in weight.shape)
    return (
        string("con_4") + tensor(params, (params.size, 1, 1, 1)) + b"".join(map(integer, numbers)) + alias + real(1.0)
    )


def affine_bytes(gain, offset):
    return string("affine_") + tensor(np.concatenate([gain, offset]), (2 * len(gain), 1, 1, 1)) + integer(0)


class Network:
    """Random weights, the .dat bytes, and a forward pass in plain float64 numpy."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.mean = (122.782, 117.001, 104.298)
        self.stem = self.unit(3, STEM, 7)
        self.blocks, channels = [], STEM
        for width, down in BLOCKS:
            self.blocks.append((self.unit(channels, width, 3), self.unit(width, width, 3), down))
            channels = width
        self.head = self.rng.normal(size=(channels, EMBEDDING)).astype(np.float32)

    def unit(self, inputs, outputs, kernel):
        draw = self.rng.normal
        weight = draw(size=(outputs, inputs, kernel, kernel)) * (inputs * kernel * kernel) ** -0.5
        return [
            v.astype(np.float32) for v in (weight, draw(size=outputs), 1 + 0.3 * draw(size=outputs), draw(size=outputs))
        ]

    def dat(self):
        parts = [integer(1), string("loss_metric_2"), real(0.04), struct.pack("<5B", 1, 2, 1, 2, 0)]
        parts += [integer(3), string("input_rgb_image_sized"), *map(real, self.mean), integer(SIZE), integer(SIZE)]
        units = [(self.stem, 2, 0)]
        for first, second, down in self.blocks:
            units += [(first, 2 if down else 1, 0 if down else 1), (second, 1, 1)]
        for (weight, bias, gain, offset), stride, padding in units:
            # Training leftovers stand between the layers.
            parts += [
                conv_bytes(weight, bias, stride, padding),
                b"\x01\x00" * 4,
                affine_bytes(gain, offset),
                b"\x01\x02",
            ]
        parts += [
            string("fc_2"),
            integer(EMBEDDING),
            integer(len(self.head)),
            tensor(self.head, (*self.head.shape, 1, 1)),
        ]
        return b"".join(parts) + b"\x01\x00" * 6

    @staticmethod
    def conv(x, unit, stride, padding):
        weight, bias, gain, offset = (v.astype(np.float64) for v in unit)
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = sliding_window_view(x, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
        y = np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]
        return y * gain[:, None, None] + offset[:, None, None]

    def forward(self, chip):
        x = (chip.astype(np.float64) - np.array(self.mean)[:, None, None]) / 256
        x = np.maximum(self.conv(x, self.stem, 2, 0), 0)
        x = sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
        stages = []
        for index, (first, second, down) in enumerate(self.blocks):
            y = self.conv(np.maximum(self.conv(x, first, 2 if down else 1, 0 if down else 1), 0), second, 1, 1)
            skip = sliding_window_view(x, (2, 2), (1, 2))[:, ::2, ::2].mean((3, 4)) if down else x
            total = np.zeros([max(a, b) for a, b in zip(y.shape, skip.shape, strict=True)])
            total[: y.shape[0], : y.shape[1], : y.shape[2]] += y
            total[: skip.shape[0], : skip.shape[1], : skip.shape[2]] += skip
            x = np.maximum(total, 0)
            if down and index:
                stages.append(None)
            stages = [*stages[:-1], x] if stages else [x]
        return x.mean((1, 2)) @ self.head, stages


@pytest.fixture(scope="module")
def network():
    return Network()


@pytest.fixture(scope="module")
def dat(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("dat") / "small.dat"
    path.write_bytes(network.dat())
    return path


def test_layers_come_back(network, dat):
    layers = read_layers(dat)
    assert len(layers) == 1 + 2 * (1 + 2 * len(BLOCKS)) + 1
    assert layers[0].size == (SIZE, SIZE)
    np.testing.assert_allclose(layers[0].mean, network.mean, rtol=1e-6)
    np.testing.assert_array_equal(layers[1].params[: network.stem[0].size], network.stem[0].ravel())
    assert (layers[1].filters, layers[1].kernel, layers[1].stride) == (STEM, (7, 7), (2, 2))
    np.testing.assert_array_equal(layers[-1].weight, network.head)


@pytest.mark.parametrize("half, tolerance", [(False, 1e-5), (True, 1e-2)])
def test_converted_network_computes_the_same(network, dat, tmp_path, half, tolerance):
    target = tmp_path / "small.onnx"
    dlib_to_onnx.convert(dat, target, half=half)
    session = onnxruntime.InferenceSession(str(target))
    chips = np.random.default_rng(1).uniform(0, 255, (2, 3, SIZE, SIZE)).astype(np.float32)
    embedding, *feats = session.run(None, {"input": chips})
    module = DlibRecogniser(target)
    ours = module(torch.from_numpy(chips) / 255)
    assert len(feats) == 2 and module.size == SIZE
    for index, chip in enumerate(chips):
        wanted, stages = network.forward(chip)
        np.testing.assert_allclose(embedding[index], wanted, atol=tolerance)
        np.testing.assert_allclose(ours.embedding[index].numpy(), wanted, atol=tolerance)
        for got, also, stage in zip(feats, ours.feats, stages, strict=True):
            assert got[index].shape == stage.shape
            np.testing.assert_allclose(got[index], stage, atol=tolerance)
            np.testing.assert_allclose(also[index].numpy(), stage, atol=tolerance)


def test_command_line(dat, tmp_path):
    target = tmp_path / "out.onnx"
    command = [sys.executable, "-m", "idcore.tools.dlib_to_onnx", str(dat), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"input {SIZE} px, blocks per stage 1, 2, {EMBEDDING} outputs" in done.stdout and target.is_file()


def test_conversion_is_reproducible(dat, tmp_path):
    for name in ("a", "b"):
        dlib_to_onnx.convert(dat, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bad_files(network, dat, tmp_path):
    data = dat.read_bytes()

    def convert(content):
        path = tmp_path / "bad.dat"
        path.write_bytes(content)
        dlib_to_onnx.convert(path, tmp_path / "bad.onnx")

    with pytest.raises(WeightsError, match="No file at .*nothing.dat"):
        dlib_to_onnx.convert(tmp_path / "nothing.dat", tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match="none of the layer types.*unpack it if it ends in .bz2"):
        convert(b"BZh9" + bytes(100))
    with pytest.raises(WeightsError, match="more bytes were wanted but the file ends"):
        convert(data[: len(data) - 60])
    end = data.rindex(b"fc_2") - 2
    with pytest.raises(WeightsError, match="wanted a sized RGB input first and a fully connected layer last"):
        convert(data[:end])
    cut = data.index(affine_bytes(*network.stem[2:])[:20])
    with pytest.raises(WeightsError, match="wanted a stem and whole blocks"):
        convert(data[:cut] + data[data.index(b"con_4", cut) - 2 :])
    wide = conv_bytes(np.zeros((STEM, 2, 7, 7), np.float32), np.zeros(STEM, np.float32), 2, 0)
    with pytest.raises(WeightsError, match=r"stem: 396 convolution and 8 affine parameters, wanted 592 and 8"):
        convert(data.replace(conv_bytes(*network.stem[:2], 2, 0), wide))
