"""A system of your own, outside the package: meet the `System` protocol and hand the object to `idcore.attach`.

Run it: `python examples/my_system.py`. It uses a tiny random SDXL pipeline, so it needs no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import idcore
from idcore.attention.sites import find_sites
from idcore.systems.base import AttentionOptions, Site


class MySystem(nn.Module):
    """Identity tokens [Bi, L, E] become keys and values by one linear map per layer."""

    name = "mine"
    options = AttentionOptions(merge="ortho", num_zero=4)

    def __init__(self, unet: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({str(s.index): nn.Linear(width, 2 * s.hidden) for s in find_sites(unet)})

    def sites(self, unet: nn.Module) -> list[Site]:
        return find_sites(unet)

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.maps[str(site.index)](tokens).chunk(2, dim=-1)


def main() -> None:
    from idcore.testing.tiny_models import tiny_pipeline

    torch.manual_seed(0)
    pipe = tiny_pipeline("sdxl")
    system = MySystem(pipe.unet).requires_grad_(False)
    me = idcore.Identity(torch.randn(1, 5, 16), None, "mine")

    def draw():
        generator = torch.Generator().manual_seed(0)
        made = pipe("a person", num_inference_steps=2, height=16, width=16, output_type="np", generator=generator)
        return made.images[0]

    before = draw()
    with idcore.attach(pipe, system, me, id_scale=1.0) as handle:
        during = draw()
        print(handle.explain())
    after = draw()
    print(
        "changed while attached:",
        bool((during != before).any()),
        " as before afterwards:",
        bool((after == before).all()),
    )


if __name__ == "__main__":
    main()
