"""What `idcore train styleforge` does with its arguments."""

from __future__ import annotations

from pathlib import Path

from ..commands import TrainArguments, run_training
from .config import StyleForgeConfig, load_config


def run_command(
    given: TrainArguments,
    *,
    style_ref: Path | None = None,
    aux: Path | None = None,
    people: Path | None = None,
    backgrounds: Path | None = None,
    multi: bool = False,
) -> list[str]:
    """Train; returns the lines for standard output. See `idcore train styleforge --help` for the arguments.

    Raises:
        InputError: pictures or settings are missing or do not fit.
    """

    def train(settings: StyleForgeConfig, out: Path) -> Path:
        from .run import StyleData, split_style_ref, train_styleforge

        data = StyleData(style_ref, aux, people, backgrounds)
        if multi and not data.multi:
            data = split_style_ref(settings, data, given.say)
        return train_styleforge(
            settings, data, out, resume=given.resume, allow_change=given.allow_change, say=given.say
        )

    settings = load_config(given.config, given.changes, given.base)
    prompt = settings.style_words(False).person("a man in a garden")
    lora = f"--style {{made}} --base {settings.model.base}"
    style = "--base {made}/pipeline" if settings.tune.weights == "full" else lora
    use = f'idcore generate {style} --prompt "{prompt}" --out pictures'
    return run_training("styleforge", given, settings, train, use=use)
