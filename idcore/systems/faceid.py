"""IP-Adapter FaceID for SD 1.5 and SDXL: plain, portrait, Plus and PlusV2, each with its LoRA part.

Reads the published files (repository h94/IP-Adapter-FaceID), whose .bin are nested torch pickles: convert them once
with `idcore convert FILE.bin --out FILE.safetensors --unpickle`. There is no paper beyond IP-Adapter's (arXiv
2308.06721); what is done here follows the published code. The LoRA part was trained with the rest and belongs to it.

    faceid = FaceID.from_weights("ip-adapter-faceid-plusv2_sdxl.safetensors", preprocess=FacePreprocess(...))
    with faceid.lora(pipe), idcore.attach(pipe, faceid, faceid.encode("me.jpg"), id_scale=0.8):
        pipe("portrait, oil on canvas")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idcore.adapter_files import adapter_kind, read_adapter
from idcore.encoders.face_features import FaceFeatures
from idcore.errors import InputError, WeightsError
from idcore.files import check_container, sniff
from idcore.systems.face_adapter import FaceAdapter, FaceAdapterConfig
from idcore.systems.lora import LoraHandle, add_lora

VARIANTS = ("faceid", "plus", "plusv2")


class FaceID(FaceAdapter):
    """The FaceID family; several photos give their tokens side by side.

    Args:
        config: Sizes; the kind of its projector is "faceid" or "faceid-plus".
        variant: "faceid", "plus", or "plusv2". Plus and PlusV2 have the same keys and other arithmetic: PlusV2 adds the
            image tokens' answer to the face's tokens, Plus replaces them by it.
        shortcut_scale: PlusV2's strength of the image tokens, 0 to 5, published default 1.
        preprocess: As in :class:`FaceAdapter`.
    """

    title = "FaceID"

    def __init__(
        self,
        config: FaceAdapterConfig,
        variant: str = "faceid",
        *,
        shortcut_scale: float = 1.0,
        preprocess: Callable[[Any], FaceFeatures] | None = None,
    ) -> None:
        kind = "faceid" if variant == "faceid" else "faceid-plus"
        if variant not in VARIANTS or config.projector.kind != kind:
            raise InputError(
                f"FaceID: variant must be one of {', '.join(VARIANTS)} and fit the weights "
                f"({config.projector.kind}), got {variant!r}"
            )
        super().__init__(config, preprocess=preprocess)
        self.variant, self.shortcut_scale = variant, shortcut_scale

    @property
    def name(self) -> str:
        """ "faceid", "faceid-portrait", "faceid-plus" or "faceid-plusv2"."""
        if self.variant == "faceid":
            return "faceid" if self.config.projector.tokens <= 4 else "faceid-portrait"
        return f"faceid-{self.variant}"

    def _shortcut(self) -> float | None:
        return self.shortcut_scale if self.variant == "plusv2" else None

    def _marks(self) -> dict[str, str]:
        return {"variant": self.variant}

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        variant: str = "auto",
        *,
        dtype: torch.dtype = torch.float32,
        shortcut_scale: float = 1.0,
        preprocess: Callable[[Any], FaceFeatures] | None = None,
    ) -> FaceID:
        """Load a safetensors file with the published keys; sizes and base model (SD 1.5, SDXL) are read from it.

        Args:
            path: The file.
            variant: "auto": from the keys; of files with a perceiver from what :meth:`save` noted, else from
                "plusv2" or "plus" in the file's name.
            dtype: Of the loaded weights.
            shortcut_scale, preprocess: As in the constructor.

        Raises:
            WeightsError: the file cannot be read or holds something else.
            InputError: "auto" cannot tell Plus from PlusV2.
        """
        kind = "faceid"
        if sniff(path) == "safetensors" and adapter_kind(check_container(path, "FaceID")[0]) == "faceid-plus":
            kind = "faceid-plus"
        tensors, lora, metadata = read_adapter(path, kind, "FaceID")
        if variant == "auto":
            variant = "faceid" if kind == "faceid" else metadata.get("variant") or _variant_of(Path(path))
        config = FaceAdapterConfig.of_tensors(kind, tensors, metadata.get("idcore_config"))
        with torch.device("meta"):
            system = cls(config, variant, shortcut_scale=shortcut_scale, preprocess=preprocess)
        system._load(tensors, dtype, path)
        system.lora_tensors.update((k, t.to(dtype, copy=True)) for k, t in lora.items())
        return system

    def lora(self, pipe_or_unet: Any, scale: float = 1.0, name: str = "faceid") -> LoraHandle:
        """Put the file's LoRA part on a pipeline or UNet, beside whatever LoRA is there.

        Args:
            pipe_or_unet: A pipeline with a `unet`, or the UNet; before or after `attach`.
            scale: Strength; published use is 1, community use 0.5 to 0.8.
            name: Of the adapter in peft.

        Returns:
            A handle with `scale(x)` and `remove()`; also a context manager.

        Raises:
            WeightsError: this file has no LoRA part (the portrait files have none).
            InputError: the UNet is not the one that the weights are for, or has an adapter of that name.
            MissingDependencyError: peft is not installed.
        """
        if not self.lora_tensors:
            raise WeightsError(f"{self.name}: these weights have no LoRA part; use the adapter without one")
        return add_lora(pipe_or_unet, self.lora_tensors, scale, name)


def _variant_of(path: Path) -> str:
    stem = path.stem.lower().replace("-", "").replace("_", "")
    if "plusv2" in stem:
        return "plusv2"
    if "plus" in stem:
        return "plus"
    raise InputError(
        f"FaceID: {path.name} holds a perceiver, so it is Plus or PlusV2, which have the same keys; "
        "say which with variant='plus' or variant='plusv2'"
    )
