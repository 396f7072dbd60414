"""Dual binding (arXiv 2404.05256, section 3): "[V] style" on StyleRef images, "style" on Aux images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...systems.styleforge import StyleWords
from ..contract import Batch, Step, Validation
from ..losses.diffusion import diffusion_loss
from ..tuning import Tuned
from .config import StyleForgeConfig
from .search import StepSearch


class StyleForgeTask:
    """One style's training, as `loop.train` wants it.

    L = sum over the sets of pictures of weight * E[ w_t |x_hat(alpha_t x + sigma_t eps, c) - x|^2 ] (the paper's loss;
    in terms of another prediction see `LossSettings.form`).

    Args:
        tuned: what trains, on its base.
        config: all settings.
        sets: name and weight of each group of the source, in its order.
        shares: of the groups in a batch.
        words: what the result says of its words.
        search: draws, scores and keeps the best in between; None: the last weights are the result.
    """

    name = "styleforge"

    def __init__(
        self,
        tuned: Tuned,
        config: StyleForgeConfig,
        sets: Sequence[tuple[str, float]],
        shares: Sequence[float],
        words: StyleWords,
        search: StepSearch | None = None,
    ) -> None:
        self.tuned, self.base, self.config = tuned, tuned.base, config
        self.sets, self.shares, self.words, self.search = list(sets), list(shares), words, search
        self.module = tuned.module
        self._logs: dict[str, float] = {}

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """A weighted term for each set that the micro batch has samples of."""
        base, device = self.base, self.base.device
        latents = base.encode_pictures(batch.pixels) if batch.latents is None else batch.latents.to(device)
        noise = step.normal("noise", batch.places, latents.shape[1:]).to(device)
        x, t = base.noised(latents, noise, step.uniform("time", batch.places).to(device))
        text = self.tuned.text(batch.prompts, *batch.pixels.shape[-2:], batch.sizes)
        prediction = base.predict(x, t, text)
        found, wanted, how = self._compared(prediction, x, t, latents, noise)
        snr = base.snr(t)
        self._logs, terms = {}, {}
        for number, (name, weight) in enumerate(self.sets):
            rows = (batch.extra["group"] == number).nonzero()[:, 0].to(device)
            if not len(rows):
                continue
            loss = diffusion_loss(found[rows], wanted[rows], snr=snr[rows], **how)
            # A micro batch may hold more or less of a set than its share; the mean over micro batches is the term.
            part = len(rows) / (len(batch) * self.shares[number])
            terms[name] = weight * part * loss
            self._logs[name] = float(loss.detach())
        return terms

    def _compared(self, prediction: Tensor, x: Tensor, t: Tensor, latents: Tensor, noise: Tensor) -> tuple:
        """(prediction, target, options of the loss) in the form that the settings want."""
        c, base = self.config.loss, self.base
        if c.form == "prediction":
            return prediction, base.target(latents, noise, t), {}
        limit = {"one": None, "snr": float("inf"), "min_snr": c.min_snr}[c.weight]
        return base.clean(x, t, prediction), latents, {"min_snr": limit, "parametrisation": "sample"}

    # -- what the loop asks besides ------------------------------------------------------------------------

    def logs(self) -> Mapping[str, float]:
        return self._logs

    def validate(self, step: Step) -> Validation:
        return Validation() if self.search is None else self.search(self.module, step.index)

    def enough(self, step: int) -> bool:
        """Whether the search wants no more steps."""
        return self.search is not None and self.search.enough(step)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: what the search has found stands in its folder."""

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """The best weights that the search kept, or the last; see `result.export`."""
        from .result import export

        return export(self, folder, facts)
