"""What FaceID and InstantID share: a projector, and keys and values per layer added to the text attention.

Decoupled cross-attention (Ye et al. 2023, arXiv 2308.06721, eq. 5): h + s * softmax(q k_id^T / sqrt(d)) v_id, the merge
"add" of `idcore.ops.id_attention`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.adapter_files import layers_of
from idcore.attention.sites import find_sites
from idcore.encoders.face_features import FaceFeatures
from idcore.errors import InputError, WeightsError
from idcore.files import fingerprint, require_keys, write_safetensors
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions, Site
from idcore.systems.face_projectors import ProjectorConfig
from idcore.systems.layers import SDXL_LAYERS, OneBlock, matching_sites


@dataclass(frozen=True)
class FaceAdapterConfig:
    """Sizes of an adapter: its projector, and (index, C) of each cross-attention layer that it has weights for."""

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    layers: tuple[tuple[int, int], ...] = SDXL_LAYERS

    @classmethod
    def for_unet(cls, unet: nn.Module, projector: ProjectorConfig) -> FaceAdapterConfig:
        """One pair of projections for each cross-attention layer of ``unet``."""
        return cls(projector, tuple((s.index, s.hidden) for s in find_sites(unet)))

    @classmethod
    def of_tensors(cls, kind: str, t: Mapping[str, Tensor], text: str | None = None) -> FaceAdapterConfig:
        """The sizes that a published file has; the depth is counted.

        Args:
            kind: As in :class:`ProjectorConfig`.
            t: The file's tensors.
            text: The config that :meth:`FaceAdapter.save` wrote, where there is one: it is believed instead.

        Raises:
            WeightsError: keys that the sizes are read from are missing, or the written config is damaged.
        """
        try:
            if text is not None:
                raw = json.loads(text)
                return cls(ProjectorConfig(**raw["projector"]), tuple((int(i), int(c)) for i, c in raw["layers"]))
            return cls(_projector_of(kind, t), layers_of(t))
        except (KeyError, ValueError, TypeError, InputError) as e:
            raise WeightsError(f"{kind} weights: no sizes can be read from this file ({e}); fetch it again") from e


def _projector_of(kind: str, t: Mapping[str, Tensor]) -> ProjectorConfig:
    head = "image_proj.perceiver_resampler." if kind == "faceid-plus" else "image_proj."
    depth = len({k for k in t if k.startswith(f"{head}layers.") and k.endswith(".0.to_q.weight")})
    if kind == "instantid":
        _, tokens, inner = t["image_proj.latents"].shape
        width, id_dim = t["image_proj.proj_out.weight"].shape[0], t["image_proj.proj_in.weight"].shape[1]
        return ProjectorConfig(kind, width, tokens, id_dim, inner=inner, depth=depth)
    width, id_dim = t["image_proj.norm.weight"].shape[0], t["image_proj.proj.0.weight"].shape[1]
    tokens = t["image_proj.proj.2.weight"].shape[0] // width
    if kind == "faceid":
        return ProjectorConfig(kind, width, tokens, id_dim)
    return ProjectorConfig(kind, width, tokens, id_dim, t[f"{head}proj_in.weight"].shape[1], depth=depth)


class _KeysAndValues(nn.Module):
    """Of one layer; names as published."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, hidden, bias=False)
        self.to_v_ip = nn.Linear(width, hidden, bias=False)


class FaceAdapter(OneBlock):
    """An adapter of the IP-Adapter family; its state_dict has the published keys, less the LoRA part.

    Args:
        config: Sizes.
        preprocess: Called by :meth:`encode` with photos; gives :class:`FaceFeatures`. Usually
            `idcore.encoders.face_features.FacePreprocess`.
    """

    title: ClassVar[str] = "face adapter"

    def __init__(self, config: FaceAdapterConfig, *, preprocess: Callable[[Any], FaceFeatures] | None = None) -> None:
        super().__init__()
        self.config = config
        self.image_proj = config.projector.build()
        width = config.projector.width
        self.ip_adapter = nn.ModuleDict({str(i): _KeysAndValues(width, c) for i, c in config.layers})
        # Past nn.Module: no weights of this system.
        self.__dict__.update(preprocess=preprocess, lora_tensors={}, _hashed=((), ""))

    @property
    def name(self) -> str:
        """Name of the system in identities."""
        return self.config.projector.kind

    @property
    def options(self) -> AttentionOptions:
        """Merge "add" without zero tokens."""
        return AttentionOptions("add")

    def _load(self, tensors: dict[str, Tensor], dtype: torch.dtype, path: Any) -> None:
        require_keys(tensors, {k: t.shape for k, t in self.state_dict().items()}, f"{self.title} weights {path}")
        self.load_state_dict({k: t.to(dtype, copy=True) for k, t in tensors.items()}, assign=True)
        self.lay_out_weights()
        self.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike) -> Path:
        """Write a safetensors file with the published keys, LoRA part included, and the sizes in its metadata."""
        metadata = {"format": "pt", "idcore_config": json.dumps(dataclasses.asdict(self.config)), **self._marks()}
        return write_safetensors(path, {**self.state_dict(), **self.lora_tensors}, metadata)

    def _marks(self) -> dict[str, str]:
        return {}

    # -- encoding -----------------------------------------------------------------------------------------

    def forward(self, embeds: Tensor, clip: Tensor | None = None) -> Tensor:
        """Identity tokens [B, L, E], with gradients, in the weights' dtype and on their device.

        Args:
            embeds: [B, n, id_dim], embeddings of n photos of each of B people.
            clip: [B, n, T, clip_dim], image tokens, for the Plus forms.
        """
        p = next(self.image_proj.parameters())
        clip = None if clip is None else clip.to(p.device, p.dtype)
        return self.image_proj(embeds.to(p.device, p.dtype), clip, self._shortcut())

    def _shortcut(self) -> float | None:
        return None

    @torch.no_grad()
    def encode(self, photos: Any) -> Identity:
        """Identity of one person from one or several photos (or of B people from ready features).

        Args:
            photos: A photo, a list of photos of one person, a tensor of embeddings ([D], [n, D] or [B, n, D]), or
                :class:`FaceFeatures`.

        Returns:
            Tokens [B, L, E] and unconditional tokens of the same shape (the projector on zeros, as published), float32.

        Raises:
            InputError: no preprocessing was given, or features that do not fit the weights.
        """
        features = self._features(photos)
        self._check(features)
        e, c = features.embeds, features.clip
        none = torch.zeros_like(e) if features.uncond_embeds is None else features.uncond_embeds
        blank = None
        if c is not None:
            blank = torch.zeros_like(c) if features.uncond_clip is None else features.uncond_clip.expand_as(c)
        tokens, uncond = self(e, c), self(none, blank)
        uncond = uncond[:1] if torch.equal(uncond, uncond[:1].expand_as(uncond)) else uncond
        meta = {**features.meta, "photos": features.n, "encoder": self.weights_hash()}
        return Identity(tokens.float().cpu(), uncond.float().cpu(), self.name, meta | self._marks())

    def weights_hash(self) -> str:
        """Names the projector's weights in identities; computed anew when they were changed."""
        seen = tuple((p.data_ptr(), p._version) for p in self.image_proj.parameters())
        if self._hashed[0] != seen:
            self.__dict__["_hashed"] = (seen, fingerprint(self.image_proj.state_dict()))
        return self._hashed[1]

    def _features(self, photos: Any) -> FaceFeatures:
        if isinstance(photos, FaceFeatures):
            return photos
        if isinstance(photos, Tensor):
            if photos.ndim not in (1, 2, 3):
                raise InputError(f"{self.title}: embeddings must be [D], [n, D] or [B, n, D], got {list(photos.shape)}")
            return FaceFeatures(photos[(None,) * (3 - photos.ndim)])
        if self.preprocess is None:
            raise InputError(
                f"{self.title}.encode: photos need preprocess=FacePreprocess(...) in the constructor or in "
                "from_weights; or give embeddings, or FaceFeatures"
            )
        return self.preprocess(photos)

    def _check(self, f: FaceFeatures) -> None:
        c = self.config.projector
        if f.embeds.shape[-1] != c.id_dim:
            raise InputError(f"{self.title}: wanted embeddings of {c.id_dim} numbers, got {f.embeds.shape[-1]}")
        if c.kind == "faceid-plus" and (f.clip is None or f.clip.shape[-1] != c.clip_dim):
            got = "none" if f.clip is None else str(list(f.clip.shape))
            raise InputError(
                f"{self.title}: the Plus forms also read image tokens [B, n, T, {c.clip_dim}] of the face, got {got}; "
                "give FacePreprocess a tower (CLIP ViT-H/14)"
            )

    # -- what attach asks ---------------------------------------------------------------------------------

    def sites(self, unet: nn.Module) -> list[Site]:
        """The UNet's cross-attention layers, each checked against the weights; raises InputError."""
        return matching_sites(self.title, self.config.layers, unet)

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: tokens [Bi, L, E] to two of [Bi, L, C], in the weights' dtype and device.

        Raises:
            InputError: no weights for this layer, or tokens of another width.
        """
        if str(site.index) not in self.ip_adapter:
            raise InputError(f"{self.title}: no weights for {site.name} (index {site.index})")
        layer, width = self.ip_adapter[str(site.index)], self.config.projector.width
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise InputError(f"{self.title}: tokens must be [Bi, L, {width}], got {list(tokens.shape)}")
        wk, wv = layer.to_k_ip.weight, layer.to_v_ip.weight
        tokens = tokens.to(wk.device, wk.dtype)
        return F.linear(tokens, wk), F.linear(tokens, wv)

    def kv_weights(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(to_k_ip, to_v_ip) [C, E] by the layer's index, in order."""
        layers = self.ip_adapter
        return {i: (layers[str(i)].to_k_ip.weight, layers[str(i)].to_v_ip.weight) for i, _ in self.config.layers}

    def extra_repr(self) -> str:
        return f"{self.name}, {len(self.config.layers)} layers, {len(self.lora_tensors)} LoRA tensors"
