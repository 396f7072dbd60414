"""`attach`: put identities on a diffusers pipeline or UNet, and take them off again without a trace."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import torch
from torch import nn

from .attention.arguments import check_system, options_of
from .attention.conditioning import Conditioning
from .attention.explaining import check_backend, describe
from .attention.guidance import guidance_rows
from .attention.kv_bank import people_of
from .attention.running import Running
from .attention.schedule import steps_of
from .attention.sites import attention_of, unwrap
from .attention.stack import IdStack, stack_of
from .errors import InputError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attach(
    pipe_or_unet: Any,
    system: Any,
    identity: Any,
    *,
    id_scale: Any = 1.0,
    id_mask: Any = None,
    id_guidance_start: Any = 0.0,
    id_guidance_end: Any = 1.0,
    id_schedule: Any = None,
    cfg: Any = "auto",
    backend: str | None = None,
    **options: Any,
) -> Handle:
    """Put identities on a diffusers pipeline or UNet.

    Every cross-attention layer that the system names gets a processor that adds the identity to the text
    attention through one `idcore.ops.id_attention` call. LoRA and IP-Adapter may be loaded before or after.
    Several attaches on one UNet add up, each relative to the text attention, and may be detached in any order.
    Either everything is attached or, with an exception, nothing. Several threads may run one UNet at once, each by
    a pipeline of its own (`from_pipe`, and a scheduler of its own), but must not attach, detach or change it
    meanwhile; a compiled UNet serves one thread at a time.

    Args:
        pipe_or_unet: A pipeline with a `unet` (SD 1.x, SD 2.x, SDXL and their img2img, inpaint, ControlNet forms),
            or the UNet, compiled or not.
        system: An object that meets `idcore.systems.base.System`, e.g. PuLID. None: the identities hold their keys and
            values for this base model themselves (`Identity.with_bank`), or are words, and no adapter's weights are
            needed.
        identity: An `Identity` (one row for all images, or one row per image of the batch), or a list of them:
            several people in one image.
        id_scale: Strength, usually 0 to 5. A number; a mapping per layer as in diffusers' `set_ip_adapter_scale`
            (``{"up": {"block_0": [0.0, 1.0, 0.0]}}``, layers that are not named get 0); a list with one of these per
            identity; or a float32 tensor [], [n] or [n, images], read at every call. The number 0 is
            bit-equal to not attached.
        id_mask: Where each identity acts; see `Handle.masks`.
        id_guidance_start, id_guidance_end, id_schedule: When it acts; see `Handle.schedule`.
        cfg: How a UNet batch is made. "auto": as the guidance of the pipeline says that runs at each call (the attached
            one, or another that shares its UNet: `from_pipe`); of a bare UNet that no pipeline runs, as False. True:
            [uncond, cond] halves. False: cond only. A tuple such as ("cond", "uncond", "uncond")
            (InstructPix2Pix): that order. An identity without `uncond_tokens` does not act on uncond parts.
        backend: Backend of `id_attention` to insist on. Default: the first that can run each call.
        **options: `merge`, `num_zero`, `num_global` in place of the system's own. Systems that act through the prompt
            (DreamIdentity, SeFi-IDE) take a pipeline, `id_scale` 1 or 0, and `placeholder` and `class_word`; see their
            `put_on`.

    Returns:
        A `Handle`, or of a system that acts through the prompt its own kind of one; also a context manager that
        detaches at its end.

    Raises:
        InputError: what was given does not fit together; the text says what does.
        NoBackendError: the named backend cannot run on this model, with its reasons.
    """
    check_system(system)
    if system is None:
        from .systems.loading import system_for

        system = system_for(identity)
    if hasattr(system, "put_on"):
        in_the_unet = {
            "id_mask": id_mask, "id_guidance_start": id_guidance_start or None, "id_schedule": id_schedule,
            "id_guidance_end": None if id_guidance_end == 1.0 else id_guidance_end,
            "cfg": None if cfg == "auto" else cfg,
        }  # fmt: skip
        return _by_prompt(system, pipe_or_unet, identity, in_the_unet, id_scale, backend, options)
    pipe, unet = _parts(pipe_or_unet)
    if system is None:
        from .systems.banked import BankedSystem

        system = BankedSystem.of(identity, unet)
    sites = list(system.sites(unet))
    if not sites:
        raise InputError(f"attach: system {system.name!r} names no layer of this {type(unet).__name__}")
    running = Running(pipe)
    conditioning = Conditioning(
        system,
        people_of(identity, system),
        sites,
        options_of(system, options, inspect.signature(attach)),
        guidance_rows(cfg, running),
        backend,
    )
    conditioning.running = running
    conditioning.set_scale(id_scale)
    conditioning.set_masks(id_mask)
    conditioning.set_schedule(id_guidance_start, id_guidance_end, id_schedule, steps_of(running))
    place = _place(unet, conditioning)
    check_backend(unet, conditioning, place)
    if place is not None:
        conditioning.fill(*place)
    stack = stack_of(unet)
    stack.add(unet, conditioning)
    return Handle(unet, stack, conditioning, steps_of(running))


class Handle:
    """Identities attached to a UNet: change them, look at them, take them off.

    Changes take effect at the next forward, without attaching anew. In a UNet compiled with torch.compile,
    new numbers from `scale` and new identities of the same shape do not compile anew.
    """

    def __init__(self, unet: nn.Module, stack: IdStack, conditioning: Conditioning, steps: Any = None) -> None:
        self._unet = unet
        self._steps = steps
        self._stack = stack
        self._conditioning = conditioning

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.detach()

    def __repr__(self) -> str:
        c = self._conditioning
        state = "attached" if self.attached else "detached"
        return f"Handle({c.system.name}, {len(c.people)} identities, {len(c.sites)} layers, {state})"

    @property
    def attached(self) -> bool:
        """Whether the identities are on the UNet."""
        return any(c is self._conditioning for c in self._stack.layers)

    def detach(self) -> None:
        """Take the identities off; layers that no other attach uses get the very processor objects back that were
        found there (or keep those that were installed since, e.g. by `load_ip_adapter`). May be called again."""
        if self.attached:
            self._stack.remove(self._unet, self._conditioning)
            self._conditioning.bank.forget()

    def scale(self, id_scale: Any) -> None:
        """Set the strength; the forms of `attach`'s id_scale. Raises InputError and changes nothing if it is wrong."""
        self._conditioning.set_scale(id_scale)

    def identity(self, identity: Any) -> None:
        """Swap the identities. Scales stay; masks stay if the number of identities does.

        Raises:
            InputError: they do not fit; the old identities stay.
        """
        c = self._conditioning
        c.set_people(people_of(identity, c.system), _place(self._unet, c))

    def masks(self, id_mask: Any) -> None:
        """Set where each identity acts, or None: everywhere.

        Args:
            id_mask: A layout in words or numbers ("left, right", "1 1 / 1"; see `attention.regions`); or for one
                identity a mask, for several a list with a mask or None each; also the result of
                diffusers' `IPAdapterMaskProcessor.preprocess`. A mask is a PIL image, an array or a tensor [H, W]
                (or [images, H, W]), bool, uint8 or 0..1; it is stretched over the whole picture and averaged
                over each image token's cell.
        """
        self._conditioning.set_masks(id_mask)

    def schedule(
        self,
        id_guidance_start: Any = 0.0,
        id_guidance_end: Any = 1.0,
        id_schedule: Any = None,
        timesteps: Any = None,
    ) -> None:
        """Set when the identities act, from the next forward on; without arguments: always.

        Args:
            id_guidance_start, id_guidance_end: Shares of the run, 0..1, counted as diffusers' `control_guidance_start`
                and `_end`: a number, or one per identity.
            id_schedule: Factors on the scale over the run: a list with one per step (numbers, or rows with one per
                identity), or a float tensor [steps] or [steps, n]; a list of another length is stretched over the run.
            timesteps: Of the run, where a bare UNet is attached: `scheduler.timesteps`. A pipeline tells its own.

        Raises:
            InputError: values out of range or of the wrong count; the old schedule stays.
        """
        self._conditioning.set_schedule(
            id_guidance_start, id_guidance_end, id_schedule, self._steps if timesteps is None else timesteps
        )

    def refresh(self) -> None:
        """Project keys and values of identities and text anew, and put processors back that others replaced, without a
        forward.

        Needed only if weights were changed behind autograd's back (`.data`), or after `load_ip_adapter` on a
        compiled UNet.
        """
        self._conditioning.bank.forget()
        if self.attached:
            self._stack.forget_text()
            self._stack.reconcile()

    def explain(self) -> str:
        """Text: layers, scales, merge, guidance, what stands under each processor, and the backend each layer takes
        with what speaks against the faster ones."""
        return describe(self._unet, self._stack, self._conditioning, self.attached)


def detach(pipe_or_unet: Any) -> int:
    """Take everything off that any `attach` put on a pipeline or UNet, also where its handle was lost (a cell of a
    notebook that ran twice). It is then what it was before.

    Args:
        pipe_or_unet: What was given to `attach`. Of a UNet alone only identities in the attention are taken off: those
            in the prompt (DreamIdentity, SeFi-IDE) are found on a pipeline's tokenizers.

    Returns:
        How many attaches were undone.

    Raises:
        InputError: no pipeline with a UNet, and no UNet.
    """
    pipe, unet = _parts(pipe_or_unet)
    stack, count = stack_of(unet), 0
    for conditioning in list(stack.layers):
        stack.remove(unet, conditioning)
        conditioning.bank.forget()
        count += 1
    if pipe is not None:
        from .text.reader import handles_on

        for handle in handles_on(pipe):
            handle.detach()
            count += 1
    return count


def _by_prompt(
    system: Any, pipe: Any, identity: Any, in_the_unet: dict[str, Any], id_scale: Any, backend: str | None,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """A system that acts through the prompt puts itself on."""
    wrong = [name for name, value in in_the_unet.items() if value is not None]
    given = {**options, **({} if backend is None else {"backend": backend})}
    known = inspect.signature(system.put_on).parameters
    wrong += [name for name in given if name not in known]
    if wrong:
        takes = ", ".join(n for n in known if n not in ("pipe", "identity"))
        raise InputError(
            f"attach: {system.name} acts through the prompt and does not take {', '.join(wrong)}; it takes {takes}"
        )
    return system.put_on(pipe, identity, id_scale=id_scale, **given)


def _parts(pipe_or_unet: Any) -> tuple[Any, nn.Module]:
    """(pipeline or None, UNet)"""
    target = unwrap(pipe_or_unet)
    if isinstance(target, nn.Module):
        return None, target
    unet = unwrap(getattr(target, "unet", None))
    if isinstance(unet, nn.Module):
        return target, unet
    what = "no unet" if getattr(target, "transformer", None) is None else "a transformer in place of a UNet"
    raise InputError(
        "attach: wanted a diffusers pipeline with a UNet (SD 1.x, SD 2.x, SDXL) or that UNet; "
        f"{type(target).__name__} has {what}"
    )


def _place(unet: nn.Module, conditioning: Conditioning) -> tuple[torch.dtype, torch.device] | None:
    """dtype and device in which the layers will ask for keys and values; None if that shows only when they run."""
    site = next(iter(conditioning.sites.values()))
    weight = next(attention_of(unet, site).to_q.parameters(), None)
    if weight is None or weight.device.type == "meta" or weight.dtype not in _FLOATS:
        return None
    return weight.dtype, weight.device


class _CallableModule(types.ModuleType):
    """`idcore.attach` names both this module and the function; whichever was loaded first, it can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Handle:
        return attach(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
