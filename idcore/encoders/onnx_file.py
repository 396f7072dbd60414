"""Reads weights out of an ``.onnx`` file with numpy alone.

An ONNX file is a protocol-buffer message. The few fields that hold initialisers and node attributes are read
here, so that torch modules can take their weights from the shipped files without the onnx package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from idcore.errors import WeightsError

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


def read_onnx(path: str | Path) -> OnnxWeights:
    """Initialisers and nodes of an ONNX file, in the dtypes in which they are stored.

    Initialisers of other types than float16/32/64 and int32/64, or kept in a file beside, are left out.
    Raises ``WeightsError`` where the file is missing or not ONNX.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"No model file at {path}: wanted an .onnx file. Check the path or reinstall idcore."
        )
    found = OnnxWeights({}, {})
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number != 7:  # ModelProto.graph
                continue
            for inner, content in _fields(value):  # type: ignore[arg-type]
                if inner == 5:
                    name, array = _tensor(content)  # type: ignore[arg-type]
                    if array is not None:
                        found.tensors[name] = array
                elif inner == 1:
                    node = _node(content)  # type: ignore[arg-type]
                    found.nodes[node.name] = node
    except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{path} is not an ONNX file that can be read ({error}). Get the file again."
        ) from error
    if not found.tensors:
        raise WeightsError(
            f"{path} holds no weights: wanted an ONNX model with initialisers inside the file."
        )
    return found
