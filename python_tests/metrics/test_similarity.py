"""Similarity: values by hand, thresholds, words, and bad embeddings."""

import numpy as np
import pytest

from idcore.errors import InputError
from idcore.metrics.similarity import ARCFACE_COSINE, CAVEAT, DLIB_L2, Similarity


def test_l2_by_hand():
    a, b = np.array([0.0, 3.0]), np.array([4.0, 0.0])
    assert DLIB_L2.value(a, b) == 5.0 and DLIB_L2.value(a, a) == 0.0
    np.testing.assert_allclose(DLIB_L2.matrix([a, b], [a, b, a]), [[0, 5, 0], [5, 0, 5]])
    assert DLIB_L2.is_same(0.6) and not DLIB_L2.is_same(0.61)
    assert DLIB_L2.margin(0.5) == pytest.approx(0.1) and DLIB_L2.margin(0.7) == pytest.approx(-0.1)


def test_cosine_by_hand():
    a, b = np.array([2.0, 0.0]), np.array([3.0, 3.0])
    assert ARCFACE_COSINE.value(a, b) == pytest.approx(np.sqrt(0.5))
    assert ARCFACE_COSINE.value(a, -a) == -1.0 and ARCFACE_COSINE.value(b, 7 * b) == pytest.approx(1)
    assert ARCFACE_COSINE.is_same(0.4) and not ARCFACE_COSINE.is_same(0.39)
    assert ARCFACE_COSINE.margin(0.5) == pytest.approx(0.1)


def test_words():
    same = DLIB_L2.compare(np.zeros(3), np.array([0.1, 0, 0]))
    assert same.same and same.value == pytest.approx(0.1)
    assert str(same) == (
        "L2 distance 0.100 (dlib's face recognition ResNet), within the threshold 0.6: the same person."
    )
    other = ARCFACE_COSINE.compare([1.0, 0.0], [0.0, 1.0])
    assert not other.same and "cosine similarity 0.000 (ArcFace), beyond the threshold 0.4: not the same" in other.text
    for measure in (DLIB_L2, ARCFACE_COSINE):
        text = measure.describe()
        assert measure.source in text and f"{measure.threshold:g}" in text and CAVEAT in text
    assert "smaller is more alike" in DLIB_L2.describe() and "larger is more alike" in ARCFACE_COSINE.describe()


@pytest.mark.parametrize(
    "a, b, text",
    [
        (np.zeros(128), np.zeros(512), "of 128 and 512 numbers cannot be compared.*different recognisers"),
        (np.zeros((2, 3)), np.zeros(3), r"compares two embeddings, got 2 and 1: use matrix\(\)"),
        (np.zeros((1, 2, 3)), np.zeros(3), r"must be \[E\] or \[N,E\], got \[1, 2, 3\]"),
        (np.zeros(0), np.zeros(0), r"must be \[E\] or \[N,E\]"),
        (np.array([np.nan, 0]), np.zeros(2), "NaN or infinite"),
    ],
)
def test_bad_embeddings(a, b, text):
    with pytest.raises(InputError, match=text):
        DLIB_L2.value(a, b)


def test_zero_has_no_cosine():
    with pytest.raises(InputError, match="length zero"):
        ARCFACE_COSINE.value(np.zeros(3), np.ones(3))


def test_bad_measures():
    with pytest.raises(InputError, match="Unknown measure 'dot': wanted 'l2' or 'cosine'"):
        Similarity("dot", 0.5, "x", "y")
    with pytest.raises(InputError, match="lies in -1.0..1.0, got 1.5"):
        Similarity("cosine", 1.5, "x", "y")
    with pytest.raises(InputError, match="got -0.1"):
        Similarity("l2", -0.1, "x", "y")
