"""Bases by name, and where they draw faces."""

import numpy as np
import pytest
import torch

from idcore.errors import WeightsError
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.opening import face_points, open_base
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.bases.tiny import TinyBase


@pytest.mark.parametrize(("kind", "cls"), [("sd", SD15Base), ("sdxl", SDXLBase)])
def test_a_pipeline_s_folder_opens_as_what_it_says(tmp_path, kind, cls):
    tiny_pipeline(kind).save_pretrained(tmp_path)
    base = open_base(str(tmp_path), dtype=torch.bfloat16)
    assert type(base) is cls and base.dtype == torch.bfloat16 and base.name == str(tmp_path)
    assert face_points(base, 64) is None


def test_the_embedded_model_draws_faces_in_one_place():
    base = open_base("tiny")
    points = face_points(base, 64)
    assert isinstance(base, TinyBase) and points.shape == (5, 2) and 0 < points.min() < points.max() < 64
    np.testing.assert_allclose(face_points(base, 128) + 0.5, 2 * (points + 0.5))
    assert points[0, 0] < points[2, 0] < points[1, 0] and points[3, 1] > points[2, 1] > points[0, 1]


def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(WeightsError, match='is a FluxPipeline; wanted "tiny-sd"'):
        open_base(str(tmp_path))
