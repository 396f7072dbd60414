"""RetinaFace with a ResNet-50 (Deng et al., CVPR 2020, arXiv 1905.00641): faces with five landmarks, in plain PyTorch.

The landmark detector of PuLID's published preprocessing. Key names are those of the published
``detection_Resnet50_Final.pth`` (`idcore fetch retinaface --convert` makes safetensors of it).
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from idcore.encoders.face import Face, largest_first
from idcore.encoders.mtcnn import suppress
from idcore.errors import InputError
from idcore.files import fingerprint, read_safetensors, require_keys

STRIDES = (8, 16, 32)
ANCHORS = ((16, 32), (64, 128), (256, 512))  # sides in pixels, per stride
VARIANCE = (0.1, 0.2)  # of shifts and of log sizes
BGR_MEAN = (104.0, 117.0, 123.0)
WIDTH = 256
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of ResNet-50


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or c_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(short + self.bn3(self.conv3(x)))


class _ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        c_in = 64
        for i, (width, blocks, stride) in enumerate(_STAGES, 1):
            layers = []
            for b in range(blocks):
                layers.append(_Bottleneck(c_in, width, stride if b == 0 else 1))
                c_in = 4 * width
            self.add_module(f"layer{i}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 1/8, 1/16 and 1/32."""
        x = self.layer1(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1))
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


def _conv(c_in: int, c_out: int, kernel: int, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class _Pyramid(nn.Module):
    """Feature pyramid: each level adds the coarser one, enlarged."""

    def __init__(self) -> None:
        super().__init__()
        for i, c_in in enumerate((512, 1024, 2048), 1):
            self.add_module(f"output{i}", _conv(c_in, WIDTH, 1))
        self.merge1, self.merge2 = _conv(WIDTH, WIDTH, 3), _conv(WIDTH, WIDTH, 3)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = (getattr(self, f"output{i}")(f) for i, f in enumerate(features, 1))
        middle = self.merge2(middle + F.interpolate(coarse, middle.shape[2:], mode="nearest"))
        fine = self.merge1(fine + F.interpolate(middle, fine.shape[2:], mode="nearest"))
        return fine, middle, coarse


class _Context(nn.Module):
    """Three sizes of context side by side (3x3, and 5x5 and 7x7 as stacks of 3x3)."""

    def __init__(self) -> None:
        super().__init__()
        quarter = WIDTH // 4
        self.conv3X3 = _conv(WIDTH, WIDTH // 2, 3, relu=False)
        self.conv5X5_1 = _conv(WIDTH, quarter, 3)
        self.conv5X5_2 = _conv(quarter, quarter, 3, relu=False)
        self.conv7X7_2 = _conv(quarter, quarter, 3)
        self.conv7x7_3 = _conv(quarter, quarter, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.conv5X5_1(x)
        parts = [self.conv3X3(x), self.conv5X5_2(middle), self.conv7x7_3(self.conv7X7_2(middle))]
        return F.relu(torch.cat(parts, 1))


class _Head(nn.Module):
    """`numbers` per anchor, a row per anchor: cells row by row, the anchors of a cell together."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.conv1x1 = nn.Conv2d(WIDTH, 2 * numbers, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.numbers)


class RetinaFace(nn.Module):
    """The detector.

    Args:
        threshold: Confidence that a face needs (0.97 in PuLID's published chain).
        overlap: Overlap above which the weaker of two boxes goes (0.4 there).
    """

    def __init__(self, threshold: float = 0.97, overlap: float = 0.4) -> None:
        super().__init__()
        if not 0 < threshold < 1 or not 0 < overlap < 1:
            raise InputError(f"RetinaFace: threshold and overlap lie between 0 and 1, got {threshold} and {overlap}")
        self.threshold, self.overlap = threshold, overlap
        self.weights_hash: str | None = None
        self.body = _ResNet50()
        self.fpn = _Pyramid()
        self.ssh1, self.ssh2, self.ssh3 = _Context(), _Context(), _Context()
        for name, numbers in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):
            self.add_module(name, nn.ModuleList(_Head(numbers) for _ in STRIDES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [N, 3, H, W], BGR less `BGR_MEAN`, to logits [N, A, 2], boxes [N, A, 4], landmarks [N, A, 10]."""
        levels = self.fpn(self.body(x))
        levels = [getattr(self, f"ssh{i}")(level) for i, level in enumerate(levels, 1)]
        heads = (self.ClassHead, self.BboxHead, self.LandmarkHead)
        logits, boxes, points = (torch.cat([h(f) for h, f in zip(head, levels)], 1) for head in heads)
        return logits, boxes, points

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Face]:
        """The faces in an RGB picture at its own size, largest first."""
        weight = self.body.conv1.weight
        rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        x = rgb.flip(1).to(weight.device, weight.dtype) - weight.new_tensor(BGR_MEAN).view(1, 3, 1, 1)
        logits, boxes, points = (t[0].double().cpu() for t in self(x))
        scores = logits.softmax(-1)[:, 1]
        anchors = anchors_of(image.height, image.width)
        found = scores > self.threshold
        corners = decode_boxes(boxes[found], anchors[found]).numpy()
        marks = decode_points(points[found], anchors[found]).numpy()
        scores = scores[found].numpy()
        return largest_first([
            Face(corners[i].astype(np.float32), float(scores[i]), marks[i].astype(np.float32), image.size)
            for i in suppress(corners, scores, self.overlap)
        ])  # fmt: skip

    @classmethod
    def from_weights(cls, path: str | os.PathLike, *, threshold: float = 0.97, overlap: float = 0.4) -> RetinaFace:
        """Load safetensors of the published file.

        Raises:
            WeightsError: the file cannot be read, or its keys, shapes or values do not fit.
        """
        state, _ = read_safetensors(path, what="RetinaFace weights")
        with torch.device("meta"):
            net = cls(threshold, overlap)
        require_keys(state, {k: t.shape for k, t in net.state_dict().items()}, f"RetinaFace weights {path}")
        net.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
        net.weights_hash = fingerprint(state)
        return net.eval().requires_grad_(False)


def anchors_of(height: int, width: int) -> Tensor:
    """Anchors [A, 4] float64 of a picture: centre x, y and sides, pixels; in the order of the heads' rows."""
    found = []
    for stride, sides in zip(STRIDES, ANCHORS):
        rows, columns = -(-height // stride), -(-width // stride)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (torch.stack([x, y], -1).double() + 0.5) * stride
        each = [torch.cat([centre, torch.full_like(centre, side)], -1) for side in sides]
        found.append(torch.stack(each, 2).reshape(-1, 4))
    return torch.cat(found)


def decode_boxes(raw: Tensor, anchors: Tensor) -> Tensor:
    """Boxes x0, y0, x1, y1 [A, 4] in pixels: the centre moves by 0.1 sides, log sizes by 0.2."""
    centre = anchors[:, :2] + raw[:, :2] * VARIANCE[0] * anchors[:, 2:]
    half = anchors[:, 2:] * torch.exp(raw[:, 2:] * VARIANCE[1]) / 2
    return torch.cat([centre - half, centre + half], 1)


def decode_points(raw: Tensor, anchors: Tensor) -> Tensor:
    """Landmarks [A, 5, 2] in pixels: both eyes, nose, both mouth corners."""
    return anchors[:, None, :2] + raw.view(-1, 5, 2) * VARIANCE[0] * anchors[:, None, 2:]
