"""dlib's face recognition ResNet as a differentiable torch module, with the weights of the shipped ONNX file.

For training (an identity loss needs gradients to the image); inference goes through ONNX Runtime instead.
Network: D. King, dlib, example ``dnn_face_recognition_ex.cpp``; 29 convolutions, 128 numbers per face,
trained so that two photos of one person lie closer than 0.6 in Euclidean distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.encoders.onnx_file import OnnxWeights, read_onnx, read_signature
from idcore.errors import InputError, WeightsError

DEFAULT_WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "faces" / "dlib_resnet.onnx"


class DlibFeatures(NamedTuple):
    """What the network gives for N chips.

    ``embedding`` [N,128] float32, not unit-norm (typically about 1.4 long). ``feats``: the output of each
    stage, [N,32,35,35], [N,64,17,17], [N,128,8,8], [N,256,4,4], [N,256,2,2], all at least 0 (after a ReLU).
    """

    embedding: Tensor
    feats: tuple[Tensor, ...]


def _conv(file: OnnxWeights, name: str) -> nn.Conv2d:
    try:
        weight, bias = file.tensors[f"{name}.weight"], file.tensors[f"{name}.bias"]
        node = file.nodes[f"{name}.out"].integers
        stride, padding = node["strides"][0], node["pads"][0]
    except KeyError as error:
        raise WeightsError(
            f"The model file lacks {error}; wanted one from idcore.tools.dlib_to_onnx. Convert it again."
        ) from error
    channels, inputs, kernel, _ = weight.shape
    conv = nn.Conv2d(inputs, channels, kernel, stride, padding)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight.astype("float32")))
        conv.bias.copy_(torch.from_numpy(bias.astype("float32")))
    return conv


def _grow(x: Tensor, channels: int, rows: int, cols: int) -> Tensor:
    """Zero-pads at the end of the channel, row and column axes up to the given sizes."""
    if x.shape[1:] == (channels, rows, cols):
        return x
    return F.pad(x, (0, cols - x.shape[3], 0, rows - x.shape[2], 0, channels - x.shape[1]))


class _Block(nn.Module):
    """Residual block; stride 2 pools the shortcut, and the sum zero-pads the smaller side, as in dlib."""

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d):
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2
        self.down = conv1.stride[0] > 1

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv2(torch.relu(self.conv1(x)))
        skip = F.avg_pool2d(x, 2, 2) if self.down else x
        shape = [max(a, b) for a, b in zip(main.shape[1:], skip.shape[1:], strict=True)]
        return torch.relu(_grow(main, *shape) + _grow(skip, *shape))


class DlibRecogniser(nn.Module):
    """Faces to embeddings, differentiable. Frozen (``requires_grad`` False) and in eval mode as built.

    ``forward(chips)``: [N,3,150,150] float, RGB in [0,1], aligned as ``align.template("dlib")`` says (mean
    colour and scale are applied inside); gives ``DlibFeatures``. Computes in the dtype of its weights
    (float32; ``.double()`` works). Raises ``InputError`` for another shape or an integer dtype.
    """

    mean: Tensor

    def __init__(self, weights: str | Path = DEFAULT_WEIGHTS):
        super().__init__()
        file = read_onnx(weights)
        self.stem = _conv(file, "stem")
        self.stages = nn.ModuleList()
        while f"stage{len(self.stages)}.0.conv1.weight" in file.tensors:
            stage, blocks = f"stage{len(self.stages)}", []
            while f"{stage}.{len(blocks)}.conv1.weight" in file.tensors:
                name = f"{stage}.{len(blocks)}"
                blocks.append(_Block(_conv(file, f"{name}.conv1"), _conv(file, f"{name}.conv2")))
            self.stages.append(nn.Sequential(*blocks))
        missing = [name for name in ("mean", "scale", "head.weight") if name not in file.tensors]
        if missing or not len(self.stages):
            raise WeightsError(
                f"{weights} lacks {', '.join(missing) or 'stage0.0'}; wanted a file from "
                "idcore.tools.dlib_to_onnx. Convert it again."
            )
        head = torch.from_numpy(file.tensors["head.weight"].astype("float32"))
        self.head = nn.Linear(*head.shape, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(head.T)
        # Images come in [0,1] at this door, while the file's mean and scale are for 0..255.
        self.register_buffer("mean", torch.from_numpy(file.tensors["mean"].astype("float32")) / 255.0)
        self.gain = file.tensors["scale"].item() * 255.0
        (shape,) = read_signature(weights).inputs.values()
        self.size = int(shape[2] or 150)
        self.requires_grad_(False)
        self.eval()

    def forward(self, chips: Tensor) -> DlibFeatures:
        wanted = (3, self.size, self.size)
        if chips.ndim != 4 or tuple(chips.shape[1:]) != wanted or not chips.is_floating_point():
            raise InputError(
                f"DlibRecogniser wants float RGB chips [N,3,{self.size},{self.size}] in [0,1], got "
                f"{tuple(chips.shape)} {chips.dtype}. Align the faces first (idcore.encoders.align)."
            )
        x = (chips.to(self.mean.dtype) - self.mean) * self.gain
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, 2)
        feats = []
        for stage in self.stages:
            x = stage(x)
            feats.append(x)
        return DlibFeatures(self.head(x.mean((2, 3))), tuple(feats))
