"""ArcFace's improved ResNets (Deng et al., CVPR 2019; IResNet-18 to -200) as differentiable torch modules.

For training: an identity loss needs gradients to the picture; inference goes through ONNX Runtime
(`idcore.encoders.scrfd.ArcFace`). Key names are those of InsightFace's published PyTorch backbones (`backbone.pth`;
`idcore convert` makes safetensors of it). Their weights are for non-commercial research only.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor, nn

from idcore.errors import InputError, WeightsError
from idcore.files import read_safetensors, require_keys

SIZE = 112
WIDTHS = (64, 128, 256, 512)
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class _Block(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, width, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(width), nn.PReLU(width)
        self.conv2, self.bn3 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.bn1(x))
        return short + self.bn3(self.conv2(self.prelu(self.bn2(x))))


class IResNet(nn.Module):
    """Faces to embeddings, differentiable; frozen and in eval mode as built.

    ``forward(chips)``: [N, 3, 112, 112] float, RGB in 0..1, aligned as ``align.template("arcface")`` says; gives
    [N, E] (not normalised) in the dtype of the weights. Raises ``InputError`` for another shape or an integer dtype.

    Args:
        blocks: of the four stages, or the depth: 18, 34, 50, 100 or 200.
        embedding: E.
    """

    def __init__(self, blocks: tuple[int, ...] | int = 50, embedding: int = 512) -> None:
        super().__init__()
        if isinstance(blocks, int):
            if blocks not in DEPTHS:
                raise InputError(f"IResNet: depth must be one of {', '.join(map(str, DEPTHS))}, got {blocks}")
            blocks = DEPTHS[blocks]
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(WIDTHS[0]), nn.PReLU(WIDTHS[0])
        c_in = WIDTHS[0]
        for i, (width, count) in enumerate(zip(WIDTHS, blocks, strict=True), 1):
            stage = [_Block(c_in, width, 2), *(_Block(width, width, 1) for _ in range(count - 1))]
            self.add_module(f"layer{i}", nn.Sequential(*stage))
            c_in = width
        self.bn2 = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in * (SIZE // 16) ** 2, embedding)
        self.features = nn.BatchNorm1d(embedding)
        self.requires_grad_(False).eval()

    @classmethod
    def from_weights(cls, path: str | os.PathLike) -> IResNet:
        """A safetensors file in the published layout; depth and width are read from it.

        Raises:
            WeightsError: missing, a pickle, damaged, or not such a network.
        """
        tensors, _ = read_safetensors(path, what="ArcFace")
        blocks = tuple(
            len({m[1] for k in tensors if (m := re.match(rf"layer{i}\.(\d+)\.", k))}) for i in range(1, len(WIDTHS) + 1)
        )
        if 0 in blocks or "fc.weight" not in tensors:
            raise WeightsError(
                f"{path} holds no IResNet (layer1..layer4, fc); wanted the backbone of InsightFace's PyTorch ArcFace, "
                "converted by `idcore convert --unpickle`"
            )
        with torch.device("meta"):
            made = cls(blocks, len(tensors["fc.weight"]))
        state = made.state_dict()
        counters = {k for k in state if k.endswith("num_batches_tracked")}  # of training; some files leave them out
        tensors = {k: t for k, t in tensors.items() if k not in counters}
        require_keys(tensors, {k: t.shape for k, t in state.items() if k not in counters}, f"ArcFace weights {path}")
        tensors = {k: t.float() for k, t in tensors.items()} | {k: torch.tensor(0) for k in counters}
        made.load_state_dict(tensors, assign=True)
        return made.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> IResNet:
        """Always in eval mode: its statistics are those of its own training."""
        return super().train(False)

    def forward(self, chips: Tensor) -> Tensor:
        if chips.ndim != 4 or tuple(chips.shape[1:]) != (3, SIZE, SIZE) or not chips.is_floating_point():
            raise InputError(
                f"IResNet wants float RGB chips [N, 3, {SIZE}, {SIZE}] in 0..1, got {list(chips.shape)} {chips.dtype}; "
                "align the faces first (idcore.encoders.align)"
            )
        x = chips.to(self.conv1.weight.dtype) * 2 - 1
        x = self.prelu(self.bn1(self.conv1(x)))
        for i in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))
