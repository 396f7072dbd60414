"""A small real task for tests of the training loop: a network that learns to undo noise on rows of numbers."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from idcore.files import write_safetensors
from idcore.training.config import LoopConfig
from idcore.training.contract import Batch, Validation
from idcore.training.state import load_module


class Rows:
    """64 records of 6 numbers; the order is a function of (seed, step)."""

    def __init__(self, count=64, scale=0.2):
        g = torch.Generator().manual_seed(5)
        self.values = torch.randn(count, 6, generator=g).cumsum(1) * scale
        self.scale = scale

    def __len__(self):
        return len(self.values)

    def micro_batches(self, step, seed, rank, world, size, count):
        n = world * size * count
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 9973 + step))[:n]
        for m in range(count):
            start = (m * world + rank) * size
            rows = order[start : start + size]
            places = torch.arange(start, start + size)
            ids = [f"row{i}" for i in rows.tolist()]
            yield Batch(ids, places, [""] * size, extra={"rows": self.values[rows]})

    def state(self):
        return {"count": len(self), "scale": self.scale}


class Denoise:
    """Predict the noise in rows; layers are called one by one, as systems do; dropout and a buffer are used."""

    name = "denoise"

    def __init__(self, seed=0, dropout=0.0, poison_at=None, width=24):
        torch.manual_seed(seed)
        self.module = nn.ModuleDict(
            {"a": nn.Linear(7, width), "b": nn.Linear(width, 6), "norm": nn.BatchNorm1d(width), "late": nn.Linear(6, 6)}
        )
        self.dropout, self.poison_at, self.seen, self.exported = dropout, poison_at, 0, None

    def losses(self, batch, step):
        rows = batch.extra["rows"]
        noise, u = step.normal("noise", batch.places, (6,)), 0.5 + step.uniform("time", batch.places)[:, None]
        hidden = torch.nn.functional.gelu(self.module["a"](torch.cat([rows + u * noise, u], 1)))
        hidden = nn.functional.dropout(hidden, self.dropout)  # from the global generator
        out = self.module["b"](hidden)
        if step.index >= step.total // 2:  # a part that is not used from the start
            out = out + self.module["late"](out)
        terms = {"noise": (out - noise).square().mean(), "size": 1e-3 * out.square().mean()}
        if self.poison_at == step.index:
            terms["size"] = terms["size"] * float("nan")
        self._last = float(out.detach().abs().mean())
        self.seen += 1
        return terms

    def logs(self):
        return {"output": self._last}

    def validate(self, step):
        torch.rand(3)  # global random numbers that validation draws must not show in the losses
        weight = self.module["b"].weight.detach()
        return Validation({"map": Image.new("RGB", (8, 8), (step.index % 256, 0, 0))}, {"weight": float(weight.norm())})

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]

    def export(self, folder, facts):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "facts.json"
        path.write_text(json.dumps(facts))
        self.exported = {k: v.clone() for k, v in self.module.state_dict().items()}
        write_safetensors(folder / "weights.safetensors", self.module.state_dict())
        load_module(self.module, self.exported, "what was exported")  # as a search that puts its best weights there
        return [path]


def config(**changes):
    values = {"steps": 12, "batch": 4, "lr": 1e-2, "ema": 0.9, "save_every": 4, "validate_every": 0, "trackers": ()}
    return LoopConfig(**{**values, **changes})


def losses(out):
    """Lines of losses.jsonl without the clock, by step."""
    lines = [json.loads(line) for line in (Path(out) / "losses.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}
