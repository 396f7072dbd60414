"""BiSeNet face parsing with a ResNet-18 (arXiv 1808.00897): which pixel is skin, hair, background and so on.

Key names are those of the published ``parsing_bisenet.pth`` (19 classes of CelebAMask-HQ).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.errors import InputError
from idcore.weights import fingerprint, read_safetensors, require_keys

LABELS = (
    "background", "skin", "left brow", "right brow", "left eye", "right eye", "glasses", "left ear", "right ear",
    "earring", "nose", "mouth", "upper lip", "lower lip", "neck", "necklace", "cloth", "hair", "hat",
)  # fmt: skip
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _ConvBNReLU(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        return F.relu(short + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class _ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (c_in, c_out) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            stride = 1 if i == 1 else 2
            self.add_module(f"layer{i}", nn.Sequential(_Residual(c_in, c_out, stride), _Residual(c_out, c_out, 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 1/8, 1/16 and 1/32."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class _Refine(nn.Module):
    """Attention refinement: channels weighed by their own global mean."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(c_in, c_out)
        self.conv_atten = nn.Conv2d(c_out, c_out, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))))


class _ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = _ResNet18()
        self.arm16 = _Refine(256, 128)
        self.arm32 = _Refine(512, 128)
        self.conv_head32 = _ConvBNReLU(128, 128)
        self.conv_head16 = _ConvBNReLU(128, 128)
        self.conv_avg = _ConvBNReLU(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f8, f16, f32 = self.resnet(x)
        coarse = self.arm32(f32) + self.conv_avg(f32.mean((2, 3), keepdim=True))
        coarse = self.conv_head32(F.interpolate(coarse, f16.shape[2:], mode="nearest"))
        fine = self.arm16(f16) + coarse
        return f8, self.conv_head16(F.interpolate(fine, f8.shape[2:], mode="nearest")), coarse


class _Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convblk = _ConvBNReLU(256, 256, 1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([spatial, context], 1))
        return x + x * torch.sigmoid(self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))))


class _Output(nn.Module):
    def __init__(self, c_in: int, c_mid: int, classes: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(c_in, c_mid)
        self.conv_out = nn.Conv2d(c_mid, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Face parsing network. The two auxiliary outputs are in the weights and used in training only."""

    def __init__(self, classes: int = len(LABELS)) -> None:
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _Fusion()
        self.conv_out = _Output(256, 256, classes)
        self.conv_out16 = _Output(128, 64, classes)
        self.conv_out32 = _Output(128, 64, classes)
        self.weights_hash: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W], normalised by ImageNet's mean and deviation, to logits [N, classes, H, W]."""
        f8, context, _ = self.cp(x)
        return F.interpolate(self.conv_out(self.ffm(f8, context)), x.shape[2:], mode="bilinear", align_corners=True)

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """Class of each pixel (index into ``LABELS``).

        Args:
            images: [N, 3, H, W] RGB in [0, 1], aligned faces, H and W multiples of 32 (512 in training).

        Returns:
            [N, H, W] int64.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 32 or images.shape[3] % 32:
            raise InputError(
                f"face parsing: images must be [N, 3, H, W] with H and W multiples of 32, got {list(images.shape)}"
            )
        weight = self.ffm.conv1.weight
        x = images.to(weight.device, weight.dtype)
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return self((x - mean) / std).argmax(1)

    @classmethod
    def from_weights(cls, path: str | os.PathLike) -> BiSeNet:
        """Load ``parsing_bisenet.pth`` after ``idcore.weights.convert_pickle`` made safetensors of it.

        Raises:
            WeightsError: the file cannot be read, or its keys, shapes or values do not fit.
        """
        state, _ = read_safetensors(path, what="face parsing weights")
        with torch.device("meta"):
            net = cls()
        require_keys(state, {k: t.shape for k, t in net.state_dict().items()}, f"face parsing weights {path}")
        net.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
        net.weights_hash = fingerprint(state)
        return net.eval().requires_grad_(False)
