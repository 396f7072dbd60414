"""Pictures and settings that the tests of StyleForge share."""

import numpy as np
from diffusers import DDIMScheduler
from PIL import Image

from idcore.testing.tiny_models import tiny_pipeline, tiny_unet
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.styleforge.config import load_config
from idcore.training.styleforge.run import StyleData

SMALL = (
    "model.resolution=16", "tune.rank=2", "loop.steps=2", "loop.batch=2", "loop.lr=1e-2", "loop.validate_every=0",
    "loop.save_every=50", "loop.trackers=", "pictures.mix=false", "search.steps=2", "search.guidance=1",
)  # fmt: skip


def base_of(kind="sd"):
    if kind == "sd2":  # as SD 2.1 differs: linear projections, velocity prediction
        scheduler = DDIMScheduler(prediction_type="v_prediction", steps_offset=1)
        unet = tiny_unet("sd", use_linear_projection=True)
        return SD15Base(tiny_pipeline("sd", unet=unet, scheduler=scheduler))
    return {"sd": SD15Base, "sdxl": SDXLBase}[kind](tiny_pipeline(kind))


def pictures(count, seed=0, size=16):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)) for _ in range(count)]


def folder(path, count, seed=0):
    path.mkdir(parents=True)
    for i, p in enumerate(pictures(count, seed)):
        p.save(path / f"{i}.png")
    return path


def settings(*changes, base="random"):
    return load_config(None, [*SMALL, *changes], base)


def data(multi=False):
    if multi:
        return StyleData(aux=pictures(2, 2), people=pictures(3), backgrounds=pictures(2, 1))
    return StyleData(pictures(3), pictures(2, 2))
