"""The page of `idcore ui`, on gradio: nothing leaves this machine, no telemetry, no fonts or scripts from elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import IdcoreError, InputError, MissingDependencyError
from ..serving.requests import DrawRequest
from .studio import Drawn, Person, Studio

UPLOAD = "20mb"
SHOWN = 256  # smaller pictures are enlarged, for the eye alone
PROMPTS = {"tiny": "a photo of a person, blue background", "sdxl": "portrait, oil on canvas"}


def _gradio() -> Any:
    # Read when gradio is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as e:
        raise MissingDependencyError(f"idcore ui needs gradio ({e}); pip install 'idcore[ui]'") from e
    version = tuple(int(n) for n in gradio.__version__.split(".")[:2])
    if version < (6, 7):
        raise MissingDependencyError(
            f"idcore ui needs gradio 6.7 or newer (older ones can be made to read any file), {gradio.__version__} is "
            "installed; pip install -U 'idcore[ui]'"
        )
    return gradio


def _shown(drawn: list[Drawn]) -> list[tuple[Image.Image, str]]:
    return [(_large(d.picture), d.caption) for d in drawn]


def _large(picture: Image.Image) -> Image.Image:
    if max(picture.size) >= SHOWN:
        return picture
    factor = -(-SHOWN // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


class Enrolled(NamedTuple):
    """What the page shows of who was chosen."""

    person: Person | None
    previews: list[Image.Image]
    file: str | None  # the identity, to be downloaded
    message: str


NOBODY = Enrolled(None, [], None, "Nobody is chosen; pictures will show somebody.")


class Handlers:
    """What the page's events call; the last value of each is a message for the user."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def enrol(self, files: list[str] | None) -> Enrolled:
        """Photos chosen."""
        return self._person(lambda: self.studio.enrol(files)) if files else NOBODY

    def open(self, file: str | None) -> Enrolled:
        """An identity file chosen."""
        return self._person(lambda: self.studio.open(file)) if file else NOBODY

    def draw(
        self, person: Person | None, prompt: str, id_scale: float, start: float, end: float, steps: float, seed: float,
        count: float, negative: str = "", guidance: float = 1.0, width: float = 0, height: float = 0,
    ) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:  # fmt: skip
        """(gallery, message), each time that more pictures are done."""
        people = () if person is None else (person.identity,)
        scales = (float(id_scale),) * len(people)
        request = DrawRequest(
            prompt or "", negative or "", people, scales, None, int(seed or 0), int(count), int(steps), float(guidance),
            int(width or 0) or None, int(height or 0) or None, float(start), float(end),
        )  # fmt: skip
        try:
            for drawn in self.studio.draw(request, person):
                yield _shown(drawn), f"{len(drawn)} of {request.count} drawn."
        except IdcoreError as e:
            yield [], str(e)

    def _person(self, make: Any) -> Enrolled:
        try:
            person = make()
            return Enrolled(person, list(person.previews), str(self.studio.save(person)), person.about)
        except IdcoreError as e:
            return NOBODY._replace(message=str(e))


def build(studio: Studio) -> Any:
    """The page as gradio.Blocks.

    Raises:
        MissingDependencyError: gradio is not installed, or too old.
    """
    gr = _gradio()
    do, sdxl = Handlers(studio), studio.engine.name != "tiny"
    with gr.Blocks(title="idcore", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.Markdown("## idcore: a person's identity in generated pictures")
        person = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                # Raw files, not pictures: they are decoded by our own loader alone, with its limits.
                photos = gr.File(
                    label="One or several photos of one person", file_count="multiple", height=140,
                    file_types=[".jpg", ".jpeg", ".png", ".webp"], elem_id="photos",
                )  # fmt: skip
                previews = gr.Gallery(label="Who", columns=2, height=230, object_fit="contain", buttons=[])
                with gr.Row():
                    opened = gr.UploadButton("Load identity", file_types=[".safetensors"], size="sm", min_width=100)
                    saved = gr.DownloadButton("Save identity", size="sm", min_width=100, elem_id="save")
                said = gr.Textbox(label="Message", interactive=False, lines=2, elem_id="message")
            with gr.Column(scale=3, min_width=500):
                with gr.Row():
                    prompt = gr.Textbox(
                        PROMPTS["sdxl" if sdxl else "tiny"], label="Prompt", scale=5, max_length=2000, elem_id="prompt"
                    )
                    go = gr.Button("Draw", variant="primary", elem_id="draw", scale=1, min_width=100)
                sliders = _sliders(gr, sdxl, studio)
                gallery = gr.Gallery(
                    label="Pictures", columns=4, height=500, format="png", object_fit="contain",
                    buttons=["download", "fullscreen"], elem_id="pictures",
                )  # fmt: skip
        gr.Markdown(studio.about)
        private = {"api_visibility": "private"}
        photos.change(do.enrol, photos, [person, previews, saved, said], concurrency_limit=1, **private)
        opened.upload(do.open, opened, [person, previews, saved, said], concurrency_limit=1, **private)

        one = {"concurrency_limit": 1, "concurrency_id": "draw"}
        for event in (go.click, prompt.submit):
            event(do.draw, [person, prompt, *sliders], [gallery, said], **one, **private)
    return page.queue(max_size=16, api_open=False)


def _sliders(gr: Any, sdxl: bool, studio: Studio) -> list[Any]:
    """In the order of `Handlers.draw`'s arguments."""
    with gr.Row():
        controls = [
            gr.Slider(0, 3, 0.8 if sdxl else 1.0, step=0.05, label="Identity's strength"),
            gr.Slider(0, 0.95, 0, step=0.05, label="Start of the identity"),
            gr.Slider(0.05, 1, 1, step=0.05, label="End of the identity"),
        ]
    with gr.Row():
        controls += [
            gr.Slider(1, 50, 4, step=1, label="Steps"),
            gr.Number(0, precision=0, minimum=0, maximum=2**53, label="Seed of the first picture"),
            gr.Slider(1, 16, 1 if sdxl else 8, step=1, label="Pictures"),
        ]
    if not sdxl:
        return controls
    side = studio.engine.pipe.unet.config.sample_size * studio.engine.pipe.pipe.vae_scale_factor
    with gr.Row():
        return controls + [
            gr.Textbox("", label="Negative prompt", max_length=2000, scale=3),
            gr.Slider(1, 10, 1.2, step=0.1, label="Guidance (1: none)"),
            gr.Number(side, precision=0, label="Width", min_width=80),
            gr.Number(side, precision=0, label="Height", min_width=80),
        ]


def launch(
    studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False, block: bool = True
) -> Any:
    """Serve the page; returns it once it runs (`block=False`) or when it ends.

    Args:
        studio: what it works with.
        host: address to listen on; there is no authentication.
        port: None: the first free one from 7860.
        open_browser: show it.
        block: stay until interrupted.

    Raises:
        InputError: the address is taken, or none of this machine.
    """
    gr = _gradio()
    page = build(studio)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        page.launch(
            server_name=host, server_port=port, share=False, inbrowser=open_browser, prevent_thread_lock=True,
            max_file_size=UPLOAD, enable_monitoring=False, ssr_mode=False, footer_links=[], run_history=False,
            theme=gr.themes.Default(**fonts), strict_cors=True, quiet=True,
        )  # fmt: skip
    except OSError as e:
        raise InputError(f"cannot listen on {host}:{port or 'any port'} ({e}); choose another --port or --host") from e
    print(f"idcore ui: {page.local_url}   (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if block:
        page.block_thread()
    return page


def run_ui(*, host: str, port: int | None, open_browser: bool, **engine: str | Path | None) -> None:
    """`idcore ui`: arguments of `serving.load_engine`, then serve until interrupted."""
    from ..serving.engines import load_engine

    _gradio()
    launch(Studio(load_engine(**engine)), host=host, port=port, open_browser=open_browser)
