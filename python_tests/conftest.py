"""Shared settings: fixed seed, two threads at most, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Commands that tests call in this process would otherwise hold the libraries to errors for the tests after them.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "warning")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
# Kept graphs do not notice that the fake form of one of our ops has changed since.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: threads that wait must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """GPU tests say why they are skipped; nightly tests run only when asked for by `-m nightly`.

    IDCORE_TEST_SHARD=i/n keeps every nth test, from the ith on: n processes share a slow suite.
    """
    index, count = map(int, os.environ.get("IDCORE_TEST_SHARD", "0/1").split("/"))
    items[:] = items[index::count]
    gpu = torch.cuda.is_available()
    wants_nightly = "nightly" in (config.getoption("-m") or "")
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("nightly") and not wants_nightly:
            item.add_marker(pytest.mark.skip(reason="nightly; run with -m nightly"))
