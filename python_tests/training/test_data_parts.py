"""Face parsing on its way from the chip to the batch, and into L_diff."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_cases import RedAnalyzer, folder
from pulid_cases import DrawnPeople

from idcore.encoders.eva_clip import EvaClipConfig, EvaClipVisual
from idcore.encoders.face_parsing import LABELS
from idcore.encoders.pulid_preprocess import PuLIDPreprocess
from idcore.errors import InputError
from idcore.training.contract import Step
from idcore.training.data.faces import PuLIDFaces
from idcore.training.data.options import PrepareConfig
from idcore.training.data.parts import UNSEEN, face_weights, parts_map
from idcore.training.data.prepare import prepare
from idcore.training.data.source import PreparedSource, SourceConfig
from idcore.training.losses.diffusion import diffusion_loss
from idcore.training.pulid.config import load_config
from idcore.training.pulid.run import new_system
from idcore.training.pulid.task import PuLIDTask

EVA = EvaClipConfig(
    image_size=24, patch_size=8, width=16, depth=6, heads=2, mlp_dim=10, embed_dim=6, rope_grid=2, taps=(1, 2, 3, 4, 5)
)
NOSE, HAIR = LABELS.index("nose"), LABELS.index("hair")


class RedParsing:
    """Red pixels are nose, all others hair."""

    weights_hash = "red"

    def labels(self, images):
        red = (images[:, 0] > 0.6) & (images[:, 1] < 0.3)
        return torch.where(red, NOSE, HAIR)


class Analyzer(RedAnalyzer):
    def embed(self, image, face):
        return np.ones(8, np.float32)


class Setup:
    def build(self):
        torch.manual_seed(0)
        chain = PuLIDPreprocess(Analyzer(), EvaClipVisual(EVA).eval(), RedParsing(), id_dim=8)
        return chain.analyzer, PuLIDFaces(chain)

    def fingerprint(self):
        return {"system": "red"}


def test_a_chip_s_classes_lie_where_they_were_in_the_picture():
    labels = np.full((512, 512), HAIR, np.uint8)
    labels[128:256, 64:192] = NOSE
    matrix = np.array([[2.0, 0, -100], [0, 2.0, -60]])  # twice as large, moved
    found = parts_map(labels, matrix, (400, 200))
    x, y = np.meshgrid((np.arange(128) + 0.5) / 128 * 400 - 0.5, (np.arange(128) + 0.5) / 128 * 200 - 0.5)
    u, v = 2 * x - 100, 2 * y - 60
    outside = (u < -0.5) | (v < -0.5) | (u > 511.5) | (v > 511.5)
    nose = (u > 64) & (u < 191) & (v > 128) & (v < 255)
    assert (found.numpy()[outside] == UNSEEN).all() and (found.numpy()[nose] == NOSE).all()
    assert (found == NOSE).sum() == pytest.approx(64 * 64 / (400 * 200) * 128**2, rel=0.06)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_batch_says_which_pixels_are_the_face(tmp_path, flip):
    folder(tmp_path / "data", 3, sizes=((96, 96), (128, 96)))
    prepare(
        tmp_path / "data",
        tmp_path / "out",
        PrepareConfig(resolution=64, min_face=16, flip=True),
        Setup(),
        progress=False,
    )
    source = PreparedSource(tmp_path / "out", SourceConfig(flip=flip))
    for step in range(3):
        (batch,) = source.micro_batches(step, 0, 0, 1, 1, 1)
        parts, red = batch.extra["parts"], (batch.pixels[:, 0] > 0.2) & (batch.pixels[:, 1] < -0.4)
        assert parts.dtype == torch.uint8 and parts.shape == red.shape and "parts" not in batch.face
        nose = parts == NOSE
        assert red.any() and (nose & red).sum() > 0.9 * (nose | red).sum()


def test_weights_of_the_face():
    parts = torch.full((2, 8, 8), HAIR, dtype=torch.uint8)
    parts[0, :4] = NOSE
    weight = face_weights(parts, (4, 4), 3.0)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(2)) and torch.equal(weight[1], torch.ones(1, 4, 4))
    assert weight[0, 0, 0, 0] == 4 * weight[0, 0, 3, 0]
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    b[0, :, :2] = 2  # squares 4 where the weight is 1.6, 1 where it is 0.4; and 1 everywhere
    assert diffusion_loss(a, b, where=weight).item() == pytest.approx(((4 * 1.6 + 0.4) / 2 + 1) / 2)


def test_face_weight_changes_the_loss_and_wants_parsed_data():
    config = load_config(None, ["encoder.width=16", "encoder.output_dim=24", "encoder.init=random"], "tiny")
    from idcore.training.bases.tiny import TinyBase

    base, losses = TinyBase.from_package(), {}
    (batch,) = DrawnPeople(2).micro_batches(0, 0, 0, 1, 2, 1)
    parts = torch.full((2, 64, 64), HAIR, dtype=torch.uint8)
    parts[:, 20:44, 20:44] = NOSE
    for weight in (0.0, 4.0):
        made = replace(config, loss=replace(config.loss, face_weight=weight))
        task = PuLIDTask(new_system(made, base), 1, made, base)
        try:
            if weight:
                with pytest.raises(InputError, match="face_weight wants the parsing of the faces.*--parsing FILE"):
                    task.losses(batch, Step(0, 0, 1))
            batch.extra["parts"] = parts
            losses[weight] = task.losses(batch, Step(0, 0, 1))["diffusion"].item()
            del batch.extra["parts"]
        finally:
            task.close()
    assert losses[4.0] != losses[0.0]
