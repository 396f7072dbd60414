"""InstantID's adapter for SDXL (Wang et al. 2024, arXiv 2401.07519): 16 identity tokens with keys and values per layer.

Reads the published ip-adapter.bin (repository InstantX/InstantID), a nested torch pickle: convert it once with
`idcore convert ip-adapter.bin --out instantid.safetensors --unpickle`. The method's other half, IdentityNet, is a
ControlNet of diffusers that takes the identity tokens in place of the text's.

    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(base, controlnet=ControlNetModel.from_pretrained(folder))
    me = instantid.encode("me.jpg")
    with idcore.attach(pipe, instantid, me, id_scale=0.8), instantid.identity_net(pipe, me):
        pipe("portrait", image=keypoint_picture(points, 1024, 1024), controlnet_conditioning_scale=0.8)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from idcore.adapter_files import read_adapter
from idcore.encoders.face_features import FaceFeatures
from idcore.errors import WeightsError
from idcore.identity import Identity
from idcore.systems.face_adapter import FaceAdapter, FaceAdapterConfig
from idcore.systems.identity_net import IdentityNetHandle, put_identity


class InstantID(FaceAdapter):
    """InstantID's adapter. Embeddings are antelopev2's, not normalised; published id_scale 0.8.

    Several photos of a person are further context for the same 16 tokens, as the published code's shapes allow.
    """

    title = "InstantID"

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.float32,
        preprocess: Callable[[Any], FaceFeatures] | None = None,
    ) -> InstantID:
        """Load a safetensors file with the published keys; sizes are read from it.

        Args:
            path: The file.
            dtype: Of the loaded weights.
            preprocess: As in :class:`FaceAdapter`.

        Raises:
            WeightsError: the file cannot be read or holds something else; IP-Adapter Plus, which has the same keys, is
                told apart by the width that it reads (512 of a face, 1024 and more of an image).
        """
        tensors, _, metadata = read_adapter(path, "resampler", "InstantID")
        config = FaceAdapterConfig.of_tensors("instantid", tensors, metadata.get("idcore_config"))
        if config.projector.id_dim > 512:
            raise WeightsError(
                f"InstantID: {path} reads vectors of {config.projector.id_dim} numbers, image tokens: it is an "
                "IP-Adapter Plus for whole images (diffusers' load_ip_adapter reads it); wanted face embeddings of 512"
            )
        with torch.device("meta"):
            system = cls(config, preprocess=preprocess)
        system._load(tensors, dtype, path)
        return system

    def identity_net(
        self, pipe: Any, identity: Identity, *, controlnet: Any = None, cfg: Any = "auto"
    ) -> IdentityNetHandle:
        """Let the pipeline's ControlNet, IdentityNet, read the identity in place of the text.

        Args:
            pipe: A diffusers ControlNet pipeline.
            identity: Made by :meth:`encode`; one row, or one per image.
            controlnet: Which, where the pipeline has several.
            cfg: How a batch is made; as in `attach`.

        Returns:
            A handle with `remove()` and `identity`, which may be set; also a context manager.

        Raises:
            InputError: the pipeline has no ControlNet, or the identity is another system's.
        """
        identity.require_system(self.name)
        return put_identity(pipe, identity, controlnet, cfg)
