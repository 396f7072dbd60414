"""SDXL pipelines from folders, hub ids and single files; UNets of few-step models; weights in 8 bit; offloading."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingDependencyError, WeightsError

OFFLOADS = ("model", "sequential")
QUANTIZED = ("int8", "fp8")
_LDM = "model.diffusion_model."


def load_pipeline(base: str | os.PathLike, *, local_files_only: bool = True, **options: Any) -> Any:
    """diffusers' StableDiffusionXLPipeline from a folder or a hub id.

    Args:
        base: folder in diffusers' layout, or "owner/name".
        local_files_only: nothing is downloaded unless this is False.
        **options: for diffusers' `from_pretrained`: `torch_dtype`, `variant`, `revision`, components.

    Raises:
        WeightsError: it is not there or does not load.
    """
    from diffusers import StableDiffusionXLPipeline

    check_base(base)
    path = Path(base)
    options = {"add_watermarker": False} | options
    if "torch_dtype" in options:
        options |= dtype_option(options.pop("torch_dtype"))
    try:
        return StableDiffusionXLPipeline.from_pretrained(base, local_files_only=local_files_only, **options)
    except (OSError, ValueError, KeyError, TypeError) as e:
        more = "" if path.exists() or not local_files_only else "; to download it give local_files_only=False"
        raise WeightsError(f"{base} does not load as an SDXL pipeline: {e}{more}") from e


def dtype_option(dtype: torch.dtype | None) -> dict[str, Any]:
    """The dtype as an argument of diffusers' `from_pretrained`, which renamed it and warns about the older name."""
    from diffusers.utils import deprecation_utils

    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}


def check_base(base: str | os.PathLike) -> None:
    """Raise WeightsError for what can be no pipeline: no folder in diffusers' layout, and no hub id by its form."""
    path = Path(base)
    if path.exists() and not (path / "model_index.json").is_file():
        raise WeightsError(
            f"{path} has no model_index.json; wanted a folder with an SDXL pipeline in diffusers' layout, or for one "
            "file from_single_file"
        )
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(base)):
        raise WeightsError(f"{path} does not exist; wanted a folder with an SDXL pipeline in diffusers' layout")


def load_single_file(
    checkpoint: str | os.PathLike, config: str | os.PathLike, *, local_files_only: bool = True, **options: Any
) -> Any:
    """StableDiffusionXLPipeline from one file with UNet, autoencoder and text encoders in the original layout.

    Args:
        checkpoint: the safetensors file.
        config: folder in diffusers' layout (or hub id) with the configurations and tokenizers, which the file lacks.
        local_files_only: nothing is downloaded unless this is False.
        **options: for diffusers' `from_single_file`.

    Raises:
        WeightsError: a file is missing or does not load.
    """
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if not Path(checkpoint).is_file():
        raise WeightsError(f"{checkpoint}: no such file; wanted an SDXL checkpoint in one safetensors file")
    options = {"add_watermarker": False} | options
    try:
        return StableDiffusionXLPipeline.from_single_file(
            str(checkpoint), config=str(config), local_files_only=local_files_only, **options
        )
    except (SingleFileComponentError, OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise WeightsError(
            f"{checkpoint} does not load as an SDXL checkpoint with the configuration of {config}: {e}"
        ) from e


def unet_shapes(base: str | os.PathLike) -> nn.Module:
    """The UNet of a base model without its weights, on the meta device.

    Args:
        base: folder with a pipeline, or with its UNet, in diffusers' layout.

    Raises:
        WeightsError: there is no configuration of a UNet.
    """
    from diffusers import UNet2DConditionModel

    path = Path(base)
    found = next((p for p in (path / "unet", path) if (p / "config.json").is_file()), None)
    if found is None:
        raise WeightsError(f"{path} has no unet/config.json; wanted a folder with a base model in diffusers' layout")
    try:
        config = UNet2DConditionModel.load_config(found, local_files_only=True)
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{found / 'config.json'} does not describe a UNet of diffusers: {e}") from e


def load_unet_weights(unet: nn.Module, path: str | os.PathLike) -> nn.Module:
    """A whole UNet from one safetensors file (such as `sdxl_lightning_4step_unet.safetensors`) into this UNet.

    Keys may be diffusers' or the original layout's, alone or under "model.diffusion_model.". Values are cast to the
    dtype of the UNet.

    Raises:
        WeightsError: missing, damaged, or not the weights of this UNet; the UNet is unchanged.
    """
    from ..weights import read_safetensors, require_keys

    tensors, _ = read_safetensors(path, what="UNet", check_finite=False)
    tensors = {k: v for k, v in tensors.items() if k.startswith(_LDM)} or tensors
    bare = {k.removeprefix(_LDM): v for k, v in tensors.items()}
    if any(k.startswith("input_blocks.") for k in bare):
        bare = _from_original(bare, unet, path)
    wanted = unet.state_dict()
    require_keys(bare, {k: v.shape for k, v in wanted.items()}, f"{path}: UNet")
    unet.load_state_dict(bare)
    return unet


def _from_original(tensors: dict[str, Any], unet: nn.Module, path: Any) -> dict[str, Any]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        return convert_ldm_unet_checkpoint({_LDM + k: t for k, t in tensors.items()}, config=dict(unet.config))
    except (KeyError, IndexError, ValueError) as e:
        raise WeightsError(f"{path} holds a UNet in the original layout that is not shaped like this one: {e}") from e


def check_arranged(kind: str | None, device: torch.device | str | None, offload: str | None) -> None:
    """What `quantize` and `place` would refuse, before gigabytes are read for nothing."""
    if kind is not None:
        _quantize_config(kind)
    if offload is not None:
        _accelerator(device, offload)


def quantize(unet: nn.Module, kind: str) -> nn.Module:
    """Linear weights of the UNet's transformers in 8 bit, by torchao, in place. Not reversible.

    Args:
        unet: its dtype stays that of the activations.
        kind: "int8" or "fp8": weights only.

    Raises:
        InputError: unknown kind.
        MissingDependencyError: torchao is not installed.
    """
    quantize_, config = _quantize_config(kind)
    quantize_(unet, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and ".transformer_blocks." in name)
    return unet


def _quantize_config(kind: str) -> tuple[Any, Any]:
    """torchao's function, and what to give it."""
    if kind not in QUANTIZED:
        raise InputError(f"quantize must be one of {', '.join(QUANTIZED)}, got {kind!r}")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as e:
        raise MissingDependencyError(
            f'quantize="{kind}" needs torchao, which is not installed or does not load ({e}); pip install torchao, or '
            "leave quantize out"
        ) from e
    return quantize_, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def place(pipe: Any, device: torch.device | str | None, offload: str | None) -> Any:
    """Move a pipeline's components, or let them come to the device only while they run.

    Args:
        pipe: diffusers pipeline.
        device: None: where they are; with an offload, the accelerator.
        offload: None; "model": text encoders, UNet and autoencoder one after the other, whole (a few % slower);
            "sequential": layer by layer (least memory, several times slower).

    Raises:
        InputError: unknown offload, or no accelerator to offload from.
    """
    if offload is None:
        return pipe if device is None else pipe.to(device)
    _accelerator(device, offload)
    move = pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload
    move(device=device or "cuda")
    return pipe


def _accelerator(device: torch.device | str | None, offload: str) -> None:
    """Raise InputError unless there is something to offload from, in a way that is known."""
    if offload not in OFFLOADS:
        raise InputError(f"offload must be None or one of {', '.join(OFFLOADS)}, got {offload!r}")
    kind = torch.device(device or "cuda").type
    if kind == "cpu" or not getattr(torch, kind).is_available():
        raise InputError(
            f'offload="{offload}" moves weights between the CPU and an accelerator, and device {kind!r} is none or not '
            "available; leave it out"
        )


def arrange(pipe: Any, unet_weights: Any, kind: str | None, device: Any, offload: str | None, compiled: Any) -> None:
    """A whole UNet's weights, 8 bit, device, compile: in the order in which they must come."""
    if unet_weights is not None:
        load_unet_weights(pipe.unet, unet_weights)
    if kind is not None:
        quantize(pipe.unet, kind)
    place(pipe, device, offload)
    if compiled:
        backend = compiled if isinstance(compiled, str) else "inductor"
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
