"""StyleForge (arXiv 2404.05256): a style is a word. What a style file says of its words, and how prompts use them.

Single-StyleForge knows one word for people and backgrounds alike. Multi-StyleForge knows two, trained together in one
model: one for people, one for backgrounds. How a prompt with both is written the paper does not say. Here:

    "a photo of [V] style, a man in a garden"               a person in the style
    "a photo of [W] style, a mountain lake"                 a place without people
    "a photo of [V] style, a man, [W] style, a garden"      both in one prompt; or, so that neither word reaches the
                                                            other's part: two prompts, the first inside the person's
                                                            mask and the second outside of it

The weights are a LoRA (`idcore.systems.lora.load_lora`), or a whole pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..errors import InputError, WeightsError

KEY = "idcore_style"  # of a LoRA file's metadata


@dataclass(frozen=True)
class StyleWords:
    """The words of a trained style.

    Attributes:
        style: as prompts say it ("[V] style"); of people, where `background` is another one.
        background: of places (Multi-StyleForge, "[W] style"), or "".
        template: of a whole prompt, with {style} and {content}.
    """

    style: str
    background: str = ""
    template: str = "a photo of {style}, {content}"

    def __post_init__(self) -> None:
        if not self.style.strip() or "{style}" not in self.template or "{content}" not in self.template:
            raise InputError(
                f"style words: wanted a word and a template with {{style}} and {{content}}, got {self.style!r} and "
                f"{self.template!r}"
            )

    def person(self, content: str) -> str:
        """A prompt in the style (of people)."""
        return self.template.format(style=self.style, content=content)

    def place(self, content: str) -> str:
        """A prompt in the style of backgrounds; the one style where there is no other."""
        return self.template.format(style=self.background or self.style, content=content)

    def both(self, person: str, place: str) -> str:
        """Both in one prompt. Raises InputError where the style has one word only."""
        if not self.background:
            raise InputError(f"style words: {self.style!r} is the only one; train people and backgrounds apart for two")
        return f"{self.person(person)}, {self.background}, {place}"

    def metadata(self) -> dict[str, str]:
        """For a LoRA file."""
        return {KEY: json.dumps(asdict(self))}


def style_words(metadata: Mapping[str, str]) -> StyleWords | None:
    """The words in a LoRA file's metadata; None where it is no style of this project.

    Raises:
        WeightsError: they are there and damaged.
    """
    if KEY not in metadata:
        return None
    try:
        return StyleWords(**json.loads(metadata[KEY]))
    except (ValueError, TypeError) as e:
        raise WeightsError(f"style file: its metadata {KEY} is damaged ({e}); train or fetch it again") from e
