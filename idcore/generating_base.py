"""`idcore generate` on a diffusers base: SDXL through `IDPipeline`, SD 1.5 through diffusers' own pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, WeightsError
from .generating_people import Party, parties_of, placeholders_of, require_placeholders
from .generating_regions import Named, masks_of, person_region, texts_of
from .workflows import check_system

if TYPE_CHECKING:
    from PIL import Image

    from .generating import GenerateRequest

# Options that only SDXL's pipeline knows, with what they are when not given.
SDXL_ALONE = {"sampler": "auto", "runner": "eager", "quantize": None, "offload": None, "unet_weights": None}
SDXL_SIZE = {"width": 768, "height": 1024}
Draw = Callable[[int], "Image.Image"]


def pictures_of_base(
    r: GenerateRequest,
    seeds: Sequence[int],
    done: Callable[[Image.Image | None, bool], Any],
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """A picture per seed, one at a time: the same seed gives the same picture whatever the count.

    Args:
        r: the request; its base is "tiny-sd", a folder, or with `config` one file.
        seeds: of the pictures.
        done: called with None before the first, then with each picture, and whether it is one without the styles.
        say: gets a line per photo with several faces.

    Returns:
        The pictures; and where `r.compare` is set the same without the styles, else none.
    """
    from .generating_likeness import check_photos

    if r.system == "tiny":
        raise InputError(
            f'{r.command}: system "tiny" works on the embedded model alone; drop --base, or name another system'
        )
    check_system(r.system)
    opens = opener(r)
    parties = parties_of(r, say)
    check_photos(r)
    artist = Artist(r, next((p.system for p in parties if not p.by_prompt), None), opens)
    masks = masks_of(r, sum(len(p.people) for p in parties))
    rounds: list[list[Image.Image]] = [[], []]
    for made in rounds if r.compare else rounds[:1]:
        with artist.scene(r.prompt, parties, masks) as draw:
            done(None, False)
            for seed in seeds:
                made.append(draw(seed))
                done(made[-1], made is rounds[1])
        artist.drop_styles()
    return rounds[0], rounds[1]


class Artist:
    """A base model, opened once, with its styles on it.

    Args:
        r: base, styles and how to draw; its prompt and people are given to `scene`.
        system: of the people that act in the attention, or None.
        opens: of `opener`, where that was asked before.
        sized: where the request names no size: SDXL's default of `idcore generate`; False: the UNet's own.

    Raises:
        InputError, WeightsError: what was asked for does not fit, or is not there.
    """

    def __init__(
        self, r: GenerateRequest, system: Any = None, opens: Callable | None = None, *, sized: bool = True
    ) -> None:
        from .generating_styles import styles_on

        _check_size(r)
        self.request = r
        self.pipe = (opens or opener(r))(r, system)
        self.is_sdxl = hasattr(self.pipe, "pipe")
        self.size = SDXL_SIZE if self.is_sdxl and sized else dict.fromkeys(SDXL_SIZE)
        self.styles = styles_on(self.pipe, r.styles, r.style_scale)

    def drop_styles(self) -> None:
        """Draw without styles from now on."""
        self.styles.close()

    @contextlib.contextmanager
    def scene(self, prompt: str, parties: Sequence[Party], masks: Sequence[Any] = ()) -> Iterator[Draw]:
        """People put on for one prompt; gives a function from a seed to a picture.

        Args:
            prompt: names people that act through it.
            parties: the people.
            masks: one per person or None; () for none at all.
        """
        r = self.request
        masks = list(masks) or [None] * sum(len(p.people) for p in parties)
        names = placeholders_of(parties, r.placeholder)
        with contextlib.ExitStack() as on:
            calls, named = {}, []
            for party in parties:
                if party.by_prompt:
                    named += self._name(on, prompt, party, names, masks)
                else:
                    calls |= self._put_on(on, party, [masks[i] for i in party.places], r.scales(party.places))
            texts = texts_of(prompt, named)
            if texts.others:
                from .systems.region_text import attach_texts

                on.enter_context(attach_texts(self.pipe, [t for t, _ in texts.others], [m for _, m in texts.others]))
            passes = list(texts.passes)
            if r.background is not None:
                passes.append((r.background, 1 - person_region(r, masks)))
            if passes:
                from .systems.region_passes import attach_passes

                on.enter_context(attach_passes(self.pipe, [t for t, _ in passes], [m for _, m in passes]))
            yield lambda seed: self._draw(texts.prompt, seed, calls)

    def _name(
        self, on: contextlib.ExitStack, prompt: str, party: Party, names: dict[int, str], masks: Sequence[Any]
    ) -> list[Named]:
        """Put on people that act through the prompt."""
        from .attach import attach
        from .systems.words import CLASS_WORD

        r, alone = self.request, len(masks) == len(party.people)
        scales = sorted(set(r.scales(party.places)))
        # One number for people of several systems is that of the attention: words act, or do not.
        scale = scales[0] if alone or not isinstance(r.id_scale, (int, float)) else float(scales[0] != 0)
        if len(scales) > 1:
            raise InputError(f"{r.command}: people of {party.system.name} have one strength, 1 or 0, got {scales}")
        when = {"id_guidance_start": r.id_start, "id_guidance_end": r.id_end} if alone else {}
        mine = [names[i] for i in party.places]
        on.enter_context(attach(self.pipe, party.system, party.people, id_scale=scale, placeholder=mine, **when))
        require_placeholders(prompt, mine)
        plain = [str(p.meta.get("class_word") or CLASS_WORD) for p in party.people]
        return [Named(n, c, masks[i], party.by_stages) for n, c, i in zip(mine, plain, party.places, strict=True)]

    def _put_on(self, on: contextlib.ExitStack, party: Party, masks: list[Any], scales: list[float]) -> dict[str, Any]:
        """Put on people that act in the attention; what each call must be told of them."""
        from .attach import attach

        r, people = self.request, party.people
        if getattr(party.system, "lora_tensors", None):
            on.enter_context(party.system.lora(getattr(self.pipe, "pipe", self.pipe)))
        how = {"id_guidance_start": r.id_start, "id_guidance_end": r.id_end}
        where, scale = (
            (None if all(m is None for m in masks) else masks),
            scales[0] if len(set(scales)) == 1 else scales,
        )
        if self.is_sdxl:
            return {"id_embeds": people, "id_scale": scale, "id_masks": where, **how}
        on.enter_context(attach(self.pipe, party.system, people, id_scale=scale, id_mask=where, **how))
        return {}

    def _draw(self, prompt: str, seed: int, calls: dict[str, Any]) -> Image.Image:
        import torch

        r = self.request
        return self.pipe(
            prompt, negative_prompt=r.negative or None, num_inference_steps=r.steps, guidance_scale=r.guides(),
            generator=torch.Generator("cpu").manual_seed(seed), **self._size(), **calls,
        ).images[0]  # fmt: skip

    def _size(self) -> dict[str, Any]:
        """What each call is told of the picture's size."""
        return {n: getattr(self.request, n) or default for n, default in self.size.items()}


def _check_size(r: GenerateRequest) -> None:
    for name in SDXL_SIZE:
        value = getattr(r, name)
        if value is not None and (value < 8 or value % 8):
            near = max(8, round(value / 8) * 8)
            raise InputError(f"{r.command}: --{name} is a multiple of 8 pixels, got {value}; give {near}")


def opener(r: GenerateRequest) -> Callable[[GenerateRequest, Any], Any]:
    """What opens the request's base; nothing large is read yet.

    Raises:
        WeightsError: no base. InputError: options that it lacks.
    """
    from .generating import is_tiny_sd

    path = Path(r.base)
    if r.config is not None:
        return _sdxl
    if is_tiny_sd(r.base):
        _refuse_sdxl_alone(r, r.base)
        return _tiny_sd
    if not (path / "model_index.json").is_file():
        more = "; for one file with all weights give --config FOLDER too" if path.is_file() else ""
        raise WeightsError(
            f'{r.command}: base must be "tiny", "tiny-sd" or a folder with an SDXL or SD 1.5 pipeline in diffusers\' '
            f"layout; {path} has no model_index.json{more}"
        )
    if '"StableDiffusionPipeline"' not in (path / "model_index.json").read_text():
        return _sdxl
    _refuse_sdxl_alone(r, path)
    return _sd15


def _refuse_sdxl_alone(r: GenerateRequest, base: Any) -> None:
    given = [name for name, default in SDXL_ALONE.items() if getattr(r, name) != default]
    if given:
        raise InputError(
            f"{r.command}: {', '.join(given)} work with SDXL bases, {base} is SD 1.x or 2.x; leave them out"
        )


def _sdxl(r: GenerateRequest, system: Any) -> Any:
    import torch

    from .sampling.id_pipeline import IDPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = r.sampler if r.sampler != "auto" else "lightning" if r.steps <= 8 else "own"
    pipe = IDPipeline.from_pretrained(
        r.base, system, unet_weights=r.unet_weights, sampler=sampler, runner=r.runner,
        dtype=torch.float16 if device == "cuda" else torch.float32, device=None if r.offload else device,
        offload=r.offload, quantize=r.quantize, config=r.config,
    )  # fmt: skip
    pipe.pipe.set_progress_bar_config(desc="steps", leave=False, position=1)
    return pipe


def _sd15(r: GenerateRequest, system: Any) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    from .sampling.loading import dtype_option
    from .sampling.sdxl import few_step_scheduler

    cuda = torch.cuda.is_available()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            Path(r.base), local_files_only=True, **dtype_option(torch.float16 if cuda else torch.float32)
        )
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"{r.command}: {r.base} does not load as a StableDiffusionPipeline: {e}") from e
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1)
    pipe.to("cuda" if cuda else "cpu")
    if r.steps <= 8:
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    return pipe


def _tiny_sd(r: GenerateRequest, system: Any) -> Any:
    from .generating import TINY_SD
    from .sampling.tiny_sd import PACKAGE_FOLDER, tiny_sd

    pipe = tiny_sd(PACKAGE_FOLDER if r.base == TINY_SD else r.base)
    pipe.set_progress_bar_config(disable=True)
    return pipe
