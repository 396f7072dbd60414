"""Training of the embedded model: one loop, resumable at any checkpoint bit for bit."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...encoders.dlib_torch import DlibRecogniser
from ...errors import IdcoreError, InputError
from ...sampling.tiny_model import TinyConfig, TinyModel
from ...systems.tiny import chips_of
from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .data import Batch, TinyData
from .losses import RecogniserLoss, face_weight, picture_loss
from .parallel import average_gradients, free_port, join, leave
from .pool import make_pool
from .processors import put_processors, set_identity


@dataclass
class TrainConfig:
    """What `train_tiny` does. All values are our choice.

    out: folder of the checkpoints. pool: folder of rendered people (None: `out`/pool), filled up to `shards`
    shards of 500 people before the training. recogniser_from: iteration from which the recogniser's losses
    count, on `recogniser_share` of each batch. workers: processes with `threads` threads and `batch` samples
    each. init: folder of another training whose averaged weights to start from. stop_at: pause there.
    """

    out: str
    pool: str | None = None
    iterations: int = 10_000
    batch: int = 24
    lr: float = 8e-4
    warmup: int = 200
    decay: float = 0.25
    ema: float = 0.996
    recogniser_from: int = 6_000
    perceptual_weight: float = 0.15
    identity_weight: float = 1.0
    drop_identity: float = 0.08
    drop_text: float = 0.08
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    bf16: bool = True
    threads: int = 1
    workers: int = 1
    recogniser_share: float = 0.34
    init: str | None = None
    model: TinyConfig | None = None
    textures: int = 1024
    shards: int = 60
    stop_at: int | None = None

    @property
    def pool_folder(self) -> Path:
        return Path(self.pool) if self.pool else Path(self.out) / "pool"

    def check(self) -> None:
        for name in ("iterations", "batch", "save_every", "log_every", "threads", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"training: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1 or self.lr <= 0:
            raise InputError(f"training: wanted 0 <= ema < 1 and lr > 0, got ema {self.ema} and lr {self.lr}")


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up, constant, then a linear fall to 2 % over the last `decay` of the iterations."""
    start = c.iterations * (1 - c.decay)
    fall = 1.0 if step < start else max(0.02, (c.iterations - step) / max(1.0, c.iterations - start))
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * fall


class Trainer:
    """Model, its average, the optimiser and the data; `run()` goes on from `self.step`."""

    def __init__(self, config: TrainConfig, rank: int = 0) -> None:
        config.check()
        self.config, self.rank = config, rank
        c = config
        torch.set_num_threads(c.threads)
        torch.manual_seed(c.seed)
        self.data = TinyData(c.pool_folder, c.seed, c.textures)
        self.model = TinyModel(c.model).train()
        self.recogniser = DlibRecogniser().to(memory_format=torch.channels_last)
        self.recogniser_loss = RecogniserLoss(self.recogniser)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), c.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.processors = put_processors(self.model)
        self.weight = face_weight(self.model.config.size)
        self.step, self.samples, self.history = 0, 0, []
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def fit_feature_scale(self, batches: int = 6) -> None:
        """Mean and deviation of every feature channel, from the data, kept with the weights."""
        sums: list[list[Tensor]] = [[] for _ in range(3)]
        for k in range(batches):
            wide, _ = chips_of(self.data.batch(10**9 + k, 32).ref)
            for s, f in enumerate(early_features(self.recogniser, wide)):
                sums[s].append(f)
        for s, parts in enumerate(sums):
            f = torch.cat(parts)
            self.model.system.encoder.get_buffer(f"mean{s}").copy_(f.mean((0, 2, 3)).view(-1, 1, 1))
            self.model.system.encoder.get_buffer(f"std{s}").copy_(f.std((0, 2, 3)).view(-1, 1, 1).clamp_min(1e-3))
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def _draw(self) -> int:
        """Number of this worker's batch: no two workers and no two steps share one."""
        return self.step * self.config.workers + self.rank

    def noise(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """t, noise and the drop mask of this step, from (seed, step) alone."""
        g = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self._draw())
        four = torch.randint(1, 5, (n,), generator=g) / 4
        t = torch.where(torch.rand(n, generator=g) < 0.6, four, torch.rand(n, generator=g) * 0.98 + 0.02)
        size = self.model.config.size
        return t, torch.randn(n, 3, size, size, generator=g), torch.rand(n, 2, generator=g)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        c, n = self.config, len(batch.ref)
        t, noise, drop = self.noise(n)
        prompts = ["" if d < c.drop_text else p for p, d in zip(batch.prompts, drop[:, 0].tolist())]
        keep = (drop[:, 1] >= c.drop_identity).float()
        x0 = batch.target * 2 - 1
        tt = t.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            with torch.no_grad():
                wide, tight = chips_of(batch.ref)
                with torch.autocast("cpu", enabled=False):  # bfloat16 would cost the features their fine detail
                    feats = early_features(self.recogniser, wide)
                embedding = self.recogniser(tight.contiguous(memory_format=torch.channels_last)).embedding
            tokens = self.model.system.encoder(feats, embedding.float())
            look, refined = self.model.reference(tokens)
            text, pooled = self.model.text(self.model.tokenizer(prompts))
            set_identity(self.processors, self.model.system, tokens, keep)
            reference = torch.cat([look, refined], 1) * keep.view(-1, 1, 1, 1)
            pred = self.model(((1 - tt) * x0 + tt * noise), t, text, pooled, reference).float()
            out = {"picture": picture_loss(pred, x0, self.weight)}
            seen = F.interpolate(batch.ref, size=(x0.shape[-1],) * 2, mode="bilinear", antialias=True) * 2 - 1
            out["look"] = 0.5 * picture_loss(F.pixel_shuffle(look, 2).float(), seen, self.weight)
            if self.step >= c.recogniser_from:
                self._recogniser_terms(out, pred, batch, embedding, keep)
        return out

    def _recogniser_terms(self, out: dict, pred: Tensor, batch: Batch, embedding: Tensor, keep: Tensor) -> None:
        k = max(
            1, round(len(pred) * self.config.recogniser_share)
        )  # the first k of the batch: it costs a third of a step
        g = torch.Generator().manual_seed(self.config.seed * 7_919 + self._draw())
        shift = torch.randn(k, 2, generator=g) * 0.015
        feats, emb = self.recogniser_loss.features(pred[:k] * 0.5 + 0.5, shift)
        with torch.no_grad():
            want, target_emb = self.recogniser_loss.features(batch.target[:k], shift)
        out["perceptual"] = self.config.perceptual_weight * self.recogniser_loss.perceptual(feats, want)
        half = 0.5 * (target_emb.float() + embedding[:k].float())  # between the ideal picture and the reference
        out["identity"] = self.config.identity_weight * (((emb.float() - half) ** 2).sum(1) * keep[:k]).mean()

    def train_step(self) -> dict[str, float]:
        c = self.config
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, c)
        terms = self.losses(self.data.batch(self._draw(), c.batch))
        total = sum(terms.values())
        if not torch.isfinite(total):
            raise IdcoreError(
                f"training stopped: the loss is {total.item()} at iteration {self.step}. The last checkpoint in "
                f"{c.out} is intact; resume from it with a lower lr (now {c.lr})"
            )
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(list(self.model.parameters()), c.workers)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self._average()
        self.step += 1
        self.samples += c.batch * c.workers
        return {k: float(v.detach()) for k, v in terms.items()}

    def _average(self) -> None:
        d = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            mine = self.model.state_dict()
            keys = [k for k, v in mine.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.ema[k] for k in keys], [mine[k] for k in keys], 1 - d)

    def run(self) -> None:
        c = self.config
        end = min(c.iterations, c.stop_at or c.iterations)
        sums: dict[str, float] = {}
        start, since = time.time(), self.step
        while self.step < end:
            for k, v in self.train_step().items():
                sums[k] = sums.get(k, 0.0) + v
            if self.step % c.log_every == 0 and self.rank == 0:
                rate = (time.time() - start) / (self.step - since)
                self._report({k: v / c.log_every for k, v in sums.items()}, rate, end)
                sums = {}
            if self.rank == 0 and (self.step % c.save_every == 0 or self.step == end):
                save_checkpoint(Path(c.out), self)

    def _report(self, terms: dict[str, float], rate: float, end: int) -> None:
        self.history.append({"step": self.step, **{k: round(v, 5) for k, v in terms.items()}})
        text = " ".join(f"{k} {v:.4f}" for k, v in terms.items())
        share = int(20 * self.step / end)
        left = rate * (end - self.step) / 60
        bar = "#" * share + "." * (20 - share)
        print(f"[{bar}] {self.step}/{end} {text} {rate:.2f} s/it, {left:.0f} min left", file=sys.stderr, flush=True)


def early_features(recogniser: DlibRecogniser, chips: Tensor) -> list[Tensor]:
    """feat0..feat2 of wide chips in 0..1 (the deeper stages are not computed)."""
    x = (chips.contiguous(memory_format=torch.channels_last) - recogniser.mean) * recogniser.gain
    x = F.max_pool2d(torch.relu(recogniser.stem(x)), 3, 2)
    out = []
    for stage in recogniser.stages[:3]:
        x = stage(x)
        out.append(x)
    return out


def train_tiny(config: TrainConfig, resume: bool = False) -> Path:
    """Train, or go on from the newest checkpoint in `config.out`; returns the checkpoint's folder.

    Raises:
        InputError: bad settings, or an empty pool with shards=0.
        IdcoreError: the loss is not finite (the last checkpoint stays).
    """
    config.check()
    if config.shards:
        make_pool(config.pool_folder, config.shards, workers=config.workers)
    if config.workers == 1:
        _work(0, config, resume, 0)
    else:
        torch.multiprocessing.spawn(_work, (config, resume, free_port()), nprocs=config.workers)
    return find_checkpoint(Path(config.out))


def _work(rank: int, config: TrainConfig, resume: bool, port: int) -> None:
    if config.workers > 1:
        join(rank, config.workers, port)
    trainer = Trainer(config, rank)
    if resume:
        load_checkpoint(Path(config.out), trainer)
    elif config.init:
        load_checkpoint(Path(config.init), trainer, weights_only=True)
    else:
        trainer.fit_feature_scale()
    trainer.run()
    leave()


def config_dict(config: TrainConfig) -> dict:
    out = asdict(config)
    out["model"] = config.model.as_dict() if config.model else None
    return {k: v for k, v in out.items() if not (isinstance(v, float) and math.isnan(v))}
