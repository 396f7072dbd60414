"""`idcore train textual-inversion` and `idcore train dreambooth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    AllowChange,
    Change,
    PrintConfig,
    Resume,
    TrainBase,
    TrainConfig,
    TrainOut,
    arguments_of,
    tell,
)

Images = Annotated[
    list[Path] | None, typer.Option("--images", help="A photo of one person; again for more; or a folder of them.")
]
ClassWord = Annotated[str | None, typer.Option(help="What the photos show in one plain word: person, dog ...")]


def train_textual_inversion(
    images: Images = None,
    out: TrainOut = None,
    class_word: ClassWord = None,
    placeholder: Annotated[str | None, typer.Option(help='What prompts will say: "S*".')] = None,
    base: TrainBase = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Learn one person as a word's embedding (textual inversion, arXiv 2208.01618) from a few photos."""
    person = {"class_word": class_word, "placeholder": placeholder}
    arguments = arguments_of(out, config, base, resume, change, allow_change, print_config)
    _run("textual-inversion", arguments, images, person)


def train_dreambooth(
    images: Images = None,
    out: TrainOut = None,
    class_word: ClassWord = None,
    identifier: Annotated[str | None, typer.Option(help='What prompts say before the class word: "sks".')] = None,
    base: TrainBase = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Bind one person to a rare word (DreamBooth, arXiv 2208.12242) by LoRA, with prior preservation."""
    person = {"class_word": class_word, "identifier": identifier}
    arguments = arguments_of(out, config, base, resume, change, allow_change, print_config)
    _run("dreambooth", arguments, images, person)


def _run(command: str, arguments: Any, images: list[Path] | None, person: dict[str, str | None]) -> None:
    from .training.personal.command import run_command

    tell(run_command(command, arguments, images=images or [], person=person))
