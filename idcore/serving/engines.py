"""One interface over the embedded model and SDXL: people from photos, and batches of requests that share a pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from ..errors import InputError
from ..identity import Identity
from .batcher import Stopped
from .requests import DrawRequest, by_request, check_person, check_request, people_of, region_masks

if TYPE_CHECKING:
    from ..sampling.id_pipeline import IDPipeline
    from ..sampling.tiny_pipeline import TinyPipeline

MAX_SIDE = 2048


class Engine(Protocol):
    """What `Batcher` and an app need. `draw` may run in one thread at a time, `encode` beside it."""

    name: str

    def encode(self, photos: Sequence[Any]) -> Identity:
        """Photos (whatever `idcore.load_image` takes) of one person."""
        ...

    def check_person(self, identity: Identity) -> None:
        """Raises InputError where this engine cannot draw an identity."""
        ...

    def check(self, request: DrawRequest) -> None:
        """Raises InputError where a request cannot be drawn, before it waits for its turn."""
        ...

    def key(self, request: DrawRequest) -> Hashable:
        """Requests of equal keys may be drawn in one batch."""
        ...

    def draw(self, requests: Sequence[DrawRequest], stop: Callable[[], bool]) -> list[list[Image.Image]]:
        """The pictures of every request of a batch; see `Batcher`'s run."""
        ...


class TinyEngine:
    """The embedded model: 64x64 pictures of one person each."""

    def __init__(self, pipe: TinyPipeline | None = None) -> None:
        from ..sampling.tiny_pipeline import TinyPipeline

        self.pipe = pipe or TinyPipeline.from_package()
        self.name, self.side = "tiny", self.pipe.model.config.size

    def encode(self, photos: Sequence[Any]) -> Identity:
        return self.pipe.encode(list(photos))

    def check_person(self, identity: Identity) -> None:
        check_person(identity, self.pipe.system)
        shape = self.pipe.system.position.shape
        if identity.tokens.shape[1:] != shape:
            raise InputError(
                f"identities of this model have {list(shape)} tokens, got {list(identity.tokens.shape[1:])}"
            )

    def check(self, request: DrawRequest) -> None:
        check_request(request, (self.side, self.side))
        if len(request.people) > 1 or request.regions:
            raise InputError(
                f"the embedded model draws one person per picture, got {len(request.people)}"
                f"{' and regions' if request.regions else ''}; mix identities into one, or serve SDXL"
            )
        if request.negative or request.guidance > 1:
            raise InputError("the embedded model has no negative prompt and no guidance; leave both out, or serve SDXL")

    def key(self, request: DrawRequest) -> Hashable:
        return request.steps, request.start, request.end

    def draw(self, requests: Sequence[DrawRequest], stop: Callable[[], bool]) -> list[list[Image.Image]]:
        from ..sampling.tiny_pipeline import Drawing

        drawings = [
            Drawing(r.prompt, r.seed + i, r.people[0] if r.people else None, r.scales[0] if r.people else 0.0)
            for r in requests
            for i in range(r.count)
        ]
        first = requests[0]
        pictures = self.pipe.draw(
            drawings, num_inference_steps=first.steps, id_guidance_start=first.start, id_guidance_end=first.end,
            before_pass=lambda: _check_stop(stop),
        )  # fmt: skip
        return by_request(pictures, requests)


class SdxlEngine:
    """An `IDPipeline`; people with their regions, guidance, any size that the UNet takes."""

    def __init__(self, pipe: IDPipeline, max_side: int = MAX_SIDE) -> None:
        self.pipe, self.name, self.max_side = pipe, "sdxl", max_side
        pipe.pipe.set_progress_bar_config(disable=True)

    def encode(self, photos: Sequence[Any]) -> Identity:
        return self.pipe.encode(list(photos))

    def check_person(self, identity: Identity) -> None:
        if self.pipe.system is None:
            raise InputError("this pipeline was loaded without an identity system; load one, e.g. idcore.PuLID")
        check_person(identity, self.pipe.system)

    def check(self, request: DrawRequest) -> None:
        from ..sampling.sdxl_job import picture_size

        height, width = picture_size(self.pipe.pipe, request.height, request.width)
        check_request(request, None)
        if max(height, width) > self.max_side:
            raise InputError(f"width and height may be up to {self.max_side}, got {width}x{height}")
        if request.regions is not None:
            region_masks(request)

    def key(self, request: DrawRequest) -> Hashable:
        from ..sampling.sdxl_job import picture_size

        size = picture_size(self.pipe.pipe, request.height, request.width)
        kinds = [(p.tokens.shape[1:], p.uncond_tokens is None, p.meta.get("encoder"), p.system) for p in request.people]
        # People of one kind may be in any number: those who are missing are somebody at scale 0.
        people = kinds[0] if len(set(kinds)) == 1 else tuple(kinds)
        return size, request.steps, max(request.guidance, 1.0), request.start, request.end, people

    def draw(self, requests: Sequence[DrawRequest], stop: Callable[[], bool]) -> list[list[Image.Image]]:
        first, each = requests[0], [r for r in requests for _ in range(r.count)]
        people, how = people_of(each)

        def after_pass(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
            _check_stop(stop)
            return tensors

        generators = [torch.Generator().manual_seed(r.seed + i) for r in requests for i in range(r.count)]
        # A recorded loop has no place between its passes.
        watch = {} if self.pipe.runner == "graph" else {"callback_on_step_end": after_pass}
        pictures = self.pipe(
            [r.prompt for r in each], [r.negative for r in each], id_embeds=people or None, **how,
            id_guidance_start=first.start, id_guidance_end=first.end, num_inference_steps=first.steps,
            guidance_scale=first.guidance, height=first.height, width=first.width, generator=generators, **watch,
        ).images  # fmt: skip
        return by_request(pictures, requests)


def load_engine(
    base: str = "tiny",
    *,
    system: str = "auto",
    weights: Path | None = None,
    vision: Path | None = None,
    parsing: Path | None = None,
    retinaface: Path | None = None,
    faces: str = "embedded",
    preset: str | None = None,
    unet: Path | None = None,
    device: str | None = None,
    for_photos: bool = True,
) -> Engine:
    """An engine from what the command line's users give.

    Args:
        base: "tiny", a folder of `idcore train tiny`, or one with an SDXL pipeline.
        system, weights, vision, parsing, retinaface, faces, preset: as in `idcore generate`.
        unet: SDXL: a file with a whole UNet in place of the base's, e.g. SDXL-Lightning's.
        for_photos: SDXL: whether photos will be encoded; False serves saved identities without face models.
        device: SDXL: default CUDA in float16 where it is usable, else the CPU in float32.

    Raises:
        InputError: options that do not fit together.
        WeightsError: something is missing or damaged.
    """
    from ..generating import is_tiny

    if is_tiny(base):
        from ..sampling.tiny_pipeline import TinyPipeline

        if system not in ("auto", "tiny") or weights is not None or unet is not None:
            raise InputError(
                f'base "{base}" is an embedded model with a system of its own; leave out system, weights and unet, or '
                "name a folder with SDXL as base"
            )
        return TinyEngine(TinyPipeline.from_package() if base == "tiny" else TinyPipeline.from_folder(base))
    from ..sampling.id_pipeline import IDPipeline
    from ..sampling.loading import check_base
    from ..systems.loading import load_system
    from ..workflows import chosen_files

    check_base(base)
    files = {"weights": weights, "vision": vision, "parsing": parsing, "retinaface": retinaface, "faces": faces}
    loaded = load_system(**chosen_files(system, files, for_photos=for_photos), preset=preset, for_photos=for_photos)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = IDPipeline.from_pretrained(base, loaded, unet_weights=unet, dtype=dtype, device=device)
    if getattr(loaded, "lora_tensors", None):
        loaded.lora(pipe.pipe)
    return SdxlEngine(pipe)


def _check_stop(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped
