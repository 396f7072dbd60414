"""Reads the layers of a dlib ``.dat`` network file (dlib's own serialisation), without dlib.

dlib writes integers as a control byte (low four bits: how many bytes follow; top bit: negative) and then
those bytes, little-endian; floats as mantissa and exponent, both such integers; strings as a length and the
bytes; tensors as a version, four sizes and raw float32. Layers stand in the stream from the input to the
output, each opened by its type's name. Between them lie training leftovers, which are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from idcore.errors import WeightsError


@dataclass(frozen=True)
class InputLayer:
    """Mean colour (R, G, B; 0..255) that the network subtracts, and the height and width that it wants."""

    mean: tuple[float, float, float]
    size: tuple[int, int]


@dataclass(frozen=True)
class ConvLayer:
    """A convolution: ``params`` is the weights (out, in, kernel, kernel) flat, then ``filters`` biases."""

    params: np.ndarray
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class AffineLayer:
    """A frozen batch norm: ``params`` holds one gain per channel and then one offset per channel."""

    params: np.ndarray


@dataclass(frozen=True)
class LinearLayer:
    """A fully connected layer without bias: ``weight`` is (inputs, outputs) float32."""

    weight: np.ndarray


Layer = InputLayer | ConvLayer | AffineLayer | LinearLayer


class _Stream:
    """A position in the bytes of a .dat file, with readers for dlib's primitive forms."""

    def __init__(self, data: bytes, name: str):
        self.data, self.name, self.at = data, name, 0

    def fail(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.name} is not a dlib network file that can be read: {what} at byte {self.at}. Wanted: an "
            "uncompressed .dat such as dlib_face_recognition_resnet_model_v1.dat. Get the file again "
            "(and unpack it if it ends in .bz2)."
        )

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise self.fail(f"{count} more bytes were wanted but the file ends after {len(self.data)}")
        chunk, self.at = self.data[self.at : end], end
        return chunk

    def integer(self) -> int:
        control = self.take(1)[0]
        size = control & 0x0F
        if not 1 <= size <= 8 or control & 0x70:
            raise self.fail(f"a bad integer size byte 0x{control:02x}")
        value = int.from_bytes(self.take(size), "little")
        return -value if control & 0x80 else value

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if abs(exponent) > 1000:
            raise self.fail(f"a float without a finite value (exponent {exponent})")
        return float(mantissa) * 2.0**exponent

    def tensor(self) -> np.ndarray:
        version = self.integer()
        if version != 2:
            raise self.fail(f"tensor version {version} where 2 was wanted")
        shape = tuple(self.integer() for _ in range(4))
        if min(shape) < 0:
            raise self.fail(f"a tensor of shape {shape}")
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self.take(4 * count), dtype="<f4").reshape(shape).astype(np.float32)


def _read_input(stream: _Stream) -> InputLayer:
    mean = (stream.real(), stream.real(), stream.real())
    return InputLayer(mean, (stream.integer(), stream.integer()))


def _read_conv(stream: _Stream) -> ConvLayer:
    params = stream.tensor().ravel()
    filters, *rest = (stream.integer() for _ in range(7))
    return ConvLayer(params, filters, (rest[0], rest[1]), (rest[2], rest[3]), (rest[4], rest[5]))


def _read_affine(stream: _Stream) -> AffineLayer:
    return AffineLayer(stream.tensor().ravel())


def _read_linear(stream: _Stream) -> LinearLayer:
    outputs, inputs = stream.integer(), stream.integer()
    weight = stream.tensor().ravel()
    if weight.size != inputs * outputs:
        raise stream.fail(f"{weight.size} weights in a layer of {inputs} inputs and {outputs} outputs without bias")
    return LinearLayer(weight.reshape(inputs, outputs))


_READERS = {
    "input_rgb_image_sized": _read_input,
    "con_4": _read_conv,
    "affine_": _read_affine,
    "fc_2": _read_linear,
}


def read_layers(path: str | Path) -> list[Layer]:
    """The layers of a dlib network file, from the input to the output.

    Only the layer types of dlib's face recognition network are known: sized RGB input, convolution, affine,
    fully connected. Raises ``WeightsError`` where the file is missing, cut off or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No file at {path}: wanted a dlib network file (.dat). Check the path.")
    stream = _Stream(path.read_bytes(), str(path))
    # A type name is written as a dlib string: one length byte behind the control byte 0x01.
    marks = {b"\x01" + bytes([len(name)]) + name.encode(): reader for name, reader in _READERS.items()}
    layers: list[Layer] = []
    while True:
        found = [(at, mark) for mark in marks if (at := stream.data.find(mark, stream.at)) >= 0]
        if not found:
            break
        at, mark = min(found)
        stream.at = at + len(mark)
        layers.append(marks[mark](stream))
    if not layers:
        raise stream.fail(f"none of the layer types {', '.join(_READERS)} was found")
    return layers
