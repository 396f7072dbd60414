"""FID and KID against scipy's matrix root, naive loops and torchmetrics; the bootstrap against known intervals."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from idcore.errors import InputError
from idcore.metrics.distances import frechet_distance, kernel_distance
from idcore.metrics.intervals import change, interval


def two(n=60, m=80, d=12, seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(size=(m, d)) * 1.5 + shift


def naive_fid(a, b):
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)


def naive_kid(x, y):
    d = x.shape[1]

    def k(p, q):
        return (sum(float(u) * float(v) for u, v in zip(p, q)) / d + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(p, q) for p in x for q in y) / (m * n)


@pytest.mark.parametrize("shape", [(60, 80, 12), (200, 13, 12), (14, 500, 12)])
def test_fid_is_the_published_formula(shape):
    a, b = two(*shape)
    assert frechet_distance(a, b) == pytest.approx(naive_fid(a, b), rel=1e-9)


def test_fid_with_fewer_pictures_than_features():
    a, b = two(6, 9, 40)  # both covariances are singular: scipy's root is inexact there, so compare with its limit
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    w, v = np.linalg.eigh(ca)
    root = (v * np.sqrt(w.clip(0))) @ v.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8 * np.trace(ca))


def test_kid_is_the_published_formula():
    x, y = two(9, 9, 5)
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(naive_kid(x, y), rel=1e-12)
    assert (found.std, found.subsets, found.size) == (0.0, 1, 9)


def test_kid_over_subsets_is_seeded_and_near_the_whole():
    x, y = two(400, 500, 8)
    whole = kernel_distance(x, y[:400]).mean
    parts = kernel_distance(x, y, subsets=60, size=100, seed=3)
    assert parts == kernel_distance(x, y, subsets=60, size=100, seed=3)
    assert parts != kernel_distance(x, y, subsets=60, size=100, seed=4)
    assert parts.size == 100 and parts.subsets == 60 and abs(parts.mean - whole) < 3 * parts.std
    same = kernel_distance(x, x[::-1], subsets=60, size=100)
    assert abs(same.mean) < 3 * same.std


class Mean(torch.nn.Module):
    """Feature network of torchmetrics' form: means of 8 patches."""

    num_features = 8

    def forward(self, x):
        return x.double().reshape(len(x), 8, -1).mean(-1) / 255


def test_both_equal_torchmetrics():
    fids, kids = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (40, 3, 8, 8), generator=g, dtype=torch.uint8)
    b = torch.randint(30, 256, (50, 3, 8, 8), generator=g, dtype=torch.uint8)
    net = Mean()
    fa, fb = (net(x).numpy() for x in (a, b))
    fid = fids.FrechetInceptionDistance(feature=net).set_dtype(torch.float64)
    kid = kids.KernelInceptionDistance(feature=net, subsets=1, subset_size=40)
    for metric in (fid, kid):
        metric.update(a, real=True)
        metric.update(b[:40] if metric is kid else b, real=False)
    assert frechet_distance(fa, fb) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kernel_distance(fa, fb[:40]).mean == pytest.approx(float(kid.compute()[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "N at least 2, got \\[1, 3\\]"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "4 and 3 numbers come from different networks"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "NaN or infinite"),
    ],
)
def test_features_that_are_refused(a, b, said):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(InputError, match=said):
            distance(a, b)


def test_subsets_that_are_refused():
    with pytest.raises(InputError, match="at least 1 subset of at least 2"):
        kernel_distance(*two(), size=1)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for k in range(200):
        found = interval(rng.normal(3, 1, 40), seed=k, rounds=300)
        hits += found.low <= 3 <= found.high
    assert 0.88 <= hits / 200 <= 0.98
    assert interval([1.0, 2.0, 5.0]) == interval([1.0, 2.0, 5.0])
    assert interval([4.0]).as_dict() == {"mean": 4.0, "low": None, "high": None, "n": 1}
    assert interval([]).as_dict()["mean"] is None


def test_pairs_see_a_change_that_means_hide():
    rng = np.random.default_rng(2)
    before = rng.normal(0, 10, 50)
    after = before - 0.5 + rng.normal(0, 0.1, 50)
    assert change(before, after, paired=True).high < 0
    loose = change(before, after, paired=False)
    assert loose.low < 0 < loose.high and loose.mean == pytest.approx(change(before, after, paired=True).mean)
