"""How many steps a style needs: held-out prompts are drawn and scored in between, and the best weights are kept.

The paper tunes the number of steps for each style and says neither how nor to what. Here a score is

    style   = 1 - |mean features of the pictures - of StyleRef| / |the base's pictures - of StyleRef|, each feature over
              its spread between pictures
    content = with CLIP how well a picture agrees with its content's words, over the same of the base's picture;
              else how alike the coarse layouts of both pictures are (correlation of 8x8 shades)
    score   = style * content ** search.content

so that the untrained base has style 0 and content 1. A product: a picture without the style is worth nothing, however
well it keeps its content. (With a sum the first steps won, which had lost nothing yet.) All of it is our choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ...errors import InputError
from ...files import read_safetensors, write_safetensors
from ...metrics.layouts import coarse
from ...metrics.networks import Looker, feature_network
from ...metrics.tiny_style import looks
from ...systems.styleforge import StyleWords
from ...workflows import write_text
from ..bases.latent import LatentBase
from ..contract import Validation
from ..losses.faces import as_bytes
from .config import SearchSettings

SIDE = 64  # pixels at which colours and textures are seen
TILE, LINE, COLUMNS = 128, 14, 4  # of the sheet: pixels of a tile and of a line of text, tiles in a row
RECORD = "search.json"


@torch.no_grad()
def draw(
    base: LatentBase, prompts: Sequence[str], seeds: Sequence[int], size: int, steps: int, guidance: float
) -> list[Image.Image]:
    """A picture of every prompt with every seed, with the pipeline as it is now (a LoRA that trains included)."""
    pipe, out = base.pipe, []
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        for prompt in prompts:
            for seed in seeds:
                latents = pipe(
                    prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(seed), output_type="latent",
                ).images  # fmt: skip
                out += [Image.fromarray(a) for a in as_bytes(base.decode(latents.float()))]
    finally:
        pipe.set_progress_bar_config(**shown)
    return out


class Looks:
    """Colours and textures of pictures at 64 x 64: shades, chroma, edges, grain, saturation; float32 [N, D]."""

    key, words = "looks-v1", "colours and textures (not comparable with published FID or KID)"

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        small = [p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for p in pictures]
        x = torch.from_numpy(np.stack([np.asarray(p) for p in small])).permute(0, 3, 1, 2).float() / 255
        return looks(x).float().numpy()


class StepSearch:
    """Draws, scores, keeps the best.

    What it has found stands in a folder of its own, so that a resumed run knows it: `search.json`, the base's
    pictures' figures, and the weights of the best step.

    Args:
        base: what draws, with the weights as they are at each call.
        settings: prompts, sampler, patience.
        words: put the contents into the style's template.
        style_ref: StyleRef images.
        size: of the pictures, pixels.
        folder: where it is kept.
    """

    def __init__(
        self, base: LatentBase, settings: SearchSettings, words: StyleWords, style_ref: Sequence[Image.Image],
        size: int, folder: Path,
    ) -> None:  # fmt: skip
        self.base, self.settings, self.size, self.folder = base, settings, size, Path(folder)
        self.contents = list(settings.prompts)
        self.prompts = [words.person(c) for c in self.contents]
        embedded = settings.features == "embedded"
        self.looker: Looker = Looks() if embedded else feature_network(settings.features, base.device)
        self.wanted = self.looker(list(style_ref))
        self.record: dict[str, Any] = self._read()

    def __call__(self, module: nn.Module, step: int) -> Validation:
        pictures = draw(
            self.base, self.prompts, self.settings.seeds, self.size, self.settings.steps, self.settings.guidance
        )
        features, content = self.looker(pictures), self._content(pictures)
        if step == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {"features": torch.from_numpy(features), "content": torch.from_numpy(content)}
            write_safetensors(self.folder / "base.safetensors", kept)
        measures = self._scored(features, content)
        self._keep(module, step, measures)
        return Validation({"style": self._sheet(pictures)}, measures)

    def enough(self, step: int) -> bool:
        """Whether `patience` scores up to this step, the last ones, were no better than one before."""
        scores = {s: v["score"] for s, v in self._scores().items() if 0 < s <= step}
        if not self.settings.patience or not scores:
            return False
        best = max(scores, key=lambda s: (scores[s], -s))
        return sum(s > best for s in scores) >= self.settings.patience

    def best(self) -> int | None:
        """The step of the best score; None before there is one."""
        return self.record["best"]

    def best_weights(self) -> dict[str, Tensor] | None:
        """The module's state dict at the best step, or None."""
        step = self.best()
        return None if step is None else read_safetensors(self._weights(step), what="best weights")[0]

    # -- scores -------------------------------------------------------------------------------------------

    def _content(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """CLIP's agreement of each picture with its content [N]; without CLIP coarse layouts [N, 64]."""
        if hasattr(self.looker, "text"):
            words = _unit(self.looker.text(self.contents)).repeat(len(self.settings.seeds), 0)
            return (_unit(self.looker(pictures)) * words).sum(1).astype(np.float32)
        return coarse(pictures)

    def _scored(self, features: np.ndarray, content: np.ndarray) -> dict[str, float]:
        file = self.folder / "base.safetensors"
        if not file.is_file():
            raise InputError(
                f"step search: {file} is missing, which the run wrote at its first step; begin anew in another --out"
            )
        base = {k: t.numpy() for k, t in read_safetensors(file, what="step search")[0].items()}
        spread = np.sqrt((self.wanted.var(0) + base["features"].var(0)) / 2)
        spread = spread + 1e-2 * spread.mean() + 1e-12  # what hardly varies does not decide
        away, now = (np.linalg.norm((f.mean(0) - self.wanted.mean(0)) / spread) for f in (base["features"], features))
        style = 1 - float(now) / max(float(away), 1e-12)
        if content.ndim == 1:
            kept = content.mean() / max(float(base["content"].mean()), 1e-6)
        else:
            kept = (content * base["content"]).sum(1).mean()
        score = style * max(float(kept), 0.0) ** self.settings.content if style > 0 else style
        return {"style": style, "content": float(kept), "score": score}

    # -- what is kept -------------------------------------------------------------------------------------

    def _weights(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}.safetensors"

    def _scores(self) -> dict[int, Mapping[str, float]]:
        return {int(s): v for s, v in self.record["scores"].items()}

    def _read(self) -> dict[str, Any]:
        file = self.folder / RECORD
        if not file.is_file():
            return {"best": None, "scores": {}}
        return json.loads(file.read_text(encoding="utf-8"))

    def _keep(self, module: nn.Module, step: int, measures: Mapping[str, float]) -> None:
        """Weights first, then the record, then the old weights go: a kill leaves a record whose weights are there."""
        scores = self._scores() | {step: dict(measures)}
        best = max((s for s in scores if s > 0), key=lambda s: (scores[s]["score"], -s), default=None)
        old = self.best()
        if best == step:
            state = {k: v.detach().cpu() for k, v in module.state_dict().items()}
            write_safetensors(self._weights(step), state)
        self.record = {"best": best, "scores": {str(s): scores[s] for s in sorted(scores)}}
        write_text(self.folder / RECORD, json.dumps(self.record, indent=1))
        if old is not None and best != old:
            self._weights(old).unlink(missing_ok=True)

    def _sheet(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """The pictures below their prompts."""
        said = [c for c in self.contents for _ in self.settings.seeds]
        rows = -(-len(pictures) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + LINE)), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (picture, text) in enumerate(zip(pictures, said, strict=True)):
            x, y = i % COLUMNS * TILE, i // COLUMNS * (TILE + LINE)
            pen.text((x + 2, y + 1), text[: TILE // 6], fill="black")
            sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y + LINE))
        return sheet


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
