"""Converts dlib's face recognition ResNet to ONNX: ``python -m idcore.tools.dlib_to_onnx SRC.dat DST.onnx``.

Needs numpy and onnx, neither dlib nor torch. The graph takes ``input`` [N,3,S,S] float32, RGB 0..255, and
gives ``embedding`` [N,E] (E = 128; not unit-norm) and ``feat0``, ``feat1``, ... (the output of each stage).
Every affine layer is folded into the convolution before it. dlib's residual-down blocks average-pool the
shortcut and let the sum zero-pad whichever side has fewer channels, rows or columns (at the end of the axis);
the same is written here as Pad nodes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from idcore.errors import MissingDependencyError, WeightsError
from idcore.tools.dlib_dat import AffineLayer, ConvLayer, InputLayer, Layer, LinearLayer, read_layers

# dlib's input layer divides by 256 after taking the mean colour away.
INPUT_SCALE = 1.0 / 256.0
# Tensors below this many elements stay in float32 even with half-precision storage: they cost nothing.
_HALF_FROM = 1024


@dataclass(frozen=True)
class Conv:
    """A convolution with the affine layer folded in: weight [out,in,k,k], bias [out]."""

    weight: np.ndarray
    bias: np.ndarray
    stride: int
    padding: int


@dataclass(frozen=True)
class Block:
    """Two convolutions around a shortcut; ``first.stride`` 2 makes it a residual-down block."""

    first: Conv
    second: Conv


@dataclass
class Network:
    """What the .dat file says: mean colour, input size, stem, stages of residual blocks, last layer."""

    mean: tuple[float, float, float]
    size: int
    stem: Conv
    stages: list[list[Block]] = field(default_factory=list)
    head: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


def _fold(conv: Layer, affine: Layer, channels: int, where: str) -> Conv:
    if not isinstance(conv, ConvLayer) or not isinstance(affine, AffineLayer):
        raise WeightsError(
            f"{where}: wanted a convolution followed by an affine layer, got {type(conv).__name__} and "
            f"{type(affine).__name__}. Only dlib's face recognition network (with batch norms already turned "
            "into affine layers) can be converted."
        )
    rows, cols = conv.kernel
    if rows != cols or conv.stride[0] != conv.stride[1] or conv.padding[0] != conv.padding[1]:
        raise WeightsError(f"{where}: only square kernels, strides and paddings are supported, got {conv.kernel}.")
    weights = conv.filters * channels * rows * cols
    if conv.params.size != weights + conv.filters or affine.params.size != 2 * conv.filters:
        raise WeightsError(
            f"{where}: {conv.params.size} convolution and {affine.params.size} affine parameters, wanted "
            f"{weights + conv.filters} and {2 * conv.filters} ({channels} -> {conv.filters} channels)."
        )
    gain, offset = affine.params[: conv.filters], affine.params[conv.filters :]
    weight = conv.params[:weights].reshape(conv.filters, channels, rows, cols) * gain[:, None, None, None]
    bias = conv.params[weights:] * gain + offset
    return Conv(weight.astype(np.float32), bias.astype(np.float32), conv.stride[0], conv.padding[0])


def read_network(path: str | Path) -> Network:
    """The network of a .dat file; a stage ends where the next residual-down block begins."""
    layers = read_layers(path)
    if not isinstance(layers[0], InputLayer) or not isinstance(layers[-1], LinearLayer):
        raise WeightsError(f"{path}: wanted a sized RGB input first and a fully connected layer last.")
    body, head = layers[1:-1], layers[-1].weight
    if len(body) < 6 or len(body) % 4 != 2:
        raise WeightsError(f"{path}: {len(body)} layers between input and output; wanted a stem and whole blocks.")
    if layers[0].size[0] != layers[0].size[1]:
        raise WeightsError(f"{path}: wanted a square input, got {layers[0].size}.")
    stem = _fold(body[0], body[1], 3, "stem")
    network = Network(layers[0].mean, layers[0].size[0], stem, [], head)
    channels = stem.weight.shape[0]
    for at in range(2, len(body), 4):
        where = f"block {(at - 2) // 4}"
        first = _fold(body[at], body[at + 1], channels, where)
        second = _fold(body[at + 2], body[at + 3], first.weight.shape[0], where)
        if first.stride > 1 or not network.stages:
            network.stages.append([])
        network.stages[-1].append(Block(first, second))
        channels = second.weight.shape[0]
    if head.shape[0] != channels:
        raise WeightsError(f"{path}: the last layer takes {head.shape[0]} inputs but the body gives {channels}.")
    return network


class _Graph:
    """Collects nodes and initialisers while the network is walked."""

    def __init__(self, half: bool):
        try:
            import onnx
        except ImportError as error:
            raise MissingDependencyError(
                "The converter needs the package onnx, which is not installed: pip install 'idcore[dev]'."
            ) from error
        self.onnx, self.half = onnx, half
        self.nodes: list = []
        self.constants: list = []

    def constant(self, name: str, value: np.ndarray) -> str:
        value = np.ascontiguousarray(value)
        store = self.onnx.numpy_helper.from_array
        if self.half and value.dtype == np.float32 and value.size >= _HALF_FROM:
            self.constants.append(store(value.astype(np.float16), name))
            return self.node("Cast", [name], f"{name}.fp32", to=self.onnx.TensorProto.FLOAT)
        self.constants.append(store(value, name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv(self, x: str, conv: Conv, name: str) -> str:
        weight = self.constant(f"{name}.weight", conv.weight)
        bias = self.constant(f"{name}.bias", conv.bias)
        kernel = list(conv.weight.shape[2:])
        return self.node(
            "Conv", [x, weight, bias], f"{name}.out",
            kernel_shape=kernel, strides=[conv.stride] * 2, pads=[conv.padding] * 4,
        )  # fmt: skip

    def grow(self, x: str, name: str, channels: int, rows: int) -> str:
        """Zero-pads at the end of the channel, row and column axes; a no-op where nothing is wanted."""
        if not channels and not rows:
            return x
        pads = self.constant(f"{name}.pads", np.array([0, 0, 0, 0, 0, channels, rows, rows], np.int64))
        return self.node("Pad", [x, pads], f"{name}.grown")

    def block(self, x: str, block: Block, name: str, channels: int, size: int) -> tuple[str, int]:
        down = block.first.stride > 1
        width = block.second.weight.shape[0]
        main = self.node("Relu", [self.conv(x, block.first, f"{name}.conv1")], f"{name}.relu1")
        main = self.conv(main, block.second, f"{name}.conv2")
        kernel, stride, pad = block.first.weight.shape[2], block.first.stride, block.first.padding
        rows, skip, skip_rows = (size + 2 * pad - kernel) // stride + 1, x, size
        if down:
            skip = self.node("AveragePool", [x], f"{name}.pool", kernel_shape=[2, 2], strides=[2, 2])
            skip_rows = (size - 2) // 2 + 1
        out_rows, out_channels = max(rows, skip_rows), max(width, channels)
        main = self.grow(main, f"{name}.main", out_channels - width, out_rows - rows)
        skip = self.grow(skip, f"{name}.skip", out_channels - channels, out_rows - skip_rows)
        total = self.node("Add", [main, skip], f"{name}.sum")
        return self.node("Relu", [total], f"{name}.relu2"), out_rows


def build_model(network: Network, half: bool = True):
    """An ``onnx.ModelProto`` of the network; ``half`` stores (not computes) large weights in float16."""
    graph = _Graph(half)
    helper, float32 = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    mean = graph.constant("mean", np.array(network.mean, np.float32).reshape(1, 3, 1, 1))
    scale = graph.constant("scale", np.array(INPUT_SCALE, np.float32))
    x = graph.node("Mul", [graph.node("Sub", ["input", mean], "centred"), scale], "scaled")
    x = graph.node("Relu", [graph.conv(x, network.stem, "stem")], "stem.relu")
    x = graph.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2])
    kernel, stride, pad = network.stem.weight.shape[2], network.stem.stride, network.stem.padding
    size = ((network.size + 2 * pad - kernel) // stride + 1 - 3) // 2 + 1
    channels = network.stem.weight.shape[0]
    outputs = [helper.make_tensor_value_info("embedding", float32, ["N", network.head.shape[1]])]
    for index, stage in enumerate(network.stages):
        for number, block in enumerate(stage):
            x, size = graph.block(x, block, f"stage{index}.{number}", channels, size)
            channels = max(block.second.weight.shape[0], channels)
        if size < 1:
            raise WeightsError(f"Nothing is left of a {network.size} px input at stage {index}.")
        graph.node("Identity", [x], f"feat{index}")
        outputs.append(helper.make_tensor_value_info(f"feat{index}", float32, ["N", channels, size, size]))
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pooled")], "flat")
    graph.node("MatMul", [x, graph.constant("head.weight", network.head)], "embedding")
    inputs = [helper.make_tensor_value_info("input", float32, ["N", 3, network.size, network.size])]
    proto = helper.make_graph(graph.nodes, "dlib_face_recognition_resnet", inputs, outputs, graph.constants)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 13)], producer_name="idcore")
    model.ir_version = 8  # the oldest that opset 13 needs here, so that old runtimes load it
    graph.onnx.checker.check_model(model, full_check=True)
    return model


def convert(source: str | Path, target: str | Path, half: bool = True) -> Network:
    """Reads ``source`` (.dat), writes ``target`` (.onnx) and gives back what was read."""
    network = read_network(source)
    model = build_model(network, half)
    Path(target).write_bytes(model.SerializeToString(deterministic=True))
    return network


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m idcore.tools.dlib_to_onnx", description=__doc__)
    parser.add_argument("source", help="dlib network file (.dat)")
    parser.add_argument("target", help="ONNX file to write")
    parser.add_argument("--float32", action="store_true", help="store all weights in float32 (twice the size)")
    arguments = parser.parse_args(argv)
    network = convert(arguments.source, arguments.target, half=not arguments.float32)
    blocks = ", ".join(str(len(stage)) for stage in network.stages)
    print(f"{arguments.target}: input {network.size} px, blocks per stage {blocks}, {network.head.shape[1]} outputs")


if __name__ == "__main__":
    main()
