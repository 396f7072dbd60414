"""The embedded recogniser's features in PuLID's shape."""

import numpy as np
import pytest
import torch

from idcore.encoders.align import align
from idcore.encoders.analyzer import default_analyzer
from idcore.encoders.dlib_tokens import EMBEDDING_STD, STAGE_MEAN, STAGE_STD, DlibTokens
from idcore.encoders.scrfd import ArcFace
from idcore.errors import InputError, NoFaceError
from idcore.training.data.procedural import draw


@pytest.fixture(scope="module")
def tokens():
    return DlibTokens()


def test_a_photo_gives_pulid_features_of_about_unit_deviation(tokens):
    faces = [tokens(draw(seed)[0]) for seed in (0, 1, 2)]
    for f in faces:
        assert f.id_cond.shape == (1, 1, 128) and [tuple(h.shape) for h in f.hidden] == [(1, 1, 65, 256)] * 5
        assert 0.8 < float(f.id_cond.std()) < 1.25
        for h, channels in zip(f.hidden, (32, 64, 128, 256, 256)):
            assert 0.6 < float(h[..., :channels].std()) < 1.5 and not h[..., channels:].any()
    assert faces[0].meta["recogniser"].startswith("sha256:")
    assert tokens([draw(0)[0], draw(1)[0]]).n == 2


def test_tokens_are_the_networks_own_outputs_in_place(tokens):
    """Token 1 + 8 y + x of a stage with an 8x8 map is that map's cell; the first token is the mean."""
    picture = draw(1)[0]
    face = tokens.analyzer.detect(picture)[0]
    found = tokens.features(picture, face)
    chips = [align(picture, face.points, "dlib", 150, padding)[None] for padding in (0.25, 0.6)]
    recogniser = default_analyzer().recogniser
    cells = (recogniser.features(chips[1]).feats[2][0] - STAGE_MEAN[2]) / STAGE_STD[2]
    np.testing.assert_allclose(found["hidden.2"][0, 1 + 8 * 3 + 5, :128], cells[:, 3, 5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["hidden.2"][0, 0, :128], cells.mean((1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["id_cond"], recogniser.embed(chips[0]) / EMBEDDING_STD, rtol=1e-5)


def test_people_differ_more_than_looks_at_one_person(tokens):
    a, b, c = (tokens(draw(seed)[0]).id_cond.flatten() for seed in (0, 1, 2))
    brighter = tokens(draw(0)[0].point(lambda v: min(255, int(v * 1.15)))).id_cond.flatten()
    assert torch.dist(a, brighter) < 0.7 * min(torch.dist(a, b), torch.dist(a, c))


def test_bad_input(tokens):
    with pytest.raises(NoFaceError, match="no face in photo 2 .40x30.; use one"):
        tokens([draw(0)[0], np.zeros((30, 40, 3), np.uint8)])
    with pytest.raises(InputError, match="at least one photo"):
        tokens([])
    other = type("Other", (), {"name": "antelope", "recogniser": ArcFace.__new__(ArcFace)})()
    with pytest.raises(InputError, match="antelope has another one"):
        DlibTokens(other)
