"""`IDPipeline`: SDXL with identities, few steps, in the words of diffusers."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..identity import Identity
from .denoise import CallbackView, Interrupted, Job, caller, denoise
from .loading import arrange, check_arranged, load_pipeline, load_single_file
from .loop_graph import LoopGraphs, Made
from .sdxl import scheduler_by_name
from .sdxl_job import encode_words, make_job, picture_size
from .seat import Seat, people_of
from .vae import LatentDecoder

RUNNERS = ("eager", "graph")
OUTPUTS = ("pil", "np", "pt", "latent")


class IDPipeline:
    """Text and identities to pictures on an SDXL UNet, over the components of a diffusers pipeline.

    Calls from several threads are served one after the other: each gives what it gives alone. Identities stay
    projected between calls, so that the same person costs nothing anew; between calls they are off, and the
    components' own pipeline draws as if nothing were attached. LoRA and IP-Adapter weights go into `pipe.pipe`.

    Attributes:
        pipe: diffusers' StableDiffusionXLPipeline, whose components are used.
        system: the identity system, or None.
        decoder: `LatentDecoder`.
    """

    def __init__(
        self,
        pipe: Any,
        system: Any = None,
        *,
        sampler: str = "lightning",
        runner: str = "eager",
        vae_dtype: str = "auto",
        vae_compile: bool | str = False,
        vae_memory: float | None = None,
        decode_in_graph: bool = False,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            pipe: a StableDiffusionXLPipeline.
            system: what `idcore.attach` takes, e.g. PuLID; needed for identities without a bank of keys and values.
            sampler: "lightning" (DPM++ 2M on trailing timesteps, PuLID v1's), "lightning-euler", "karras-2m" and
                "karras-sde" (PuLID v1.1's), or "own" (the pipeline's scheduler).
            runner: "eager"; or "graph": the loop as one CUDA graph (not run on a GPU yet).
            vae_dtype, vae_compile, vae_memory: dtype, compile and memory of `LatentDecoder`.
            decode_in_graph: with runner "graph": latents are decoded in the same graph.
            backend: of `id_attention`, to insist on.

        Raises:
            InputError: no SDXL pipeline, or an unknown word.
        """
        for name in ("unet", "vae", "text_encoder_2", "scheduler", "encode_prompt"):
            if not hasattr(pipe, name):
                raise InputError(
                    f"IDPipeline: wanted a StableDiffusionXLPipeline, got {type(pipe).__name__} without {name}; put "
                    "identities on other pipelines with idcore.attach"
                )
        if hasattr(system, "put_on"):
            raise InputError(
                f"IDPipeline: {system.name} acts through the prompt; make the pipeline without it, and put the person "
                "on with idcore.attach(pipeline, system, identity)"
            )
        if runner not in RUNNERS:
            raise InputError(f"runner must be one of {', '.join(RUNNERS)}, got {runner!r}")
        if runner == "graph" and pipe.unet.device.type != "cuda":
            raise InputError(
                f'runner="graph" records a CUDA graph and the UNet is on {pipe.unet.device}; move the pipeline to '
                'a GPU (and do not offload it), or use runner="eager"'
            )
        if decode_in_graph and runner != "graph":
            raise InputError(f'decode_in_graph puts the decode into the graph of runner="graph", got runner={runner!r}')
        self._base_scheduler = scheduler_by_name(sampler, pipe.scheduler.config, pipe.scheduler)
        self.pipe, self.system, self.runner = pipe, system, runner
        self.decoder = LatentDecoder(
            pipe.vae, vae_dtype, compile=vae_compile, memory=vae_memory, device=pipe._execution_device
        )
        self.graphs = LoopGraphs(pipe.unet, self.decoder) if runner == "graph" else None
        self.decode_in_graph = decode_in_graph
        self._seat = Seat(self, system, backend, as_data=runner == "graph")
        self._job: Job | None = None
        self._lock = threading.RLock()

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike,
        system: Any = None,
        *,
        unet_weights: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        offload: str | None = None,
        quantize: str | None = None,
        compile: bool | str = False,
        sampler: str = "lightning",
        runner: str = "eager",
        vae_dtype: str = "auto",
        vae_compile: bool | str = False,
        vae_memory: float | None = None,
        decode_in_graph: bool = False,
        backend: str | None = None,
        config: str | os.PathLike | None = None,
        local_files_only: bool = True,
        **options: Any,
    ) -> IDPipeline:
        """From a folder in diffusers' layout, a hub id, or one file.

        Args:
            base: the folder, the id, or with `config` the file.
            system, sampler, runner, vae_dtype, vae_compile, vae_memory, decode_in_graph, backend: as in `__init__`.
            unet_weights: one file with a whole UNet in place of the base's, e.g.
                `sdxl_lightning_4step_unet.safetensors`.
            dtype: of the weights; default as saved.
            device: where to.
            offload: None, "model" or "sequential" (see `loading.place`).
            quantize: None, "int8" or "fp8": the UNet's linear weights, by torchao.
            compile: `torch.compile` the UNet (whole graph; new scales and identities compile nothing anew); a string
                names another backend than inductor.
            config: for one file: see `from_single_file`.
            local_files_only: nothing is downloaded unless this is False.
            **options: for diffusers' `from_pretrained`.

        Raises:
            WeightsError: something is missing or damaged.
            InputError: options that do not fit.
            MissingDependencyError: torchao is not installed.
        """
        check_arranged(quantize, device, offload)
        load = load_pipeline if config is None else functools.partial(load_single_file, config=config)
        pipe = load(base, local_files_only=local_files_only, torch_dtype=dtype, **options)
        where = device if offload is None else device or "cuda"
        LatentDecoder(pipe.vae, vae_dtype, device=where)  # its weights must turn before they are offloaded
        arrange(pipe, unet_weights, quantize, device, offload, compile)
        return cls(
            pipe, system, sampler=sampler, runner=runner, vae_dtype=vae_dtype, vae_compile=vae_compile,
            vae_memory=vae_memory, decode_in_graph=decode_in_graph, backend=backend,
        )  # fmt: skip

    @classmethod
    def from_single_file(
        cls, checkpoint: str | os.PathLike, config: str | os.PathLike, system: Any = None, **options: Any
    ) -> IDPipeline:
        """From one SDXL checkpoint in the original layout; `config` is a folder (or hub id) with the configurations and
        tokenizers that such a file lacks. Options as in `from_pretrained`."""
        return cls.from_pretrained(checkpoint, system, config=config, **options)

    # -- what attach reads --------------------------------------------------------------------------------------------

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def scheduler(self) -> Any:
        """Of the running call; else the one that calls copy."""
        return self._base_scheduler if self._job is None else self._job.scheduler

    @property
    def num_timesteps(self) -> int | None:
        return None if self._job is None else len(self._job.scheduler.timesteps)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Of the running call."""
        return self._job is not None and self._job.guided

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    # -- identities ---------------------------------------------------------------------------------------------------

    def encode(self, photos: Any) -> Identity:
        """Photos of one person to an identity, by the system. Raises InputError without a system that can."""
        if not hasattr(self.system, "encode"):
            what = "None" if self.system is None else type(self.system).__name__
            raise InputError(
                f"IDPipeline: system {what} cannot read photos; give id_embeds, or a system such as idcore.PuLID"
            )
        return self.system.encode(photos)

    def forget_identity(self) -> None:
        """Take the identities off the UNet and drop their keys and values."""
        with self._lock:
            self._seat.leave()
            if self.graphs is not None:
                self.graphs.forget()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        id_image: Any = None,
        id_embeds: Any = None,
        id_scale: Any = 1.0,
        id_guidance_start: Any = 0.0,
        id_guidance_end: Any = 1.0,
        id_schedule: Any = None,
        id_masks: Any = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of prompts.

        Args:
            prompt, negative_prompt: one or several. Without guidance the negative one is not read.
            id_image: photo of a person or a list of photos of that person; several people as a list of such lists.
                Encoded anew at each call: for the same person again use `encode` once and `id_embeds`.
            id_embeds: an `Identity` or a list of them (several people in one picture), or paths of saved ones.
            id_scale, id_guidance_start, id_guidance_end, id_schedule: strength and time; see `idcore.attach`.
            id_masks: where each identity acts; see `Handle.masks`.
            num_inference_steps: of the sampler.
            guidance_scale: above 1 classifier-free guidance, both halves in one pass of twice the batch; up to 1 none,
                and half the work.
            height, width: of the pictures; default the UNet's own size.
            num_images_per_prompt: pictures per prompt, prompt by prompt.
            generator: one for the whole batch, or one per picture: then each equals its picture alone.
            latents: noise [pictures, 4, h, w] in place of the generator's.
            original_size, crops_coords_top_left, target_size: SDXL's size conditions; default the picture's own.
            clip_skip: layers of the text encoders to leave out at their end.
            callback_on_step_end: `f(pipeline, pass, timestep, tensors) -> tensors`, as in diffusers.
            callback_on_step_end_tensor_inputs: of latents, prompt_embeds, add_text_embeds, add_time_ids.
            output_type: "pil", "np" (float [N, H, W, 3] in 0..1), "pt" ([N, 3, H, W]) or "latent".
            return_dict: False gives a tuple.

        Returns:
            diffusers' StableDiffusionXLPipelineOutput with `images`, or (images,).

        Raises:
            InputError: an argument that does not fit; the text says which.
        """
        if output_type not in OUTPUTS:
            raise InputError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if self.graphs is not None and callback_on_step_end is not None:
            raise InputError('runner="graph" plays all steps at once, no callback between them; use runner="eager"')
        people = people_of(self, id_image, id_embeds)
        size = picture_size(self.pipe, height, width)
        sizes = (original_size or size, crops_coords_top_left, target_size or size)
        with self._lock:
            words = encode_words(self.pipe, prompt, negative_prompt, num_images_per_prompt, guidance_scale, clip_skip)
            self._job = job = make_job(
                self.pipe, words, self._base_scheduler, num_inference_steps, guidance_scale, size, sizes, generator,
                latents,
            )  # fmt: skip
            try:
                with self._seat.taken(people, id_scale, id_masks, (id_guidance_start, id_guidance_end, id_schedule)):
                    decode = self.decode_in_graph and output_type != "latent"
                    made = self._run(job, callback_on_step_end, callback_on_step_end_tensor_inputs, decode)
            finally:
                self._job = None
            images = made.latents if output_type == "latent" else self._pictures(made)
            self.pipe.maybe_free_model_hooks()
        if output_type != "latent":
            images = self.pipe.image_processor.postprocess(images.float(), output_type=output_type)
        return _output(images, return_dict)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _pictures(self, made: Made) -> Tensor:
        done = made.pictures
        return self.decoder(made.latents) if done is None else self.decoder.checked(done, made.latents)

    def _run(self, job: Job, callback: Callable | None, names: Sequence[str], decode: bool) -> Made:
        if self.graphs is not None:
            return self.graphs(job, self._seat.conditionings, decode)
        view = CallbackView(self, job)
        follow = None if callback is None else caller(callback, list(names), view, job)
        with self.pipe.progress_bar(total=len(job.scheduler.timesteps)) as bar:

            def after_pass(i: int, t: Tensor) -> None:
                bar.update()
                if follow is not None:
                    follow(i, t)

            try:
                return Made(denoise(self.unet, job, after_pass), None)
            except Interrupted:
                return Made(job.latents, None)


def _output(images: Any, return_dict: bool) -> Any:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

    return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)
