"""`idcore generate` on a diffusers base: SDXL through `IDPipeline`, SD 1.5 through diffusers' own pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, WeightsError
from .workflows import check_system, chosen_files, face_choice, preset_of

if TYPE_CHECKING:
    from PIL import Image

    from .generating import GenerateRequest
    from .identity import Identity

# Options that only SDXL's pipeline knows, with what they are when not given.
SDXL_ALONE = {"sampler": "auto", "runner": "eager", "quantize": None, "offload": None, "unet_weights": None}


def pictures_of_base(r: GenerateRequest, seeds: Sequence[int], done: Callable[[int], Any]) -> list[Image.Image]:
    """A picture per seed, one at a time: the same seed gives the same picture whatever the count.

    Args:
        r: the request; its base is a folder, or with `config` one file.
        seeds: of the pictures.
        done: called with 1 after each.
    """
    import torch

    if r.system == "tiny":
        raise InputError(
            'generate: system "tiny" works on the embedded model alone; drop --base, or name another system'
        )
    check_system(r.system)
    sd15 = _is_sd15(r)
    system, people = _people(r)
    draw = _sd15 if sd15 else _sdxl
    pictures = []
    with draw(r, system, people) as pipe:
        for seed in seeds:
            pictures += pipe(generator=torch.Generator("cpu").manual_seed(seed)).images
            done(1)
    return pictures


def _is_sd15(r: GenerateRequest) -> bool:
    path = Path(r.base)
    if r.config is not None:
        return False
    if not (path / "model_index.json").is_file():
        more = "; for one file with all weights give --config FOLDER too" if path.is_file() else ""
        raise WeightsError(
            f'generate: base must be "tiny" or a folder with an SDXL or SD 1.5 pipeline in diffusers\' layout; {path} '
            f"has no model_index.json{more}"
        )
    sd15 = '"StableDiffusionPipeline"' in (path / "model_index.json").read_text()
    given = [name for name, default in SDXL_ALONE.items() if getattr(r, name) != default]
    if sd15 and given:
        raise InputError(f"generate: {', '.join(given)} work with SDXL bases, {path} is SD 1.5; leave them out")
    return sd15


def _people(r: GenerateRequest) -> tuple[Any, list[Any]]:
    """The system, and who is to be drawn; (None, []) for nobody. A system is None where identities need none."""
    from .systems.loading import load_system, system_for

    people = r.people() or [p for p in [person_file(r)] if p is not None]
    if not people:
        if r.masks or r.layout is not None:
            raise InputError("generate: --mask and --layout say where people act, and --id gives none")
        return None, []
    found = [saved_person(p) for p in people]
    system = system_for(found if len(found) > 1 else found[0]) if all(f is not None for f in found) else None
    if system is not None:
        return system, found
    if r.weights is None and r.system == "auto" and all(getattr(f, "banks", ()) for f in found):
        return None, found
    names = ("weights", "vision", "parsing", "retinaface", "faces")
    photo = any(f is None for f in found)
    files = chosen_files(r.system, {n: getattr(r, n) for n in names}, for_photos=photo)
    system = load_system(**files, policy=face_choice(r.choose), preset=preset_of(r.system, r.preset), for_photos=photo)
    return system, [system.encode([p]) if f is None else f for p, f in zip(people, found, strict=True)]


def saved_person(path: Path) -> Identity | None:
    """A saved identity, or the words of a textual inversion file; None: a photo."""
    from .identity import Identity
    from .systems.sefi_files import is_sefi_file, load_tokens
    from .text.inversion import is_inversion, read_words

    if not is_saved(path):
        return None
    if is_sefi_file(path):
        return load_tokens(path)
    return read_words(path) if is_inversion(path) else Identity.load(path)


def is_saved(path: Path) -> bool:
    """Whether this is no photo."""
    return path.suffix == ".safetensors"


def person_file(r: GenerateRequest) -> Path | None:
    """`--weights` where they are a person by themselves (SeFi-IDE)."""
    from .systems.sefi_files import is_sefi_file

    if r.weights is None or not is_saved(r.weights):
        return None
    found = is_sefi_file(r.weights)
    if r.system == "sefi-ide" and not found:
        raise WeightsError(f"generate: {r.weights} holds no person of SeFi-IDE; train one, or name another --system")
    return r.weights if found else None


def require_placeholders(prompt: str, placeholders: Sequence[str]) -> None:
    """Raise InputError where a person that acts through the prompt is not in it."""
    from .text.placeholders import mentions

    for name in placeholders:
        if not mentions(prompt, [name]):
            raise InputError(
                f'generate: this identity acts through the prompt, which does not say {name}; write e.g. "a photo of '
                f'{name}", or name another word with --placeholder'
            )


def masks_of(r: GenerateRequest) -> Any:
    """A layout's text, or pictures, or None.

    Raises:
        InputError: both, or a file that is no picture.
    """
    if r.layout is not None and r.masks:
        raise InputError("generate: give --layout or --mask, not both")
    if not r.masks:
        return r.layout
    from .encoders.images import load_image

    return [load_image(m) for m in r.masks]


@contextlib.contextmanager
def _sdxl(r: GenerateRequest, system: Any, people: list[Any]) -> Iterator[Callable[..., Any]]:
    import functools

    import torch

    from .sampling.id_pipeline import IDPipeline

    device, by_prompt = "cuda" if torch.cuda.is_available() else "cpu", hasattr(system, "put_on")
    sampler = r.sampler if r.sampler != "auto" else "lightning" if r.steps <= 8 else "own"
    pipe = IDPipeline.from_pretrained(
        r.base, None if by_prompt else system, unet_weights=r.unet_weights, sampler=sampler, runner=r.runner,
        dtype=torch.float16 if device == "cuda" else torch.float32, device=None if r.offload else device,
        offload=r.offload, quantize=r.quantize, config=r.config,
    )  # fmt: skip
    pipe.pipe.set_progress_bar_config(desc="steps", leave=False, position=1)
    calls: dict[str, Any] = {
        "negative_prompt": r.negative or None, "num_inference_steps": r.steps, "guidance_scale": r.guidance,
        "width": r.width, "height": r.height,
    }  # fmt: skip
    with contextlib.ExitStack() as on:
        if by_prompt:
            _attach(on, r, pipe, system, people)
        elif people:
            if getattr(system, "lora_tensors", None):
                on.enter_context(system.lora(pipe.pipe))
            calls |= {
                "id_embeds": people, "id_scale": r.id_scale, "id_masks": masks_of(r), "id_guidance_start": r.id_start,
                "id_guidance_end": r.id_end,
            }  # fmt: skip
        yield functools.partial(pipe, r.prompt, **calls)


@contextlib.contextmanager
def _sd15(r: GenerateRequest, system: Any, people: list[Any]) -> Iterator[Callable[..., Any]]:
    import functools

    import torch
    from diffusers import StableDiffusionPipeline

    from .sampling.sdxl import few_step_scheduler

    cuda = torch.cuda.is_available()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            Path(r.base), local_files_only=True, torch_dtype=torch.float16 if cuda else torch.float32
        )
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"generate: {r.base} does not load as a StableDiffusionPipeline: {e}") from e
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1)
    pipe.to("cuda" if cuda else "cpu")
    if r.steps <= 8:
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    with contextlib.ExitStack() as on:
        if people:
            if getattr(system, "lora_tensors", None):
                on.enter_context(system.lora(pipe))
            _attach(on, r, pipe, system, people)
        yield functools.partial(
            pipe, r.prompt, negative_prompt=r.negative or None, num_inference_steps=r.steps, guidance_scale=r.guidance,
            width=r.width, height=r.height,
        )  # fmt: skip


def _attach(on: contextlib.ExitStack, r: GenerateRequest, pipe: Any, system: Any, people: list[Any]) -> None:
    from .attach import attach

    named = {} if r.placeholder is None else {"placeholder": r.placeholder}
    handle = attach(
        pipe, system, people if len(people) > 1 else people[0], id_scale=r.id_scale, id_mask=masks_of(r),
        id_guidance_start=r.id_start, id_guidance_end=r.id_end, **named,
    )  # fmt: skip
    on.enter_context(handle)
    require_placeholders(r.prompt, getattr(handle, "placeholders", ()))
