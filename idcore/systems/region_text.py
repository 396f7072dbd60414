"""Prompts for parts of a picture: where a mask is 1, layers read another text than the prompt.

People that act through the prompt have regions by it:

    with attach_texts(pipe, ["a man with a hat", "a woman"], "left, right"):
        pipe("a photo of two people")

One row of the UNet serves all texts, so that other layers mix the parts: a text that says "nobody" takes the person
beside it, too. `systems.region_passes` keeps texts apart, at a row of the batch each.

In every cross-attention layer the output is h + sum_j s_j w_j (i_j - h): h the attention to the prompt, i_j the one to
text j, w_j its mask per image token, s_j its scale. Identities in the attention merge with h as without regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idcore.attach import Handle, attach
from idcore.attention.masks import read_masks
from idcore.attention.sites import attention_of, find_sites, unwrap
from idcore.attention.types import AttentionOptions, Site
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.text.reader import components_of, text_parts

NAME = "region-text"


class RegionText:
    """Texts by the UNet's own projections; a `systems.base.System`.

    LoRA on them acts; after a change of its strength call `handle.refresh()`.
    """

    name = NAME
    options = AttentionOptions("add")
    replaces_text = True

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unwrap(unet)

    def sites(self, unet: nn.Module) -> list[Site]:
        """Every cross-attention layer.

        Raises:
            InputError: no UNet with cross-attention, or one that normalises its text.
        """
        sites = find_sites(unet)
        for site in sites:
            attn = attention_of(unet, site)
            if attn.norm_cross is not None or attn.norm_k is not None:
                raise InputError(
                    f"texts for regions: {site.path} normalises its text or keys, which they do not pass; draw on a "
                    "Stable Diffusion 1.x, 2.x or SDXL UNet"
                )
        return sites

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, L, C] of a text [1, L, E]."""
        attn = attention_of(self._unet, site)
        weight = next(attn.to_k.parameters())
        # Weights that are offloaded layer by layer are brought, with their inputs, by hooks of their own.
        text = tokens.to(weight.dtype) if weight.device.type == "meta" else tokens.to(weight)
        return attn.to_k(text), attn.to_v(text)


def attach_texts(
    pipe: Any, prompts: Sequence[str], masks: Any, *, scale: Any = 1.0, backend: str | None = None
) -> Handle:
    """Let parts of the pictures read prompts of their own, in the same pass.

    Words (`WordSystem`) and LoRA that are on the pipeline act in these prompts too, so put them on before. The
    unconditional half of guidance reads the negative prompt everywhere; SDXL's pooled text is the main prompt's.

    Args:
        pipe: A diffusers pipeline (SD 1.x, SD 2.x, SDXL), or an `IDPipeline`.
        prompts: n texts, one row for all pictures of a call.
        masks: Where they are read, one each; the forms of `Handle.masks`. Where masks overlap, their sum is brought
            down to 1.
        scale: 1: in place of the main prompt; 0: not at all; between: a mixture.
        backend: Of `id_attention`, to insist on.

    Raises:
        InputError: no texts, as many masks as texts are missing, or a text with a person of SeFi-IDE, whose tokens
            change with the stage: name that person in the main prompt.
    """
    prompts = texts_checked(prompts)
    texts = [encoded(pipe, p)[0] for p in prompts]
    people = [Identity(t, None, NAME, {}) for t in texts]
    at = shared_out(read_masks(masks, len(people)))
    return attach(pipe, RegionText(unwrap(pipe.unet)), people, id_scale=scale, id_mask=at, backend=backend)


def texts_checked(prompts: Sequence[str]) -> list[str]:
    """Raise InputError unless these are texts."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f"texts for regions: wanted at least one text, none of them empty, got {prompts!r}")
    return prompts


@torch.no_grad()
def encoded(pipe: Any, prompt: str, *, staged: bool = False) -> tuple[Tensor, Tensor | None]:
    """[1, L, E] float32, by the pipeline's own `encode_prompt`, and SDXL's pooled text [1, P].

    Args:
        pipe: whose prompt it is.
        prompt: the text.
        staged: whether it may be wide text, several encodings side by side (`attention.staged`).

    Raises:
        InputError: the prompt names a person of SeFi-IDE, and `staged` is not set.
    """
    inner = components_of(pipe)
    device = text_parts(pipe)[0].encoder.get_input_embeddings().weight.device
    made = inner.encode_prompt(
        prompt=[prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    text = made[0]
    width = unwrap(pipe.unet).config.cross_attention_dim
    if text.shape[-1] != width and not staged:
        raise InputError(
            f"texts for regions: {prompt!r} names a person of SeFi-IDE, whose words change with the stage of the "
            "denoising; name that person in the main prompt, and give the other parts of the picture texts without"
        )
    return text.float(), (made[2] if len(made) == 4 else None)


def shared_out(masks: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks whose sum is at most 1 everywhere: larger sums are divided by themselves.

    Args:
        masks: each [1 or n, H, W], 0..1, of any size, or None (everywhere).
    """
    known = [m for m in masks if m is not None]
    if len(masks) < 2 or not known:
        # several texts everywhere: equal shares
        return list(masks) if len(masks) < 2 else [torch.full((1, 1, 1), 1 / len(masks)) for _ in masks]
    size = [max(m.shape[i] for m in known) for i in (-2, -1)]
    wide = [torch.ones(1, *size) if m is None else nn.functional.interpolate(m[:, None], size)[:, 0] for m in masks]
    total = sum(wide).clamp(min=1.0)
    return [w / total for w in wide]
