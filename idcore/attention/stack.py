"""All identities attached to one UNet, and the processors that carry them."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .conditioning import Conditioning
from .processors import Binding, IdAttnProcessor, make_processor
from .staged import StagedText
from .types import Site


class _PerThread(threading.local):
    """Size of the UNet's input in the forward that runs in this thread."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def __reduce__(self) -> tuple:
        return _PerThread, ()


def _plain_python_unless_inlined(fn: Any) -> Any:
    """Keep torch.compile from making a graph of its own of `fn`.

    `torch.compile(unet)` calls the UNet's hooks outside of its graph, but would compile each as one more graph, in
    which nothing can be put back. `unet.compile()` traces hooks together with the UNet: that stays possible.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(fn.__code__, skip)
    elif hasattr(frames, "skip_code"):  # torch before 2.7
        frames.skip_code(fn.__code__)
    return fn


_never_compiled = functools.cache(torch.compiler.disable)


class IdStack:
    """Conditionings of one UNet, in the order of their `attach`; also the UNet's forward pre-hook.

    The hook notes the size of the latent (for masks) and puts our processors back over whatever was
    installed since the last forward, e.g. by `load_ip_adapter`. It lives only in the UNet's hooks: there is
    no registry, and a UNet without conditionings has neither hook nor processors of ours.
    """

    def __init__(self) -> None:
        self.layers: list[Conditioning] = []
        self.by_site: dict[str, tuple[Conditioning, ...]] = {}
        self.slots: dict[str, tuple[Site, nn.Module, IdAttnProcessor]] = {}
        self.hook: Any = None
        self.staged: StagedText | None = None
        self.here = _PerThread()
        self.latest: tuple[int, int] | None = None
        # Shown (site name, q [B, H, Lq, D], text k [Bt, H, Lt, D]) at every layer while set (`training.injection`).
        self.tap: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None

    # -- reading, at every call -----------------------------------------------------------------

    def active(self, name: str) -> list[Conditioning]:
        """Conditionings that change layer `name` now.

        A compiled graph keeps those at scale 0, so that changing a scale never compiles anew.
        """
        layers = self.by_site.get(name, ())
        if torch.compiler.is_compiling():
            return list(layers)
        return [c for c in layers if not c.is_off(name)]

    def staged_at(self, name: str) -> StagedText | None:
        """What reads wide text at layer `name`; None where text is plain in any case."""
        return self.staged if self.staged is not None and name in self.staged.sites else None

    def size(self) -> tuple[int, int] | None:
        """Height and width of the UNet's input; recomputation in autograd's own threads takes the latest."""
        return self.here.size or self.latest

    @_plain_python_unless_inlined
    def __call__(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """The forward pre-hook."""
        sample = args[0] if args else kwargs.get("sample")
        if sample is not None:
            self.here.size = self.latest = (sample.shape[-2], sample.shape[-1])
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        if torch.compiler.is_compiling():
            self._begin_traced(timestep, sample)
        elif "torch._dynamo" in sys.modules:
            _never_compiled(IdStack._begin)(self, unet, timestep, sample)
        else:  # no compiler in this process; importing it here would take longer than a small UNet's pass
            self._begin(unet, timestep, sample)

    def _begin(self, unet: nn.Module, timestep: Any, sample: torch.Tensor) -> None:
        if self.staged is not None:
            self.staged.begin(timestep, sample.device)
        for c in self.layers:
            if c.running is not None:
                c.running.look(unet)
            c.rows_now = c.rows()
            c.begin(timestep)
        self.reconcile()

    def _begin_traced(self, timestep: Any, sample: torch.Tensor) -> None:
        if self.staged is not None:
            self.staged.begin(timestep, sample.device)
        for c in self.layers:
            c.rows_now = c.rows()
            c.begin_traced(timestep)
        for _, attn, ours in self.slots.values():
            if attn.processor is not ours:
                raise InputError(
                    "attach: processors were replaced (load_ip_adapter, set_attn_processor) since the last forward; "
                    "call handle.refresh() before this compiled UNet runs again"
                )

    # -- attaching and detaching ----------------------------------------------------------------

    def add(self, unet: nn.Module, conditioning: Conditioning) -> None:
        """Put a conditioning on; either all of it, or, with an exception, nothing."""
        self._set_layers([*self.layers, conditioning])
        try:
            self._settle(unet, conditioning.sites.values())
        except BaseException:
            self.remove(unet, conditioning)
            raise

    def add_staged(self, unet: nn.Module, staged: StagedText) -> None:
        """Let the layers read wide text; all of them or, with an exception, none.

        Raises:
            InputError: they do so already, or a layer holds a processor that cannot.
        """
        if self.staged is not None:
            raise InputError(
                "attach: this UNet already reads staged text (SeFi-IDE); attach several people at once, as a list, or "
                "detach the first"
            )
        self.staged = staged
        try:
            staged.fill(next(unet.parameters()).device)
            self._settle(unet, staged.sites.values())
            for site, attn, ours in (self.slots[n] for n in staged.sites):
                _check_stageable(site, attn, ours.id_binding)
        except BaseException:
            self.remove_staged(unet)
            raise

    def remove_staged(self, unet: nn.Module) -> None:
        """Undo `add_staged`."""
        self.staged = None
        self._give_back(unet)

    def _settle(self, unet: nn.Module, sites: Iterable[Site]) -> None:
        self.reconcile()
        for site in sites:
            if site.name not in self.slots:
                self._cover(site, unet.get_submodule(site.path))
        if self.hook is None:
            self.hook = unet.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self, unet: nn.Module, conditioning: Conditioning) -> None:
        """Take a conditioning off; processors of layers that none uses any more are given back."""
        self._set_layers([c for c in self.layers if c is not conditioning])
        self._give_back(unet)

    def _give_back(self, unet: nn.Module) -> None:
        for name in [n for n in self.slots if n not in self.by_site and self.staged_at(n) is None]:
            _, attn, ours = self.slots.pop(name)
            found = self._resting(attn.processor, ours)
            if found is not attn.processor:
                attn.set_processor(found)
        if not self.layers and self.staged is None:
            self._mend_saved(unet)
            if self.hook is not None:
                self.hook.remove()
                self.hook = None

    def forget_text(self) -> None:
        """Drop the text's keys and values."""
        for _, _, ours in self.slots.values():
            ours.id_binding.text.forget()

    def reconcile(self) -> None:
        """Put our processors back over what others installed in the meantime.

        Raises:
            InputError: a processor that an identity cannot join was installed.
        """
        for name, (site, attn, ours) in list(self.slots.items()):
            current = attn.processor
            if current is ours:
                continue
            binding = _binding(current)
            if isinstance(current, IdAttnProcessor) and binding is None:
                attn.set_processor(ours)
            elif binding is not None and binding.stack is self:
                self.slots[name] = (site, attn, current)
            else:
                self._cover(site, attn)

    def _cover(self, site: Site, attn: nn.Module) -> None:
        _check_layer(site, attn)
        found = attn.processor
        while (binding := _binding(found)) is not None:
            found = binding.found
        if isinstance(found, IdAttnProcessor):
            found = _fresh()
        ours = make_processor(self, site, found)
        attn.set_processor(ours)
        self.slots[site.name] = (site, attn, ours)

    def _resting(self, current: Any, ours: IdAttnProcessor) -> Any:
        """What stays on a layer that we leave: what we found, or what somebody put there since."""
        if not isinstance(current, IdAttnProcessor):
            return current
        binding = _binding(current)
        return ours.id_binding.found if binding is None or binding.stack is not self else binding.found

    def _mend_saved(self, unet: nn.Module) -> None:
        """`fuse_qkv_projections` remembers processors to restore later; ours must not be among them."""
        saved = getattr(unet, "original_attn_processors", None)
        for name, processor in (saved or {}).items():
            binding = _binding(processor)
            if binding is not None and binding.stack is self:
                saved[name] = binding.found

    def _set_layers(self, layers: Sequence[Conditioning]) -> None:
        self.layers = list(layers)
        names = {name: None for c in layers for name in c.sites}
        self.by_site = {name: tuple(c for c in layers if name in c.sites) for name in names}


def stack_of(unet: nn.Module) -> IdStack:
    """The stack that hangs on this UNet's hooks, or a new, empty one."""
    for hook in unet._forward_pre_hooks.values():
        if isinstance(hook, IdStack):
            return hook
    return IdStack()


def _binding(processor: Any) -> Binding | None:
    return processor.id_binding if isinstance(processor, IdAttnProcessor) else None


def _fresh() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def _check_layer(site: Site, attn: nn.Module) -> None:
    if not attn.scale_qk:
        raise InputError(
            f"attach: {site.name} does not divide its logits by sqrt(head_dim) (scale_qk=False), "
            "which identity attention needs"
        )


def _check_stageable(site: Site, attn: nn.Module, binding: Binding) -> None:
    if binding.kind == "other" or attn.norm_cross is not None:
        what = type(binding.found).__name__ if binding.kind == "other" else "a normalisation of the text (norm_cross)"
        raise InputError(
            f"attach: {site.name} holds {what}, which staged text (SeFi-IDE) cannot go through; restore the layer with "
            "unet.set_attn_processor, or use another base model"
        )
