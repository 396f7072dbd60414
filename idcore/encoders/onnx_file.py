"""Reads weights and signatures out of ``.onnx`` files with numpy alone.

An ONNX file is a protocol-buffer message. The few fields that matter are read here, so that torch modules can
take their weights from the shipped files without the onnx package, and so that a model's kind can be told from
the shapes of its inputs and outputs without loading hundreds of megabytes into a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from idcore.errors import WeightsError

Shape = tuple[int | None, ...]

# TensorProto.DataType -> numpy; the types that weights are stored in.
_DTYPES = {
    1: np.dtype("<f4"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
}


@dataclass
class OnnxNode:
    """One node: its name, operator and those attributes that are integers or lists of them."""

    name: str = ""
    operator: str = ""
    integers: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class OnnxWeights:
    """The initialisers (name -> array) and nodes (name -> node) of one file."""

    tensors: dict[str, np.ndarray]
    nodes: dict[str, OnnxNode]


@dataclass
class OnnxSignature:
    """Inputs and outputs (name -> shape; None where a size is free) and the first eight nodes' operators."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: list[str]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (number, value) pairs of a message: integers for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field type {kind} is unknown")
        if at + size > len(data):
            raise ValueError("the file ends too early")
        yield number, data[at : at + size]
        at += size


def _text(value: int | memoryview) -> str:
    return bytes(value).decode("utf-8")  # type: ignore[arg-type]


def _numbers(value: int | memoryview) -> list[int]:
    """A repeated integer field: one number, or several packed into bytes, in two's complement."""
    found: list[int] = []
    if isinstance(value, int):
        found.append(value)
    else:
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            found.append(number)
    return [number - (1 << 64) if number >= 1 << 63 else number for number in found]


def _tensor(data: memoryview) -> tuple[str, np.ndarray | None]:
    shape: list[int] = []
    kind, name, raw = 0, "", None
    for number, value in _fields(data):
        if number == 1:
            shape += _numbers(value)
        elif number == 2:
            kind = int(value)  # type: ignore[arg-type]
        elif number == 8:
            name = _text(value)
        elif number == 9 or (number == 4 and kind == 1):  # raw_data, or float_data packed
            raw = bytes(value)  # type: ignore[arg-type]
    if kind not in _DTYPES or raw is None:
        return name, None
    return name, np.frombuffer(raw, _DTYPES[kind]).reshape(shape)


def _node(data: memoryview) -> OnnxNode:
    node = OnnxNode()
    for number, value in _fields(data):
        if number == 3:
            node.name = _text(value)
        elif number == 4:
            node.operator = _text(value)
        elif number == 5:
            name, numbers = "", []
            for inner, content in _fields(value):  # type: ignore[arg-type]
                if inner == 1:
                    name = _text(content)
                elif inner in (3, 8):
                    numbers += _numbers(content)
            node.integers[name] = numbers
    return node


def _value_shape(data: memoryview) -> tuple[str, Shape]:
    """Name and shape of a graph input or output (ValueInfoProto -> TypeProto -> Tensor -> TensorShapeProto)."""
    name, shape = "", []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        if number != 2:
            continue
        for dimension in _inside(value, 1, 2, 1):
            sizes = [int(size) for inner, size in _fields(dimension) if inner == 1]  # type: ignore[arg-type]
            shape.append(sizes[0] if sizes and sizes[0] > 0 else None)
    return name, tuple(shape)


def _inside(data: int | memoryview, *path: int) -> Iterator[memoryview]:
    """The messages reached by following field numbers inwards."""
    if not path:
        yield data  # type: ignore[misc]
        return
    for number, value in _fields(data):  # type: ignore[arg-type]
        if number == path[0]:
            yield from _inside(value, *path[1:])


@contextmanager
def _graph(path: str | Path) -> Iterator[list[tuple[int, memoryview]]]:
    """The fields of the graph in a file, mapped and not copied; errors of the format become ``WeightsError``."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No model file at {path}: wanted an .onnx file. Check the path or reinstall idcore.")
    try:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        yield [field for graph in _inside(memoryview(data), 7) for field in _fields(graph)]  # type: ignore
    except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not an ONNX file that can be read ({error}). Get the file again.") from error


def read_onnx(path: str | Path) -> OnnxWeights:
    """Initialisers and nodes of an ONNX file, in the dtypes in which they are stored.

    Initialisers of other types than float16/32/64 and int32/64, or kept in a file beside, are left out.
    Raises ``WeightsError`` where the file is missing or not ONNX.
    """
    found = OnnxWeights({}, {})
    with _graph(path) as fields:
        for number, content in fields:
            if number == 5:
                name, array = _tensor(content)
                if array is not None:
                    found.tensors[name] = array
            elif number == 1:
                node = _node(content)
                found.nodes[node.name] = node
    if not found.tensors:
        raise WeightsError(f"{path} holds no weights: wanted an ONNX model with initialisers inside the file.")
    return found


def read_signature(path: str | Path) -> OnnxSignature:
    """Inputs, outputs and first operators of an ONNX file, read without its weights.

    Raises ``WeightsError`` where the file is missing, not ONNX, or without inputs and outputs.
    """
    inputs: dict[str, Shape] = {}
    outputs: dict[str, Shape] = {}
    operators: list[str] = []
    weights: set[str] = set()
    with _graph(path) as fields:
        for number, content in fields:
            if number == 5:
                weights.update(_text(value) for inner, value in _fields(content) if inner == 8)
            elif number == 1 and len(operators) < 8:
                operators.append(_node(content).operator)
            elif number in (11, 12):
                name, shape = _value_shape(content)
                (inputs if number == 11 else outputs)[name] = shape
    # Older exporters list every weight among the inputs too.
    inputs = {name: shape for name, shape in inputs.items() if name not in weights}
    if not inputs or not outputs:
        raise WeightsError(f"{path} has no inputs or no outputs: it is not an ONNX model. Get the file again.")
    return OnnxSignature(inputs, outputs, operators)
