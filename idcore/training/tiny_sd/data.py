"""Batches for tiny-sd: a drawn person, a prompt that says who and how, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...sampling.tiny_sd import names
from ..contract import Batch
from ..tiny.people import sample_person
from ..tiny.pool import TRAIN_SEED, Pool
from ..tiny.prompts import BACKGROUNDS, COLOURS, STYLES, labels_to_names, write_prompt
from ..tiny.styles import stylise
from ..tiny.textures import texture_bank
from .codes import codes

SIZE = 64
STYLE_SHARE = (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)
ONE, TWO = names()[:2]  # stand in the prompts where a person's word or words are put in
_SUBJECTS = ((ONE, 0.42), (f"{ONE} person", 0.06), (f"{ONE} {TWO}", 0.18), (f"{ONE} {TWO} person", 0.04), (None, 0.30))
_EMPTY = ("an empty scene", "nobody", "a scene", "an empty background", "backgrounds")


@dataclass(frozen=True)
class Shares:
    """How often a prompt says what the picture shows, and how often nobody is in it (our choice)."""

    background: float = 0.85
    expression: float = 0.6
    pose: float = 0.6
    nobody: float = 0.06
    spread: float = 0.7  # of the two words of a person, on both sides of their mean


def style_shares(without: Sequence[str]) -> np.ndarray:
    """How often each of `STYLES` is drawn, float64 [6], 0 for those in `without`."""
    if set(without) - set(STYLES) or set(without) == set(STYLES):
        raise InputError(f"styles to leave out: some, not all, of {', '.join(STYLES)}; got {', '.join(without)}")
    kept = np.array([0.0 if s in without else share for s, share in zip(STYLES, STYLE_SHARE, strict=True)])
    return kept / kept.sum()


class PeopleData:
    """`batch(step, size)` is a pure function of (seed, step, pool).

    Args:
        without: styles that are neither shown nor named; the others take their share.

    Raises:
        InputError: `without` names no style, or all of them.
    """

    def __init__(
        self, pool_folder: Path, seed: int = 0, width: int = 128, shares: Shares | None = None,
        without: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.seed, self.shares, self.style_share = seed, shares or Shares(), style_shares(without)
        self.pictures, self.labels = _small(Pool(pool_folder))
        people = [sample_person(np.random.default_rng(TRAIN_SEED + i)) for i in range(len(self.pictures))]
        self.codes = codes(people, width)
        self.textures = texture_bank(256, SIZE)

    def batch(self, step: int, size: int) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """Prompts, the words' vectors [size, 2, E] (of `ONE` and `TWO`), pictures [size, 3, 64, 64] in 0..1, whether
        anybody is seen, float32 [size]."""
        rng = np.random.default_rng([self.seed, step])
        who = rng.integers(0, len(self.pictures), size)
        view = rng.integers(0, 2, size)
        drawn = torch.from_numpy(self.pictures[who, view]).permute(0, 3, 1, 2).float() / 255
        plans = [self._plan(rng, self.labels[w, v]) for w, v in zip(who, view)]
        spread = rng.standard_normal((size, self.codes.shape[1])).astype(np.float32)
        one = self.codes[who]
        apart = spread * self.shares.spread * np.array([[p["two"]] for p in plans], np.float32)
        words = torch.from_numpy(np.stack([one + apart, one - apart], 1))
        present = torch.tensor([float(not p["empty"]) for p in plans])
        return [p["prompt"] for p in plans], words, self._picture(rng, drawn, plans), present

    def _plan(self, rng: np.random.Generator, labels: np.ndarray) -> dict[str, Any]:
        s = self.shares
        style = STYLES[rng.choice(len(STYLES), p=self.style_share)]
        background = COLOURS[int(rng.integers(len(COLOURS)))] if rng.random() < s.background else None
        plan: dict[str, Any] = {"style": style, "background": background, "empty": rng.random() < s.nobody, "two": 0.0}
        if plan["empty"]:
            subject = _EMPTY[int(rng.integers(len(_EMPTY)))]
            return plan | {"prompt": write_prompt(rng, style, background, None, None, subject)}
        expression, pose = labels_to_names(*labels)
        subject = _SUBJECTS[rng.choice(len(_SUBJECTS), p=[share for _, share in _SUBJECTS])][0]
        plan["two"] = float(subject is not None and TWO in subject)
        said = expression if rng.random() < s.expression else None, pose if rng.random() < s.pose else None
        return plan | {"prompt": write_prompt(rng, style, background, *said, subject)}

    def _picture(self, rng: np.random.Generator, drawn: Tensor, plans: list[dict[str, Any]]) -> Tensor:
        n = len(plans)
        g = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        present = torch.tensor([not p["empty"] for p in plans]).float().view(-1, 1, 1, 1)
        cover = drawn[:, 3:] * present
        wall = self._wall(rng, g, plans, present)
        light = F.interpolate(torch.randn(n, 1, 2, 2, generator=g), size=(SIZE, SIZE), mode="bilinear")
        person = drawn[:, :3] * (1 + 0.05 * light)
        both = (person * cover + wall * (1 - cover)).clamp(0, 1)
        styled = stylise(both, [p["style"] for p in plans])
        # the named colour stays what it is under a style, so that a prompt's background can be checked
        named = torch.tensor([p["background"] is not None and not p["empty"] for p in plans]).view(-1, 1, 1, 1)
        return torch.where(named, styled * cover + wall * (1 - cover), styled).clamp(0, 1)

    def _wall(
        self, rng: np.random.Generator, g: torch.Generator, plans: list[dict[str, Any]], present: Tensor
    ) -> Tensor:
        n = len(plans)
        some = rng.uniform(0.05, 0.95, (n, 3))
        flat = [np.array(BACKGROUNDS[p["background"]]) / 255 if p["background"] else c for p, c in zip(plans, some)]
        colour = torch.tensor(np.stack(flat), dtype=torch.float32).view(n, 3, 1, 1)
        wave = F.interpolate(torch.randn(n, 1, 2, 2, generator=g), size=(SIZE, SIZE), mode="bicubic")
        pick = torch.from_numpy(self.textures[rng.integers(0, len(self.textures), n)]).permute(0, 3, 1, 2).float() / 255
        grain = pick.mean(1, keepdim=True) - pick.mean((1, 2, 3), keepdim=True)
        return (colour * (1 + 0.05 * wave) + 0.5 * grain * (1 - present)).clamp(0, 1)


def _small(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """All pictures of a pool at 64 pixels, uint8 [N, 2, 64, 64, 4], colours weighted by their cover, and the labels."""
    out, at = np.empty((len(pool), 2, SIZE, SIZE, 4), np.uint8), 0
    for shard in pool.pictures:
        for start in range(0, len(shard), 250):
            part = torch.from_numpy(np.array(shard[start : start + 250])).flatten(0, 1).permute(0, 3, 1, 2).float()
            cover = part[:, 3:] / 255
            shrink = lambda x: F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)  # noqa: E731
            a = shrink(cover)
            rgb = shrink(part[:, :3] * cover) / a.clamp_min(1e-3)
            made = torch.cat([rgb.clamp(0, 255), a.clamp(0, 1) * 255], 1).round().byte().permute(0, 2, 3, 1)
            count = len(made) // 2
            out[at : at + count] = made.view(count, 2, SIZE, SIZE, 4).numpy()
            at += count
    return out, np.concatenate(pool.labels)


class PeopleSource:
    """`PeopleData` for the loop: a micro batch is one draw."""

    def __init__(self, data: PeopleData, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data.pictures)

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `contract.Source`; `extra["words"]` [B, 2, E] are the vectors of `ONE` and `TWO` in the prompts;
        `extra["present"]` [B] is 0 where nobody is seen."""
        if size != self.size or seed != self.data.seed:
            raise InputError(f"drawn for batch {self.size} and seed {self.data.seed}, asked for {size} and {seed}")
        for m in range(count):
            part = m * world + rank
            prompts, words, pictures, present = self.data.batch(step * world * count + part, size)
            places = torch.arange(part * size, (part + 1) * size)
            ids = [f"step {step}, place {p}" for p in places.tolist()]
            yield Batch(ids, places, prompts, pixels=pictures * 2 - 1, extra={"words": words, "present": present})

    def state(self) -> dict[str, Any]:
        return {"people": len(self), "block": self.size}
