"""SeFi-IDE ("Beyond Inserting", arXiv 2402.00631): one person as a pair of learned words per stage of the denoising.

Section on semantic-fidelity token optimisation: the 1000 training timesteps fall into five equal stages; each has a
word P_K for the keys and a word P_V for the values of all cross-attention layers. K comes from the prompt with P_K and
V from the prompt with P_V, each through the frozen text encoders. A small network expands one word to the ten. U-Net,
text encoders and autoencoder are frozen; what is learned of a person is a small file (`idcore.systems.sefi_files`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idcore.attention.sites import find_sites, unwrap
from idcore.attention.stack import IdStack, stack_of
from idcore.attention.staged import AttentionLoss, StagedText, check_stages, joined_text, narrow_to_reference
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.sefi_files import NAME, PLACEHOLDER, people_of, stages_of
from idcore.systems.stage_expander import StageExpander
from idcore.systems.words import CLASS_WORD, encode_with_words, placeholders_of, split_words, word_scale
from idcore.text.placeholders import Words, replaced
from idcore.text.reader import TextPart, components_of, put_on, take_off, text_parts
from idcore.text.staged_prompts import StagedPerson, StagedPrompts

STAGES = 5


class SeFiIDE:
    """Puts people made of stage words on a pipeline; needs no weights of its own."""

    name = NAME

    def put_on(
        self,
        pipe: Any,
        identity: Any,
        *,
        id_scale: Any = 1.0,
        placeholder: Any = None,
        class_word: str | None = None,
        backend: str | None = None,
    ) -> SeFiHandle:
        """What `idcore.attach` calls.

        Args:
            pipe: A diffusers pipeline (SD 1.x, SD 2.x, SDXL), or an `IDPipeline`.
            identity: An `Identity` of SeFi-IDE, or a list of them with as many stages: several people in one prompt.
            id_scale: 1; or 0: the placeholder is read as the class word.
            placeholder: What prompts say; one per identity. Default: what the identity's meta names, else "V*".
            class_word: What a plain prompt would say ("person"), for the reference encoding. Default: the identity's.
            backend: Of `id_attention`, to insist on.

        Raises:
            InputError: no pipeline with a UNet and text encoders, words of another width, or a placeholder that is
                taken.
        """
        people = people_of(identity)
        names = placeholders_of(people, placeholder, PLACEHOLDER)
        words = [class_word or str(p.meta.get("class_word", CLASS_WORD)) for p in people]
        return SeFiHandle(pipe, people, names, words, id_scale, backend)


class SeFiHandle:
    """People made of stage words on a pipeline: switch them off, take them off."""

    def __init__(
        self, pipe: Any, people: Sequence[Identity], names: Sequence[str], class_words: Sequence[str], id_scale: Any,
        backend: str | None,
    ) -> None:  # fmt: skip
        off = not word_scale(id_scale)
        parts, self.stages = text_parts(pipe), stages_of(people[0])
        unet = unwrap(getattr(pipe, "unet", None))
        if not isinstance(unet, nn.Module):
            raise InputError(f"attach: SeFi-IDE needs a pipeline with a UNet, {type(pipe).__name__} has none")
        self.placeholders = tuple(names)
        staged, words = [], []
        for person, name, plain in zip(people, names, class_words):
            own = _variant_words(person, name, plain, parts)
            words += own
            staged.append(StagedPerson(name, plain, tuple(w.placeholder for w in own)))
        with contextlib.ExitStack() as undo:
            put_on(parts, words)
            undo.callback(take_off, parts, words)
            undo.enter_context(staged_unet(unet, self.stages, backend=backend))
            self._prompts = StagedPrompts(components_of(pipe), staged)
            undo.callback(self._prompts.remove)
            _narrow_others(pipe, unet, undo)
            self._undo = undo.pop_all()
        for w in words:
            w.handle = self
        self._prompts.off = off
        self.attached = True

    def __enter__(self) -> SeFiHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"SeFiHandle({', '.join(self.placeholders)}, {self.stages} stages, {state})"

    def detach(self) -> None:
        """Take the people off; pipeline, text encoders and UNet are what they were. May be called again."""
        if self.attached:
            self._undo.close()
            self.attached = False

    def scale(self, id_scale: Any) -> None:
        """1: the people; 0: the class word in their places."""
        self._prompts.off = not word_scale(id_scale)


class SeFiTokens(nn.Module):
    """What is trained of one person: per text encoder an expander from the class word's embedding to 2 S words.

    Args:
        start: Per text encoder the embedding [E] that training begins at; see `class_word_embeddings`.
        stages: S, 1 to 10 (5 in the paper; 1, 3, 5, 7, 9 and 10 in its ablation).
        **expander: Further arguments of `StageExpander`.
    """

    def __init__(self, start: Sequence[Tensor], stages: int = STAGES, **expander: Any) -> None:
        super().__init__()
        check_stages(stages)
        self.stages = stages
        self.expanders = nn.ModuleList(StageExpander(t, 2 * stages, **expander) for t in start)

    @property
    def widths(self) -> list[int]:
        """E of each text encoder."""
        return [e.width for e in self.expanders]

    def forward(self) -> tuple[Tensor, ...]:
        """Words [S, 2, E] per text encoder, keys' before values', with gradients."""
        return tuple(e().unflatten(0, (self.stages, 2)) for e in self.expanders)

    @torch.no_grad()
    def identity(self, class_word: str = CLASS_WORD, placeholder: str = PLACEHOLDER, base: str = "") -> Identity:
        """The person as it is now; the expanders themselves are not needed any more."""
        training = self.training
        words = torch.cat([t.flatten(0, 1) for t in self.eval()()], -1)[None]
        self.train(training)
        meta = {
            "stages": self.stages, "widths": self.widths, "class_word": class_word, "placeholder": placeholder,
            "base": base,
        }  # fmt: skip
        return Identity(words.float().cpu(), None, NAME, meta)


def class_word_embeddings(pipe: Any, class_word: str = CLASS_WORD) -> tuple[Tensor, ...]:
    """Per text encoder the embedding [E] of a word; the mean, where it is several tokens."""
    rows = []
    for tokenizer, encoder in text_parts(pipe):
        ids = tokenizer(class_word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"class word: {class_word!r} has no token; give a plain word such as 'person'")
        rows.append(encoder.get_input_embeddings().weight[ids].detach().float().mean(0).cpu())
    return tuple(rows)


# -- what training calls ----------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_unet(
    unet: nn.Module, stages: int = STAGES, *, limits: Sequence[float] | None = None, backend: str | None = None
) -> Iterator[StagedText]:
    """A UNet whose layers read wide text (`attention.staged`) inside of this context.

    Raises:
        InputError: the UNet reads staged text already, or a layer cannot.
    """
    unet = unwrap(unet)
    staged = StagedText(find_sites(unet), unet.config.cross_attention_dim, stages, limits=limits, backend=backend)
    stack: IdStack = stack_of(unet)
    stack.add_staged(unet, staged)
    try:
        yield staged
    finally:
        stack.remove_staged(unet)


def stage_text(
    pipe: Any,
    prompts: Sequence[str],
    words: Sequence[Tensor],
    stage: Tensor,
    *,
    placeholder: str = PLACEHOLDER,
    class_word: str = CLASS_WORD,
) -> tuple[Tensor, Tensor | None]:
    """Wide text of the stages of a training batch, with gradients into the words: two encodings per sample.

    Args:
        pipe: Whose text encoders are used, frozen.
        prompts: B prompts with the placeholder.
        words: Per text encoder [S, 2, E], of `SeFiTokens()`.
        stage: int [B], each sample's stage (`StagedText.stage` of its timestep).
        placeholder, class_word: As in `SeFiIDE.put_on`.

    Returns:
        [B, L, 3 E] (reference, keys, values), and the reference's pooled text (SDXL) or None.
    """
    plain = [replaced(p, {placeholder: class_word}) for p in prompts]
    with torch.no_grad():
        reference, pooled = encode_with_words(pipe, plain, {})
    at = stage.to(words[0].device).long()
    made = [encode_with_words(pipe, prompts, {placeholder: [w[at, i][:, None] for w in words]})[0] for i in (0, 1)]
    return joined_text(reference.detach(), made[:1], made[1:]), None if pooled is None else pooled.detach()


@contextlib.contextmanager
def watching(unet: nn.Module, loss: AttentionLoss) -> Iterator[AttentionLoss]:
    """Passes of a UNet inside of this context are shown to an attention loss."""
    stack = stack_of(unwrap(unet))
    before, stack.tap = stack.tap, loss
    try:
        yield loss
    finally:
        stack.tap = before


def check_aligned(pipe: Any, placeholder: str, class_word: str) -> None:
    """For the attention loss: the class word must be one token, as the placeholder is, so that positions agree.

    Raises:
        InputError: it is several.
    """
    for tokenizer, _ in text_parts(pipe):
        ids = tokenizer(class_word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"attention loss: {placeholder} takes one position and the class word {class_word!r} {len(ids)}, so "
                "that the prompts' tokens do not stand opposite each other; take one of one token, such as 'person'"
            )


# -- inside -----------------------------------------------------------------------------------------------


def _variant_words(person: Identity, name: str, plain: str, parts: Sequence[TextPart]) -> list[Words]:
    """One word per stage for keys, then for values, under placeholders that nobody writes."""
    words = split_words(person, [p.width for p in parts])
    order = [*range(0, person.tokens.shape[1], 2), *range(1, person.tokens.shape[1], 2)]
    return [Words(f"\ue000{name}.{j}\ue001", tuple(w[:, j : j + 1] for w in words), plain, name) for j in order]


def _narrow_others(pipe: Any, unet: nn.Module, undo: contextlib.ExitStack) -> None:
    """ControlNets read the reference prompt (our choice)."""
    found = getattr(components_of(pipe), "controlnet", None)
    for net in getattr(found, "nets", [found]):
        if isinstance(net, nn.Module):
            hook = narrow_to_reference(unet.config.cross_attention_dim)
            undo.callback(net.register_forward_pre_hook(hook, with_kwargs=True).remove)
