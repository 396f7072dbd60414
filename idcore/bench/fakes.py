"""A whole SDXL for accounting: shapes, dtypes and lifetimes, but no numbers and no memory (PyTorch's fake tensors)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..attention.sites import attention_of
from ..attention.types import AttentionOptions
from ..encoders.arcface_torch import IResNet
from ..encoders.pulid_features import PuLIDFeatures
from ..systems.pulid import PuLID
from ..testing.eager import eager_id_attention
from ..training.bases.sdxl import SDXLBase
from ..training.contract import Text
from .unets import sdxl_shapes, sdxl_vae


def without_numbers() -> FakeTensorMode:
    """The mode in which everything here must run."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(module: nn.Module, dtype: torch.dtype, device: str = "cpu", trained: bool = False) -> nn.Module:
    """A module from the meta device with fake weights; with gradients in place already where it is trained, as they
    are from the second step on."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device), trained)
                if trained:
                    part._parameters[name].grad = torch.empty(p.shape, dtype=dtype, device=device)
        for name, b in part._buffers.items():
            if b is not None:
                kind = dtype if b.is_floating_point() else b.dtype
                part._buffers[name] = torch.empty(b.shape, dtype=kind, device=device)
    return module.eval()


def fake_sdxl(scheduler: Any, dtype: torch.dtype = torch.bfloat16) -> SDXLBase:
    """SDXL's UNet and autoencoder as a frozen base, without text encoders.

    Args:
        scheduler: made outside of the mode: its tables are numbers.
        dtype: of all weights.
    """
    with unset_fake_temporarily():
        unet, vae = sdxl_shapes(), sdxl_vae(device="meta")
    pipe = SimpleNamespace(
        unet=fake_module(unet, dtype),
        vae=fake_module(vae, dtype),
        scheduler=scheduler,
        text_encoder=None,
        _name_or_path="SDXL",
        config={},
    )
    return SDXLBase(pipe, sampler="dpmpp_2m")


def fake_text(base: SDXLBase, batch: int, size: int) -> Text:
    """77 tokens of width 2048, pooled 1280 and sizes."""
    like = {"dtype": base.dtype, "device": base.device}
    ids = torch.empty(batch, 6, **like)
    return Text(torch.empty(batch, 77, 2048, **like), torch.empty(batch, 1280, **like), {"time_ids": ids})


def fake_pulid() -> tuple[PuLID, PuLIDFeatures]:
    """PuLID v1 at full size, float32, trainable; and one person's features."""
    with unset_fake_temporarily():
        with torch.device("meta"):
            pulid = PuLID()
        features = PuLIDFeatures(torch.zeros(1, 1, 1280), [torch.zeros(1, 1, 577, 1024) for _ in range(5)])
    return fake_module(pulid, torch.float32, trained=True), features


def fake_arcface() -> nn.Module:
    """ArcFace-50, float32, frozen."""
    with unset_fake_temporarily(), torch.device("meta"):
        face = IResNet(50)
    return fake_module(face, torch.float32)


class EagerInjection:
    """What `training.injection.Injection` does, by attention processors as they are published: the identity is
    projected at every layer of every pass, text and identity are two attentions, the merge is plain PyTorch.

    Has no checkpointing, and no other layers than the identity's.
    """

    def __init__(self, unet: nn.Module, system: PuLID, options: AttentionOptions) -> None:
        self.system, self.options = system, options
        self.tokens: Tensor | None = None
        self.tap: Any = None
        for site in system.sites(unet):
            attention_of(unet, site).set_processor(_EagerProcessor(self, site))

    def person(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens

    @contextlib.contextmanager
    def using(self, person: Tensor | None, tap: Any = None) -> Iterator[None]:
        before = self.tokens, self.tap
        self.tokens, self.tap = person, tap
        try:
            yield
        finally:
            self.tokens, self.tap = before

    def checkpointed(self, on: bool = False) -> contextlib.AbstractContextManager:
        if on:
            raise ValueError("EagerInjection: it is the yardstick without checkpointing")
        return contextlib.nullcontext()


class _EagerProcessor:
    def __init__(self, injection: EagerInjection, site: Any) -> None:
        self.injection, self.site = injection, site

    def __call__(self, attn: nn.Module, states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        mine, options = self.injection, self.injection.options
        q, k, v = (
            heads(t) for t in (attn.to_q(states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        if mine.tap is not None:
            mine.tap(self.site.name, q, k)
        people = ()
        if mine.tokens is not None:
            people = [heads(t.to(q.dtype)) for t in mine.system.project(self.site, mine.tokens)]
        out = eager_id_attention(
            q, k, v, people[:1], people[1:], id_scale=[1.0] * len(people[:1]), merge=options.merge,
            num_zero=options.num_zero, num_global=options.num_global,
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
