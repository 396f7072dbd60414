"""What a system (one published method) must offer so that `idcore.attach` can put it on a UNet.

No base class and no registry: any object with these members works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..attention.types import AttentionOptions, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AttentionOptions", "Site", "System"]


@runtime_checkable
class System(Protocol):
    """A method that turns identity tokens into keys and values for chosen cross-attention layers.

    A system may also have `bank(person, sites)`: keys and values [R, H, L, D] of a person at all sites at once, rows
    [uncond, cond] or cond alone, without gradients; or None, and `project` is asked layer by layer.
    """

    name: str

    @property
    def options(self) -> AttentionOptions:
        """How the identity joins the text attention; `attach(..., **options)` overrides single values."""
        ...

    def sites(self, unet: nn.Module) -> list[Site]:
        """The layers of this UNet that the system conditions; raises InputError if the UNet does not fit.

        Usually `idcore.attention.sites.find_sites(unet)`, checked against the system's weights.
        """
        ...

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer.

        Args:
            site: One of `sites(unet)`.
            tokens: [Bi, L, E], as stored in the identity (float32, any device). The system moves them to
                its own weights' device and dtype.

        Returns:
            (k, v), each [Bi, L, C] with C = `site.hidden`; any floating dtype and device. The caller casts
            them to the queries' dtype, and keeps them as long as identity and weights do not change.
        """
        ...
