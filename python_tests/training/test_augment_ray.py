"""`idcore augment` on a Ray cluster of this machine: the same data set, whoever dies."""

import sys
from dataclasses import replace

import augment_cases
import pytest
from augment_cases import COLOURS, Painted
from test_augment import contents, everything, job, lines

from idcore.errors import IdcoreError, InputError, MissingDependencyError
from idcore.training.augment.on_ray import Cluster
from idcore.training.augment.run import augment
from idcore.training.augment.store import Folder

ray = pytest.importorskip("ray")
NAMES = [*COLOURS, "ghost", "stubborn"]


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests here, which `Cluster` finds running and leaves running."""
    for last in (False, False, True):  # Ray gives its processes 30 seconds to start
        try:
            ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
            break
        except Exception:
            ray.shutdown()
            if last:
                raise
    for module in (augment_cases, sys.modules[__name__]):  # workers cannot import tests
        ray.cloudpickle.register_pickle_by_value(module)
    yield Cluster(workers=2, cpus=0.5)
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    augment(NAMES, folder, job(), progress=False)
    return contents(folder)


def test_a_cluster_makes_the_same_data_set_and_goes_on_with_one(cluster, whole, tmp_path):
    augment(NAMES[:2], tmp_path, job(), progress=False)
    before = everything(tmp_path)
    report = augment(NAMES, tmp_path, job(), cluster=cluster, progress=False)
    assert report.reused == 2 and contents(tmp_path) == whole
    stood = [k for k in before if k.startswith(("pictures/", "names/"))]
    assert all(everything(tmp_path)[k] == before[k] for k in stood)  # not written again


def test_a_worker_that_is_killed_is_started_anew(cluster, whole, tmp_path):
    mortal = job(models=Painted(dies=str(tmp_path), kill="cy", deaths=2))
    augment(NAMES, tmp_path / "out", mortal, cluster=cluster, progress=False)
    assert (tmp_path / "death-0").exists() and (tmp_path / "death-1").exists()
    assert contents(tmp_path / "out") == whole
    rows = lines(tmp_path / "out", "index.jsonl")
    assert len({r["id"] for r in rows}) == len(rows)


def test_a_worker_that_always_dies_ends_the_run_and_what_stands_is_kept(cluster, whole, tmp_path):
    mortal = job(models=Painted(dies=str(tmp_path), kill="cy", deaths=9))
    once = replace(cluster, workers=1, retries=1)
    with pytest.raises(IdcoreError, match="a worker died more than 1 times.*fewer --workers or a smaller batch"):
        augment(["ada", "cy"], tmp_path / "out", mortal, cluster=once, progress=False)
    assert len(list(tmp_path.glob("death-*"))) == 2
    report = augment(NAMES, tmp_path / "out", job(), progress=False)  # here, without a cluster
    assert report.reused <= 1 and contents(tmp_path / "out") == whole


def test_an_error_of_a_worker_is_told_as_it_is(cluster, tmp_path):
    with pytest.raises(InputError, match="augment: there is no face in this test"):
        augment(["ada"], tmp_path, job(models=Broken()), cluster=cluster, progress=False)
    assert not Folder(tmp_path, job(models=Broken()).fingerprint()).stands("ada")


class Broken(Painted):
    def build(self, config):
        base, faces, texts = super().build(config)
        base.text = self._refuse
        return base, faces, texts

    def _refuse(self, *args):
        raise InputError("augment: there is no face in this test")


def test_bad_clusters_are_refused(monkeypatch):
    with pytest.raises(InputError, match="at least 1 worker, .* got workers 0"):
        Cluster(workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"needs Ray: pip install 'idcore\[ray\]'"):
        next(Cluster().run(["ada"], job()))


def test_nobody_is_at_the_address(monkeypatch):
    def refuse(**options):
        assert options["address"] == "10.0.0.9:6379"
        raise ConnectionError("Failed to connect to GCS\nat length")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(IdcoreError, match=r"no Ray cluster at '10.0.0.9:6379' \(Failed to connect to GCS\); start one"):
        next(Cluster("10.0.0.9:6379").run(["ada"], job()))
