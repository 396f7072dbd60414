"""`TinyPipeline`: the embedded model as a pipeline, a photo and a prompt to 64x64 pictures in four steps."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attach import Handle, attach
from ..attention.schedule import StepSchedule
from ..encoders.images import ImageLike
from ..errors import InputError, WeightsError
from ..files import file_hash
from ..identity import Identity
from .few_step import noise_levels, sample, seeded_noise
from .tiny_model import TinyConfig, TinyModel

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
BATCH = 16  # pictures in one pass of the network


class Drawing(NamedTuple):
    """One picture of `TinyPipeline.draw`."""

    prompt: str
    seed: int = 0
    identity: Identity | None = None
    id_scale: float = 1.0


class TinyPipeline:
    """The embedded model. One call at a time per object; different objects may run in different threads.

    Attributes:
        model: the `TinyModel` (float32, on the CPU); `model.unet` is a diffusers UNet.
        config: the shipped config.json: hyper-parameters and figures of the training.
    """

    def __init__(self, model: TinyModel, config: dict | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config or {}
        self._lock = threading.Lock()
        self._other: Any = None
        self._somebody: Tensor | None = None

    @property
    def unet(self) -> torch.nn.Module:
        return self.model.unet

    @property
    def system(self):
        """The identity system that `idcore.attach` takes."""
        return self._other or self.model.system

    def with_system(self, system: Any) -> TinyPipeline:
        """The same model with another system on its UNet, such as a PuLID that was trained on it.

        The model's own reference then shows an average face, with and without identity, as in that training
        (`training.tiny.somebody`); `id_scale` acts on the attention alone.
        """
        from ..training.tiny.somebody import somebody

        made = TinyPipeline(self.model, self.config)
        made._lock = self._lock  # one UNet
        made._other, made._somebody = system, somebody(self.model)
        return made

    @classmethod
    def from_package(cls) -> TinyPipeline:
        """The model that the package ships."""
        return cls.from_folder(PACKAGE_FOLDER)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TinyPipeline:
        """A model from a folder with `model.safetensors` and `config.json`.

        Raises:
            WeightsError: a file is missing or damaged, or is not the one whose hash stands in config.json.
        """
        from ..weights import read_safetensors, require_keys

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise WeightsError(
                    f"{folder} has no {name}; wanted a folder with {WEIGHTS} and {CONFIG}. Install idcore again, or "
                    "make one with `idcore train tiny`"
                )
        config = json.loads((folder / CONFIG).read_text())
        _check_hash(folder / WEIGHTS, config.get("sha256"))
        model = TinyModel(TinyConfig.from_dict(config["model"]))
        tensors, _ = read_safetensors(folder / WEIGHTS, what="embedded model")
        wanted = {k: v.shape for k, v in model.state_dict().items()}
        require_keys(tensors, wanted, "embedded model")
        model.load_state_dict({k: v.float() for k, v in tensors.items()})
        return cls(model, config)

    def save(self, folder: str | Path, figures: dict | None = None) -> Path:
        """Write `model.safetensors` (float16) and `config.json` with its hash; returns the folder."""
        from ..weights import write_safetensors

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = write_safetensors(folder / WEIGHTS, {k: v.half() for k, v in self.model.state_dict().items()})
        config = {"model": self.model.config.as_dict(), **(figures or {})}
        config["sha256"] = file_hash(path).removeprefix("sha256:")
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        return folder

    def encode(self, photos: ImageLike | Sequence[ImageLike], analyzer=None, choose="largest") -> Identity:
        """One person's photo or photos to an identity (see `idcore.systems.tiny_encode.encode_photos`)."""
        if self._other is not None:
            if analyzer is not None:
                raise InputError(f"{self.system.name} reads photos with its own preprocessing; leave the analyzer out")
            return self.system.encode(photos)
        from ..systems.tiny_encode import encode_photos

        return encode_photos(self.system, photos, analyzer, choose)

    def __call__(
        self,
        prompt: str | Sequence[str],
        identity: Identity | ImageLike | None = None,
        *,
        id_scale: float = 1.0,
        id_guidance_start: float = 0.0,
        id_guidance_end: float = 1.0,
        num_inference_steps: int = 4,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        backend: str | None = None,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Pictures of prompts.

        Args:
            prompt: one, or several. Known: the styles photo, pencil, oil, cartoon, sepia, night; ten background
                colours; neutral, smiling, surprised; front, left, right. What is not said stays as in the photo.
                The shipped weights follow backgrounds, pencil and night well, other styles faintly, expressions
                and poses hardly.
            identity: from `encode`, or a photo (encoded on the spot), or None: some person.
            id_scale: 0 leaves the identity out; between 0 and 1 its map is faded alike; above 1 only the attention
                grows. Usual range 0 to 2.
            id_guidance_start, id_guidance_end: when the identity acts; see `idcore.attach`.
            num_inference_steps: 1 to 100; the model is made for 4.
            seed: picture j of every prompt uses seed + j, or seed[j] of a list. The same seed gives the same
                picture in any batch (up to 1/255 per value where the batch changes the order of a sum).
            num_images_per_prompt: pictures per prompt.
            output_type: "pil", "np" (uint8 [N, 64, 64, 3]) or "pt" (float [N, 3, 64, 64] in 0..1).
            backend: backend of `id_attention` to insist on.

        Returns:
            len(prompts) * num_images_per_prompt pictures, prompt by prompt.

        Raises:
            InputError: an argument of the wrong kind; the text says which.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise InputError(
                f"prompt is a string or a list of strings, got {prompt!r:.80}; write what to draw in words"
            )
        seeds = _seeds(seed, num_images_per_prompt)
        if identity is not None and not isinstance(identity, Identity) and _scale(id_scale):
            identity = self.encode(identity)
        return self.draw(
            [Drawing(p, s, identity, id_scale) for p in prompts for s in seeds],
            id_guidance_start=id_guidance_start, id_guidance_end=id_guidance_end,
            num_inference_steps=num_inference_steps, output_type=output_type, backend=backend,
        )  # fmt: skip

    def draw(
        self,
        drawings: Sequence[Drawing],
        *,
        id_guidance_start: float = 0.0,
        id_guidance_end: float = 1.0,
        num_inference_steps: int = 4,
        output_type: str = "pil",
        backend: str | None = None,
        before_pass: Callable[[], None] | None = None,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Pictures that each have a prompt, seed, identity and scale of their own, up to 16 in one pass.

        Args:
            drawings: one per picture.
            id_guidance_start, id_guidance_end, num_inference_steps, output_type, backend: as in a call, for all.
            before_pass: called before each pass of the network; its exceptions end the drawing.

        Returns:
            A picture per drawing, the same as it gives alone (up to 1/255 per value).

        Raises:
            InputError: an argument of the wrong kind; the text says which.
        """
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f'output_type is "pil", "np" or "pt", got {output_type!r}')
        noise_levels(num_inference_steps)
        plan = StepSchedule(id_guidance_start, id_guidance_end, None, None, 1)
        acts = [bool(row[0]) for row in plan.factors(num_inference_steps)]
        jobs = [self._checked(d) for d in drawings]
        with self._lock, torch.no_grad():
            parts = [
                self._run(jobs[i : i + BATCH], acts, backend, before_pass or (lambda: None))
                for i in range(0, len(jobs), BATCH)
            ]
        return _output(torch.cat(parts), output_type)

    def _checked(self, d: Drawing) -> Drawing:
        """With a number as scale, and no identity where that is 0."""
        strength = _scale(d.id_scale)
        if d.identity is None or not strength:
            return d._replace(identity=None, id_scale=0.0)
        d.identity.require_system(self.system.name)
        if len(d.identity) != 1:
            raise InputError(f"the tiny pipeline draws one person a picture, got an identity of {len(d.identity)} rows")
        return d._replace(id_scale=strength)

    @contextlib.contextmanager
    def _attached(self, jobs: list[Drawing], backend: str | None) -> Iterator[tuple[Handle | None, object, Tensor]]:
        """(handle, scale, reference) of the people of a batch; those without one are somebody at scale 0."""
        size, n = self.model.config.size // 2, len(jobs)
        first = next((j.identity for j in jobs if j.identity is not None), None)
        if first is None:
            yield None, 0.0, self._idle(torch.zeros(n, self.model.reference_channels, size, size))
            return
        if all((j.identity, j.id_scale) == (first, jobs[0].id_scale) for j in jobs):
            people, scale, strengths = first, jobs[0].id_scale, [jobs[0].id_scale]
        else:
            people = Identity.batch([j.identity or first for j in jobs])
            strengths = [j.id_scale for j in jobs]
            scale = torch.tensor([strengths])
        if self._somebody is not None:
            reference = self._somebody
        else:
            faded = torch.tensor(strengths).clamp(max=1.0)[:, None, None, None]
            reference = torch.cat(self.model.reference(people.tokens.cpu()), 1) * faded
        with attach(self.unet, self.system, people, id_scale=scale, cfg=False, backend=backend) as handle:
            yield handle, scale, reference.expand(n, -1, -1, -1)

    def _idle(self, like: Tensor) -> Tensor:
        """The reference where nobody acts."""
        return torch.zeros_like(like) if self._somebody is None else self._somebody.expand_as(like)

    def _run(
        self, jobs: list[Drawing], acts: list[bool], backend: str | None, before_pass: Callable[[], None]
    ) -> Tensor:
        model = self.model
        text, pooled = model.text(model.tokenizer([j.prompt for j in jobs]))
        noise = seeded_noise([j.seed for j in jobs], (3, model.config.size, model.config.size))
        passes = iter(acts)
        with self._attached(jobs, backend) as (handle, scale, reference):

            def predict(x: Tensor, t: Tensor) -> Tensor:
                before_pass()
                act = next(passes)
                if handle is not None and not all(acts):
                    handle.scale(scale if act else 0.0)
                return model(x, t, text, pooled, reference if act else self._idle(reference))

            return sample(predict, noise, len(acts))


def _check_hash(path: Path, wanted: str | None) -> None:
    found = file_hash(path).removeprefix("sha256:")
    if wanted and found != wanted:
        raise WeightsError(
            f"{path} has SHA-256 {found[:16]}..., its config.json says {wanted[:16]}...: the file is damaged or from "
            "another training; install idcore again"
        )


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"num_images_per_prompt is a whole number from 1, got {count!r}")
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    if not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds):
        raise InputError(f"seed is a whole number from 0 or a list of them, got {seed!r}")
    if isinstance(seed, (list, tuple)):
        if len(seeds) != count:
            raise InputError(f"got {len(seeds)} seeds for num_images_per_prompt={count}; give one seed per picture")
        return seeds
    return [seeds[0] + j for j in range(count)]


def _scale(id_scale: float) -> float:
    ok = isinstance(id_scale, (int, float)) and not isinstance(id_scale, bool) and 0 <= id_scale <= 100
    if not ok:
        raise InputError(f"id_scale is a number from 0 (usually 0 to 2), got {id_scale!r}")
    return float(id_scale)


def _output(x: Tensor, kind: str) -> list[Image.Image] | np.ndarray | Tensor:
    x = (x * 0.5 + 0.5).clamp(0, 1)
    if kind == "pt":
        return x
    pictures = (x.permute(0, 2, 3, 1) * 255 + 0.5).to(torch.uint8).numpy()
    return pictures if kind == "np" else [Image.fromarray(p) for p in pictures]
