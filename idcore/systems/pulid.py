"""PuLID on SDXL (arXiv 2404.16022): identity encoder, and keys and values for every cross-attention layer.

Reads the published v1 and v1.1 weights, and works on any UNet whose cross-attention layers the weights match.
The preprocessing is in `idcore.encoders.pulid_preprocess`, the attention itself in `idcore.ops.id_attention`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.attention.sites import find_sites
from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.errors import InputError, WeightsError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions, Site
from idcore.systems.layers import SDXL_LAYERS, OneBlock, matching_sites
from idcore.systems.pulid_encoders import GLOBAL_TOKENS, SCALES, EncoderConfig
from idcore.weights import PULID_LAYOUTS, fingerprint, read_pulid, require_keys, to_layout, write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

PRESETS: dict[str, AttentionOptions] = {
    "fidelity": AttentionOptions("ortho_v2", num_zero=8, num_global=5),
    "style": AttentionOptions("ortho", num_zero=16, num_global=5),
    "v1.1": AttentionOptions("ortho_v2", num_zero=20, num_global=5),
    "plain": AttentionOptions("add", num_zero=0, num_global=5),  # the paper's sum, and what training uses
}


@dataclass(frozen=True)
class PuLIDConfig:
    """Sizes of a PuLID: its encoder, and (index, C) of each cross-attention layer that it has weights for."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    layers: tuple[tuple[int, int], ...] = SDXL_LAYERS

    @classmethod
    def for_unet(cls, unet: nn.Module, encoder: EncoderConfig | None = None) -> PuLIDConfig:
        """A config with one pair of projections for each cross-attention layer of ``unet``."""
        return cls(encoder or EncoderConfig(), tuple((s.index, s.hidden) for s in find_sites(unet)))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PuLIDConfig:
        """Raises WeightsError where the text is no config."""
        try:
            raw = json.loads(text)
            return cls(EncoderConfig(**raw["encoder"]), tuple((int(i), int(c)) for i, c in raw["layers"]))
        except (ValueError, KeyError, TypeError, InputError) as e:
            raise WeightsError(f"PuLID weights: the config in the file's metadata is damaged ({e})") from e


class _Projections(nn.Module):
    """Keys and values of one layer; names as published."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.id_to_k = nn.Linear(width, hidden, bias=False)
        self.id_to_v = nn.Linear(width, hidden, bias=False)


class PuLID(OneBlock):
    """The PuLID system. Its state_dict has exactly the keys of the published v1.1 file.

    Args:
        config: Sizes; the published v1 ones by default.
        mode: "fidelity", "style", "v1.1" or "plain" (see ``PRESETS``); by default "fidelity" for v1, "v1.1" for v1.1.
        preprocess: Called by :meth:`encode` with photos of one person; gives :class:`PuLIDFeatures`. Usually
            ``idcore.encoders.pulid_preprocess.PuLIDPreprocess``.
    """

    def __init__(
        self,
        config: PuLIDConfig | None = None,
        *,
        mode: str | None = None,
        preprocess: Callable[[Any], PuLIDFeatures] | None = None,
    ) -> None:
        super().__init__()
        self.config = config or PuLIDConfig()
        self.id_adapter = self.config.encoder.build()
        width = self.config.encoder.output_dim
        self.id_adapter_attn_layers = nn.ModuleDict({str(i): _Projections(width, c) for i, c in self.config.layers})
        self.__dict__["preprocess"] = preprocess  # past nn.Module: its networks are no weights of PuLID
        self.options = self.preset(mode)
        self._weights_hash: str | None = None
        self._uncond: dict[int, Tensor] = {}

    @property
    def version(self) -> str:
        """ "v1" or "v1.1"."""
        return self.config.encoder.version

    @property
    def name(self) -> str:
        """ "pulid-v1" or "pulid-v1.1": the two do not read each other's tokens."""
        return f"pulid-{self.version}"

    def preset(self, mode: str | None = None) -> AttentionOptions:
        """The published settings of a mode: pass single changes to ``idcore.attach(..., num_zero=..)``."""
        mode = mode or ("fidelity" if self.version == "v1" else "v1.1")
        if mode not in PRESETS:
            raise InputError(f"PuLID: mode must be one of {', '.join(map(repr, PRESETS))}, got {mode!r}")
        return PRESETS[mode]

    # -- weights ------------------------------------------------------------------------------------------

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        version: str = "auto",
        *,
        dtype: torch.dtype = torch.float32,
        config: PuLIDConfig | None = None,
        mode: str | None = None,
        preprocess: Callable[[Any], PuLIDFeatures] | None = None,
    ) -> PuLID:
        """Load a safetensors file in any published layout (see `idcore.weights`).

        Args:
            path: The file; v1's torch pickle must be converted first.
            version: "v1", "v1.1", or "auto" to read it from the keys.
            dtype: Of the loaded weights.
            config: Sizes, where they are neither the published ones nor written in the file's metadata.
            mode, preprocess: As in the constructor.

        Raises:
            WeightsError: the file cannot be read, is another version, or its keys, shapes or values are wrong.
        """
        state, info = read_pulid(path)
        if version not in ("auto", "v1", "v1.1"):
            raise InputError(f"PuLID.from_weights: version must be 'auto', 'v1' or 'v1.1', got {version!r}")
        if version not in ("auto", info.version):
            found = info.version or "of no known version (neither latents nor body.0.weight)"
            raise WeightsError(f"{path}: wanted PuLID {version}, its encoder is {found}")
        if config is None and "idcore_config" in info.metadata:
            config = PuLIDConfig.from_json(info.metadata["idcore_config"])
        config = config or PuLIDConfig(EncoderConfig(info.version or "v1"))
        with torch.device("meta"):
            system = cls(config, mode=mode, preprocess=preprocess)
        require_keys(state, {k: t.shape for k, t in system.state_dict().items()}, f"PuLID weights {path}")
        system.load_state_dict({k: t.to(dtype, copy=True) for k, t in state.items()}, assign=True)
        system._weights_hash = _encoder_hash(state)
        system.lay_out_weights()
        return system.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike, layout: str = "pulid") -> Path:
        """Write all weights in layout "pulid" or "community", with the sizes in the metadata."""
        if layout not in PULID_LAYOUTS:
            raise InputError(f"PuLID.save: layout must be 'pulid' or 'community', got {layout!r}")
        state = {to_layout(k, layout): t for k, t in self.state_dict().items()}
        return write_safetensors(path, state, {"format": "pt", "idcore_config": self.config.to_json()})

    def weights_hash(self) -> str:
        """Names the encoder weights in identities: of the file's tensors where loaded from one."""
        return self._weights_hash or _encoder_hash(self.state_dict())

    def train(self, mode: bool = True) -> PuLID:
        """As in torch; also forgets what was cached from the weights, which training may change."""
        self._uncond.clear()
        if mode:
            self._weights_hash = None
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> PuLID:
        self._uncond.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._uncond.clear()
        self._weights_hash = None
        super()._load_from_state_dict(*args, **kwargs)

    # -- encoding -----------------------------------------------------------------------------------------

    def forward(self, features: PuLIDFeatures, *, id_mix: bool = False) -> Tensor:
        """Identity tokens [B, L, E] of B people, with gradients, in the weights' dtype and on their device."""
        p = next(self.id_adapter.parameters())
        hidden = [h.to(p.device, p.dtype) for h in features.hidden]
        return self.id_adapter(features.id_cond.to(p.device, p.dtype), hidden, id_mix=id_mix)

    @torch.no_grad()
    def encode(self, photos: Any, *, id_mix: bool = False) -> Identity:
        """Identity of one person from one or several photos (or of B people from ready features).

        Args:
            photos: A photo, a list of photos of one person, or :class:`PuLIDFeatures`.
            id_mix: v1 with several photos: take all tokens of the further photos, not only their global ones.

        Returns:
            Tokens [B, L, E] and the unconditional tokens [1, L, E] (the encoder on zeros), float32 on the CPU.

        Raises:
            InputError: no preprocessing was given, or features that do not fit.
        """
        if not isinstance(photos, PuLIDFeatures):
            if self.preprocess is None:
                raise InputError(
                    "PuLID.encode: photos need preprocess=PuLIDPreprocess(...) in the constructor or in "
                    "from_weights (face model, vision tower, parsing); or give PuLIDFeatures"
                )
            photos = self.preprocess(photos)
        tokens = self(photos, id_mix=id_mix)
        uncond = self._uncond_like(self.uncond_tokens(photos.hidden[0].shape[2]), photos.n, id_mix)
        meta = {**photos.meta, "photos": photos.n, "encoder": self.weights_hash()}
        if self.version == "v1":
            meta["id_mix"] = id_mix
        return Identity(tokens.float().cpu(), uncond.float().cpu(), self.name, meta)

    @torch.no_grad()
    def uncond_tokens(self, length: int = 577) -> Tensor:
        """The encoder on zeros for one photo, [1, L, E]; computed once per ``length``, unless in training mode.

        Args:
            length: T, tokens of the vision tower (577 for EVA02-CLIP-L-14-336).
        """
        if length in self._uncond:
            return self._uncond[length]
        c = self.config.encoder
        p = next(self.id_adapter.parameters())
        tokens = self.id_adapter(p.new_zeros(1, 1, c.id_dim), [p.new_zeros(1, 1, length, c.vit_dim)] * SCALES)
        if not self.training:
            self._uncond[length] = tokens
        return tokens

    def _uncond_like(self, uncond: Tensor, n: int, id_mix: bool) -> Tensor:
        """v1 repeats the unconditional tokens as it does the conditional ones: zero tokens weigh against both."""
        if self.version == "v1.1" or n == 1:
            return uncond
        extra = uncond if id_mix else uncond[:, :GLOBAL_TOKENS]
        return torch.cat([uncond, *[extra] * (n - 1)], 1)

    # -- what attach asks ---------------------------------------------------------------------------------

    def sites(self, unet: nn.Module) -> list[Site]:
        """The UNet's cross-attention layers, each checked against the weights by index and width.

        Raises:
            InputError: the UNet has other layers than the weights; SDXL's 70 for the published ones.
        """
        return matching_sites(self.name, self.config.layers, unet)

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: tokens [Bi, L, E] to two of [Bi, L, C], in the weights' dtype and device.

        Raises:
            InputError: no weights for this layer, or tokens of another width.
        """
        try:
            layer = self.id_adapter_attn_layers[str(site.index)]
        except KeyError:
            raise InputError(f"{self.name}: no weights for {site.name} (index {site.index})") from None
        width = self.config.encoder.output_dim
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise InputError(f"{self.name}: tokens must be [Bi, L, {width}], got {list(tokens.shape)}")
        wk, wv = layer.id_to_k.weight, layer.id_to_v.weight
        tokens = tokens.to(wk.device, wk.dtype)
        return F.linear(tokens, wk), F.linear(tokens, wv)

    def kv_weights(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(id_to_k, id_to_v) [C, E] by the layer's index, in order."""
        layers = self.id_adapter_attn_layers
        return {i: (layers[str(i)].id_to_k.weight, layers[str(i)].id_to_v.weight) for i, _ in self.config.layers}

    def extra_repr(self) -> str:
        return f"{self.name}, {len(self.config.layers)} layers, {self.options}"


def _encoder_hash(state: dict[str, Tensor]) -> str:
    return fingerprint({k: t for k, t in state.items() if k.startswith("id_adapter.")})
