"""Latents to pictures with SDXL's autoencoder: fast, safe in 16 bit, within the memory that is there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import InputError
from .vae_range import residual_scale, set_residual_scale
from .vae_tiles import SHARE, Plan, decode_bytes, decode_tiles, free_bytes, plan_decode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALES = (2.0**-5, 2.0**-10)  # of the residual path in float16, one after the other (our choice)


class LatentDecoder:
    """Decodes latents [B, 4, h, w] to pictures [B, 3, H, W] in about -1..1.

    SDXL's published autoencoder overflows in float16 (its configuration says so: `force_upcast`). diffusers turns such
    weights to float32 and back around every call. Here its residual path carries 1/32 of its values instead, which
    rounds nothing (see `vae_range`); should that not be enough 1/1024, and then float32 for good, with a warning.

    Args:
        vae: diffusers' AutoencoderKL; its weights change dtype, memory format and, in float16, the decoder's scale.
        dtype: "float32", "bfloat16", "float16", or "auto": as the weights are, but where they are float16 and the
            configuration forces an upcast, float32 on a CPU (which gains nothing from float16).
        channels_last: weights and activations in that order, the faster one for convolutions; default: but for
            float32 on a CPU, where PyTorch's group norms and convolutions are several times less accurate in it.
        compile: `torch.compile` the decoder, True for inductor or another backend's name; a first call of a size, and
            of a second size, compiles.
        memory: GB that a decode may take by the estimate of `vae_tiles.decode_bytes`; default 0.8 of what is free on
            the device then (our choice). Batches are decoded in parts that fit, and pictures that do not fit in
            overlapping tiles, with a warning, as a picture then changes a little.
        device: where it will run; default where the weights are.

    Raises:
        InputError: unknown dtype, memory that is no positive number, a float16 decoder unlike SDXL's, or weights that
            are offloaded layer by layer and would have to change or to be compiled.
    """

    def __init__(
        self,
        vae: nn.Module,
        dtype: str = "auto",
        channels_last: bool | None = None,
        compile: bool | str = False,
        memory: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            raise InputError(f"vae_dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory > 0):
            raise InputError(f"vae_memory must be a positive number of GB, or None for what is free, got {memory!r}")
        streamed = _streamed(vae)
        if streamed and compile:
            raise InputError(
                "the autoencoder's weights come layer by layer (sequential offload): vae_compile cannot be"
            )
        self.vae, self.memory = vae, memory
        self._moments: tuple[Tensor, Tensor] | None = None
        self._channels_last, self._on_cpu = channels_last, _kind(device, vae) == "cpu"
        wanted = vae.dtype if dtype == "auto" else DTYPES[dtype]
        if dtype == "auto" and wanted == torch.float16 and vae.config.force_upcast and self._on_cpu:
            wanted = torch.float32
        scaled = wanted == torch.float16 and vae.config.force_upcast and self.scale == 1 and not streamed
        if scaled:
            set_residual_scale(vae.decoder, SCALES[0])
        if wanted != vae.dtype:
            self._turn(wanted)
        if not streamed:
            vae.to(memory_format=self.format)
        self._decoder = vae.decoder
        if compile:
            backend = compile if isinstance(compile, str) else "inductor"
            self._decoder = torch.compile(vae.decoder, fullgraph=True, backend=backend)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype  # diffusers' own property walks through all modules

    @property
    def format(self) -> torch.memory_format:
        """Order of weights and activations in memory."""
        last = self._channels_last
        if last is None:
            last = not self._on_cpu or self.dtype != torch.float32
        return torch.channels_last if last else torch.contiguous_format

    @property
    def scale(self) -> float:
        """Of the decoder's residual path; 1 as published."""
        return residual_scale(self.vae.decoder)

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures in the dtype of the autoencoder, on its device."""
        return self.checked(self._decode(latents), latents)

    def checked(self, pictures: Tensor, latents: Tensor) -> Tensor:
        """The pictures where they are finite; else, with a warning, those of a decode with more range.

        Args:
            pictures: what `latents` were decoded to.
            latents: [B, 4, h, w].
        """
        if bool(torch.isfinite(pictures).all()):
            return pictures
        if not bool(torch.isfinite(latents).all()):
            warnings.warn(
                "the latents hold NaN or infinity, so the pictures do: the UNet overflowed (weights for float16? too "
                "large a scale?), not the autoencoder",
                stacklevel=2,
            )
            return pictures
        while self.dtype == torch.float16:
            self._more_range()
            pictures = self._decode(latents)
            if bool(torch.isfinite(pictures).all()):
                return pictures
        warnings.warn(
            f"the autoencoder made NaN or infinity of finite latents in {self.dtype}; are its weights damaged, or were "
            "they turned to float16 before they came here?",
            stacklevel=3,
        )
        return pictures

    def plan(self, shape: torch.Size) -> Plan:
        """How latents of a shape would be decoded now."""
        limit = SHARE * free_bytes(self._device()) if self.memory is None else self.memory * 1e9
        return plan_decode(self.vae.config, shape, self.dtype.itemsize, limit)

    def decode(self, latents: Tensor, plan: Plan) -> Tensor:
        """As planned, without a look at the result: nothing waits for the device, so that it can be recorded.

        Args:
            latents: [B, 4, h, w].
            plan: of `plan`.
        """
        x = self._unscaled(latents.to(self.dtype))
        if len(x) == plan.pictures and plan.tile is None:
            return self._whole(x)
        decode: Callable[[Tensor], Tensor] = self._whole
        if plan.tile is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

            def decode(part: Tensor) -> Tensor:
                return decode_tiles(self._whole, part, plan.tile, factor)

        return torch.cat([decode(part) for part in x.split(plan.pictures)])

    def _decode(self, latents: Tensor) -> Tensor:
        plan = self.plan(latents.shape)
        if plan.tile is not None:
            need = decode_bytes(self.vae.config, 1, *latents.shape[-2:], self.dtype.itemsize)
            warnings.warn(
                f"a picture of {latents.shape[-2]} x {latents.shape[-1]} latent pixels takes about {need / 1e9:.2g} GB "
                f"to decode in {self.dtype}, more than there is; decoded in tiles of {plan.tile} it changes a little "
                "(vae_memory says how much may be taken, 16 bit take half)",
                stacklevel=2,
            )
        return self.decode(latents, plan)

    def _whole(self, x: Tensor) -> Tensor:
        vae = self.vae
        if hasattr(vae, "_hf_hook"):
            vae._hf_hook.pre_forward(vae)  # offloading brings the weights, as in diffusers' `decode`
        x = x.to(memory_format=self.format)
        return self._decoder(x if vae.post_quant_conv is None else vae.post_quant_conv(x))

    def _more_range(self) -> None:
        larger = [s for s in SCALES if s < self.scale]
        into = f"its residual path carries {larger[0]:g} of its values" if larger else "it runs in float32"
        warnings.warn(
            f"the autoencoder overflowed in float16; {into} from now on (give vae_dtype='float32' or 'bfloat16', or "
            "weights that are made for float16)",
            stacklevel=2,
        )
        if larger:
            set_residual_scale(self.vae.decoder, larger[0])
        else:
            self._turn(torch.float32)
            set_residual_scale(self.vae.decoder, 1.0)
            self.vae.to(memory_format=self.format)

    def _turn(self, dtype: torch.dtype) -> None:
        if _streamed(self.vae):
            raise InputError(
                f"the autoencoder's weights come layer by layer (sequential offload) in {self.dtype} and cannot turn "
                f"to {dtype}; give vae_dtype together with offload: IDPipeline.from_pretrained turns them"
            )
        self.vae.to(dtype=dtype)

    def _device(self) -> torch.device:
        to = getattr(getattr(self.vae, "_hf_hook", None), "execution_device", None)
        return torch.device(self.vae.device if to is None else to)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the encoder made them."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return latents / config.scaling_factor
        if self._moments is None or (self._moments[0].dtype, self._moments[0].device) != (
            latents.dtype,
            latents.device,
        ):
            self._moments = tuple(torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
        mean, std = self._moments
        return latents * std / config.scaling_factor + mean


def _streamed(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _kind(device: torch.device | str | None, vae: nn.Module) -> str:
    return torch.device(vae.device if device is None else device).type
