"""Who is drawn by `idcore generate`: people of one system, or of several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, WeightsError
from .photos import telling_faces
from .results import is_result, read_result
from .workflows import chosen_files, face_choice, preset_of

if TYPE_CHECKING:
    from .generating import GenerateRequest
    from .identity import Identity

BY_STAGES = "sefi-ide"


@dataclass(frozen=True)
class Party:
    """People that are attached together.

    Attributes:
        system: what `idcore.attach` takes; None where the identities hold their keys and values.
        people: their identities.
        places: which of all people they are.
        by_prompt: whether they act through the prompt.
    """

    system: Any
    people: list[Identity]
    places: list[int]
    by_prompt: bool

    @property
    def by_stages(self) -> bool:
        return self.by_prompt and self.people[0].system == BY_STAGES


def parties_of(r: GenerateRequest, say: Callable[[str], Any] = lambda text: None) -> list[Party]:
    """Those of a request, in the order of `--id`: photos are encoded by `--system`; saved people bring their own.
    `say` gets a line per photo with several faces.

    Raises:
        InputError: people of two systems in the attention, or masks for nobody.
        WeightsError: a system's weights are missing.
    """
    files = r.people() or [p for p in [person_file(r)] if p is not None]
    if not files:
        if r.masks or r.layout is not None:
            raise InputError(f"{r.command}: --mask and --layout say where people act, and --id gives none")
        return []
    found = [saved_person(p) for p in files]
    system = system_of(r, found)
    with telling_faces(say):
        return grouped([system.encode([p]) if f is None else f for p, f in zip(files, found, strict=True)], system)


def grouped(people: Sequence[Identity], system: Any = None) -> list[Party]:
    """People by the system that puts them on a pipeline.

    Args:
        people: all of them.
        system: for those that act in the attention; None: their own keys and values.

    Raises:
        InputError: people of two systems in the attention.
    """
    from .systems.loading import system_for

    by: dict[str, list[int]] = {}
    for i, person in enumerate(people):
        own = system_for(person)
        by.setdefault(f"prompt {own.name}" if own is not None else f"attention {person.system}", []).append(i)
    inside = [k.removeprefix("attention ") for k in by if k.startswith("attention ")]
    if len(inside) > 1:
        raise InputError(
            f"people of {' and '.join(inside)} both act in the attention, with weights of their own; encode "
            "all photos with one of them (people of DreamIdentity and SeFi-IDE may be beside it), or use idcore.attach "
            "twice"
        )
    parties = []
    for key, places in by.items():
        mine, by_prompt = [people[i] for i in places], key.startswith("prompt ")
        parties.append(Party(system_for(mine) if by_prompt else system, mine, places, by_prompt))
    return parties


def placeholders_of(parties: Sequence[Party], given: str | Sequence[str] | None) -> dict[int, str]:
    """What the prompt calls the people that act through it, by their places among all people.

    Args:
        parties: of all people.
        given: one per such person, in the order of `--id`; None: what their files name.

    Raises:
        InputError: another number of words, or one word for two people.
    """
    from .systems.sefi_files import PLACEHOLDER as BY_STAGES_NAME
    from .systems.words import PLACEHOLDER

    named = [(i, p, party.by_stages) for party in parties if party.by_prompt for i, p in _placed(party)]
    named.sort(key=lambda n: n[0])
    if given is None:
        names = [str(p.meta.get("placeholder") or (BY_STAGES_NAME if s else PLACEHOLDER)) for _, p, s in named]
    else:
        names = [given] if isinstance(given, str) else list(given)
    if len(names) != len(named) or len(set(names)) != len(names):
        raise InputError(
            f"{len(named)} people act through the prompt and need as many different words there, got "
            f"{', '.join(names) or 'none'}; name them in the order of --id: --placeholder A* --placeholder B*"
        )
    return {i: name for (i, _, _), name in zip(named, names)}


def _placed(party: Party) -> list[tuple[int, Identity]]:
    return list(zip(party.places, party.people, strict=True))


def system_of(r: GenerateRequest, found: Sequence[Identity | None]) -> Any:
    """What encodes the photos and puts people into the attention; None where nothing is left to do for it."""
    from .systems.loading import load_system, system_for

    photo = any(f is None for f in found)
    in_attention = [f for f in found if f is not None and system_for(f) is None]
    _check_base_of(r, photo, in_attention)
    if not photo and (not in_attention or _banked(r, in_attention)):
        return None
    names = ("weights", "vision", "parsing", "retinaface", "faces")
    files = chosen_files(r.system, {n: getattr(r, n) for n in names}, for_photos=photo)
    return load_system(**files, policy=face_choice(r.choose), preset=preset_of(r.system, r.preset), for_photos=photo)


def _check_base_of(r: GenerateRequest, photo: bool, in_attention: Sequence[Identity]) -> None:
    """What the name of the base tells before any weights are looked for."""
    from .generating import is_tiny_sd

    if any(p.system == "tiny" for p in in_attention):
        raise InputError(
            f"{r.command}: an identity of the embedded model (`idcore encode` without --system) is drawn by --base "
            "tiny alone; leave --base out, or encode the photo for this base: idcore encode PHOTO --system pulid-v1.1"
        )
    if photo and is_tiny_sd(r.base) and r.system == "auto" and r.weights is None:
        learned = "--id RUN/model"
        if r.command == "evaluate":
            learned = "copy RUN/model/person.safetensors beside the photo, under its name (me.jpg, me.safetensors)"
        raise InputError(
            f"{r.command}: nothing that ships reads a photo for tiny-sd. Learn the person first: idcore train sefi-ide "
            f"--images PHOTO --class-word person --out RUN, then {learned}; or train an encoder (dreamidentity, "
            "pulid --base tiny-sd) and give --system RUN/model"
        )


def _banked(r: GenerateRequest, people: Sequence[Identity]) -> bool:
    return r.weights is None and r.system == "auto" and all(p.banks for p in people)


def saved_person(path: Path) -> Identity | None:
    """A saved identity, or the words of a textual inversion file, or what a training of one person left; None: a
    photo."""
    from .identity import Identity
    from .systems.sefi_files import is_sefi_file, load_tokens
    from .text.inversion import is_inversion, read_words

    if not is_saved(path):
        return None
    path = person_path(path)
    if is_sefi_file(path):
        return load_tokens(path)
    return read_words(path) if is_inversion(path) else Identity.load(path)


def is_saved(path: Path) -> bool:
    """Whether this is no photo."""
    return path.suffix == ".safetensors" or is_result(path)


def person_path(path: Path) -> Path:
    """The weights of a result folder; any other path unchanged."""
    return path / read_result(path).weights if is_result(path) else path


def person_file(r: GenerateRequest) -> Path | None:
    """`--weights` where they are a person by themselves (SeFi-IDE)."""
    from .systems.sefi_files import is_sefi_file

    if r.weights is None or not is_saved(r.weights):
        return None
    found = is_sefi_file(r.weights)
    if r.system == BY_STAGES and not found:
        raise WeightsError(f"{r.command}: {r.weights} holds no person of SeFi-IDE; train one, or name another --system")
    return r.weights if found else None


def require_placeholders(prompt: str, placeholders: Sequence[str]) -> None:
    """Raise InputError where a person that acts through the prompt is not in it."""
    from .text.placeholders import mentions

    for name in placeholders:
        if not mentions(prompt, [name]):
            raise InputError(
                f'this identity acts through the prompt, which does not say {name}; write e.g. "a photo of '
                f'{name}", or name another word with --placeholder'
            )
