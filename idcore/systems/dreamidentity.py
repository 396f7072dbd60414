"""DreamIdentity (arXiv 2307.00300): a face to k words of the prompt, by one pass of an encoder.

Section "M2 ID encoder": the class tokens after several blocks of a face ViT and its identity vector, concatenated, go
through one MLP per word. The words stand beside looked-up word embeddings and go through the frozen text encoder;
nothing is put on the UNet. The paper gives neither the MLPs' sizes nor how words are kept in range: those are our
choice, after StableIdentity (AdaIN to the statistics of names) and E4T (a penalty on the squares), and configurable.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idcore.encoders.align import TEMPLATES
from idcore.encoders.face_vit import FaceViT, FaceViTConfig, check_taps
from idcore.errors import InputError, WeightsError
from idcore.files import require_keys
from idcore.identity import Identity
from idcore.systems.words import WordSystem
from idcore.weights import fingerprint, read_safetensors, write_safetensors

FORMAT = "idcore-dreamidentity"
PAPER_TAPS = (3, 6, 9, 12)  # unconfirmed: the paper's figure draws "several", its blocks are not printed
WIDTHS = {"sd15": (768,), "sd21": (1024,), "sdxl": (768, 1280)}


@dataclass(frozen=True)
class DreamIdentityConfig:
    """Sizes of a DreamIdentity encoder.

    Attributes:
        vit: The face ViT.
        widths: Word-embedding widths of the base model's text encoders; see `WIDTHS`.
        words: k (2, as StableIdentity reports of DreamIdentity).
        taps: Blocks counted from 1 whose class tokens are read.
        hidden: Width of each MLP's inner layer (our choice).
        adain: Give each word the mean and spread of names' embeddings (StableIdentity, eq. for v*).
        template: How faces are cut out of photos; see `FaceCrops`.
    """

    vit: FaceViTConfig = field(default_factory=FaceViTConfig)
    widths: tuple[int, ...] = (768,)
    words: int = 2
    taps: tuple[int, ...] = PAPER_TAPS
    hidden: int = 1024
    adain: bool = True
    template: str = "arcface"

    def __post_init__(self) -> None:
        check_taps(self.taps, self.vit.depth)
        if self.template not in TEMPLATES:
            raise InputError(f"DreamIdentity: template must be one of {', '.join(TEMPLATES)}, got {self.template!r}")
        if self.words < 1 or self.hidden < 1 or len(self.widths) not in (1, 2) or min(self.widths) < 1:
            raise InputError(
                f"DreamIdentity: wanted words and hidden above 0 and one or two widths, got words {self.words}, hidden "
                f"{self.hidden}, widths {self.widths}"
            )

    @property
    def length(self) -> int:
        """Width of V, all taps and the identity vector."""
        return len(self.taps) * self.vit.width + self.vit.id_width

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DreamIdentityConfig:
        """Raises WeightsError where the text is no config."""
        try:
            raw = json.loads(text)
            vit = FaceViTConfig(**raw.pop("vit"))
            tuples = {n: tuple(map(int, raw.pop(n))) for n in ("widths", "taps")}
            return cls(vit=vit, **tuples, **raw)
        except (ValueError, KeyError, TypeError, InputError) as e:
            raise WeightsError(f"DreamIdentity weights: the config in the file's metadata is damaged ({e})") from e


class WordHead(nn.Module):
    """V [B, length] to one word [B, sum of widths]: two layers, LeakyReLU 0.2, as StableIdentity's (our choice)."""

    def __init__(self, length: int, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(length)  # raw taps of different blocks differ widely in size (our choice)
        self.fc1 = nn.Linear(length, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, v: Tensor) -> Tensor:
        return self.fc2(nn.functional.leaky_relu(self.fc1(self.norm(v)), 0.2))


class DreamIdentity(WordSystem, nn.Module):
    """The M2 encoder, and what puts its words on a pipeline.

    Trainable are `vit` (the paper's figure draws the whole encoder open) and `heads`; freeze `vit` to train the MLPs
    alone. `name_mean` and `name_std` [sum of widths] are buffers: see `set_names`.

    Args:
        config: Sizes.
        preprocess: Called by :meth:`encode` with photos; gives pixels [n, 3, S, S]; usually :class:`FaceCrops`.
    """

    name = "dreamidentity"

    def __init__(
        self, config: DreamIdentityConfig | None = None, *, preprocess: Callable[[Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        c = self.config = config or DreamIdentityConfig()
        self.vit = FaceViT(c.vit)
        self.heads = nn.ModuleList(WordHead(c.length, c.hidden, sum(c.widths)) for _ in range(c.words))
        self.register_buffer("name_mean", torch.zeros(sum(c.widths)))
        self.register_buffer("name_std", torch.full((sum(c.widths),), 0.014))  # about CLIP's, until `set_names`
        # Past nn.Module: no weights of this system.
        self.__dict__.update(preprocess=preprocess, timing={}, _hashed=((), ""))

    # -- weights ------------------------------------------------------------------------------------------

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.float32,
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> DreamIdentity:
        """Load what :meth:`save` wrote.

        Raises:
            WeightsError: another file, or keys, shapes or values that are wrong.
        """
        tensors, metadata = read_safetensors(path, what="DreamIdentity weights")
        if metadata.get("format") != FORMAT:
            raise WeightsError(
                f"{path} holds no DreamIdentity encoder (format {metadata.get('format')!r}, wanted {FORMAT!r})"
            )
        with torch.device("meta"):
            system = cls(DreamIdentityConfig.from_json(metadata.get("idcore_config", "")), preprocess=preprocess)
        require_keys(tensors, {k: t.shape for k, t in system.state_dict().items()}, f"DreamIdentity weights {path}")
        system.load_state_dict({k: t.to(dtype, copy=True) for k, t in tensors.items()}, assign=True)
        return system.eval().requires_grad_(False)

    @classmethod
    def from_vit(cls, vit: FaceViT, widths: Sequence[int], *, taps: Sequence[int] = (), **config: Any) -> DreamIdentity:
        """A face ViT's weights and fresh MLPs, to be trained.

        Args:
            vit: Its weights are copied.
            widths: Of the base model's text encoders; see `WIDTHS`.
            taps: Blocks that are read; none: the ends of the network's quarters.
            **config: Further values of `DreamIdentityConfig`.
        """
        depth = vit.config.depth
        taps = tuple(taps) or tuple(sorted({max(1, depth * i // 4) for i in range(1, 5)}))
        system = cls(DreamIdentityConfig(vit=vit.config, widths=tuple(widths), taps=taps, **config))
        system.vit.load_state_dict(vit.state_dict())
        return system

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> Path:
        """Write a safetensors file: keys `vit.*` (timm's names), `heads.*`, `name_mean`, `name_std`; the sizes in its
        metadata."""
        header = {"format": FORMAT, "idcore_config": self.config.to_json(), **(metadata or {})}
        return write_safetensors(path, self.state_dict(), header)

    def weights_hash(self) -> str:
        """Names the encoder's weights in identities; computed anew when they were changed."""
        seen = tuple((t.data_ptr(), t._version) for t in self.state_dict().values())
        if self._hashed[0] != seen:
            self.__dict__["_hashed"] = (seen, fingerprint(self.state_dict()))
        return self._hashed[1]

    def set_names(self, mean: Tensor, std: Tensor) -> None:
        """Take over the statistics of names' embeddings [sum of widths]; see `idcore.text.names.name_statistics`."""
        with torch.no_grad():
            self.name_mean.copy_(mean)
            self.name_std.copy_(std)

    # -- the encoder --------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> Tensor:
        """V: class tokens of all taps and the identity vector. [B, 3, S, S] in -1..1 -> [B, length]"""
        identity, taps = self.vit(pixels, self.config.taps)
        return torch.cat([*taps, identity], -1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Words [B, k, sum of widths], with gradients, in the weights' dtype.

        Args:
            pixels: [B, 3, S, S] RGB in -1..1, S = config.vit.image_size, aligned as :class:`FaceCrops` does.
        """
        v = self.features(pixels)
        words = torch.stack([head(v) for head in self.heads], 1)
        return self.in_range(words) if self.config.adain else words

    def in_range(self, words: Tensor) -> Tensor:
        """AdaIN of each text encoder's words to the names' statistics (StableIdentity): the word's mean and spread are
        numbers, those of the names vectors. [..., sum of widths] -> the same"""
        out = []
        sizes = list(self.config.widths)
        parts = (t.split(sizes, -1) for t in (words, self.name_mean, self.name_std))
        for w, mean, std in zip(*parts):
            centred = w - w.mean(-1, keepdim=True)
            spread = w.std(-1, keepdim=True).clamp_min(1e-6)
            out.append(std * centred / spread + mean)
        return torch.cat(out, -1)

    @torch.no_grad()
    def encode(self, photos: Any) -> Identity:
        """Identity of one person by one forward pass; of several photos the mean of their words (our choice).

        `timing` then holds what it took: `preprocess_ms` (finding and cutting out the face) and `forward_ms`.

        Args:
            photos: A photo, a list of photos of one person, or pixels [n, 3, S, S] as `forward` takes them.

        Returns:
            Tokens [1, k, sum of widths] float32 on the CPU; no unconditional tokens.

        Raises:
            InputError: no preprocessing was given, or pixels that do not fit.
        """
        if not isinstance(photos, Tensor) and self.preprocess is None:
            raise InputError(
                "DreamIdentity.encode: photos need preprocess=FaceCrops(...) in the constructor or in from_weights; or "
                "give pixels [n, 3, S, S]"
            )
        start = time.perf_counter()
        pixels = photos if isinstance(photos, Tensor) else self.preprocess(photos)
        p = next(self.parameters())
        pixels = pixels.to(p.device, p.dtype)
        cut = time.perf_counter()
        words = self(pixels).mean(0, keepdim=True).float().cpu()
        end = time.perf_counter()
        self.timing.update(preprocess_ms=1e3 * (cut - start), forward_ms=1e3 * (end - cut))
        meta = {"photos": len(pixels), "encoder": self.weights_hash(), "widths": list(self.config.widths)}
        return Identity(words, None, self.name, meta)

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.words} words of {' + '.join(map(str, c.widths))}, taps {c.taps}, AdaIN {'on' if c.adain else 'off'}"


def words_penalty(words: Tensor, weight: float = 0.01) -> Tensor:
    """The L2 term on words [B, k, E]: weight * mean over B of the sum of squares (weight 0.01: E4T's pre-training;
    DreamIdentity's is not printed). float []"""
    return weight * words.float().square().sum((1, 2)).mean()
