"""idcore's nodes for ComfyUI: identities of people on SDXL and SD 1.5 models."""


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    from .nodes import IdcoreExtension

    return IdcoreExtension()


__all__ = ["comfy_entrypoint"]
