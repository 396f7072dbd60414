"""The face features that training reads are those that inference computes; `idcore prepare` from the command line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from idcore.cli import app
from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.encoders.dlib_tokens import DlibTokens
from idcore.encoders.eva_clip import EvaClipConfig, EvaClipVisual
from idcore.encoders.pulid_preprocess import PuLIDPreprocess
from idcore.errors import IdcoreError, InputError
from idcore.training.bases.tiny import TinyBase
from idcore.training.data.faces import Faces, PuLIDFaces, pulid_features
from idcore.training.data.latents import cache_latents
from idcore.training.data.options import PrepareConfig
from idcore.training.data.prepare import prepare
from idcore.training.data.procedural import procedural_folder
from idcore.training.data.source import PreparedSource
from idcore.training.pulid.config import load_config
from idcore.training.pulid.run import train_pulid

EVA = EvaClipConfig(
    image_size=24, patch_size=8, width=16, depth=6, heads=2, mlp_dim=10, embed_dim=6, rope_grid=2, taps=(1, 2, 3, 4, 5)
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return procedural_folder(tmp_path_factory.mktemp("drawn") / "data", 5, progress=False)


class PuLIDSetup:
    """The published chain with a small tower and the embedded recogniser."""

    def chain(self):
        torch.manual_seed(0)
        return PuLIDPreprocess(EmbeddedAnalyzer(), EvaClipVisual(EVA).eval(), None, id_dim=128)

    def build(self):
        chain = self.chain()
        return chain.analyzer, PuLIDFaces(chain)

    def fingerprint(self):
        return {"system": "small"}


@pytest.mark.filterwarnings("ignore:PuLID without a parsing network")
@pytest.mark.parametrize("kind", ["tiny-pulid", "pulid"])
def test_training_reads_what_inference_computes(tmp_path, drawn, kind):
    setup, whole = (Faces(), DlibTokens()) if kind == "tiny-pulid" else (PuLIDSetup(), PuLIDSetup().chain())
    report = prepare(drawn, tmp_path / "out", PrepareConfig(resolution=64, half=False), setup, progress=False)
    assert len(report.records) >= 3
    source = PreparedSource(tmp_path / "out")
    (batch,) = source.micro_batches(0, 0, 0, 1, 2, 1)
    features = pulid_features(batch.face)
    for i, name in enumerate(batch.ids):
        alone = whole(drawn / name)
        assert torch.equal(features.id_cond[i : i + 1], alone.id_cond)
        for ours, theirs in zip(features.hidden, alone.hidden):
            assert torch.equal(ours[i : i + 1], theirs)
    face = whole.analyzer.detect(drawn / batch.ids[0])[0]
    record = next(r for r in source.records if r.id == batch.ids[0])
    assert torch.allclose(torch.tensor(record.points), torch.from_numpy(face.points), atol=1e-3)


def test_a_run_refuses_latents_of_another_autoencoder(tmp_path, drawn):
    prepare(drawn, tmp_path / "data", PrepareConfig(resolution=64), progress=False)
    base = TinyBase.from_package()
    base.encode_pictures = lambda pixels: pixels * 0.5
    cache_latents(tmp_path / "data", base, progress=False)
    with pytest.raises(InputError, match="holds latents of 'idcore tiny', .* has another autoencoder; prepare"):
        train_pulid(load_config(None, [], "tiny"), PreparedSource(tmp_path / "data"), tmp_path / "run")


def test_the_command(tmp_path):
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    run = CliRunner().invoke(app, ["prepare", data, "--procedural", "4", "--out", out, "--base", "tiny"])
    assert run.exit_code == 0, run.output
    assert "kept" in run.output and "were encoded by tiny" in run.output and "dropped.jsonl" in run.output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["resolution"] == 64
    (batch,) = PreparedSource(out).micro_batches(0, 0, 0, 1, 2, 1)
    assert batch.latents.shape == (2, 3, 64, 64) and batch.face["hidden.4"].shape == (2, 1, 65, 256)
    for args, text in {
        ("prepare", data): "--out FOLDER is missing",
        ("prepare", data, "--out", out, "--set", "min_fase=3"): "min_face",
        ("prepare", data, "--out", out, "--set", "near=9"): "near = 8, now 9",
        (
            "prepare",
            data,
            "--out",
            out,
            "--procedural",
            "2",
        ): "drawn people of seed 0, 4 of them; choose an empty",
        ("prepare", data, "--out", out, "--system", "pulid"): "a folder with SCRFD and glintr100: --faces FOLDER",
        ("prepare", data, "--out", out, "--base", data): "no model_index.json; wanted",
    }.items():
        run = CliRunner().invoke(app, list(args))
        assert run.exit_code == 1 and isinstance(run.exception, (IdcoreError, SystemExit))
        assert text in run.output + str(run.exception), args


def test_setups_that_do_not_fit():
    with pytest.raises(InputError, match="system must be one of none, tiny-pulid, pulid, got 'pulit'"):
        Faces("pulit")
    with pytest.raises(InputError, match="tiny-pulid reads the embedded recogniser, got faces 'antelope'"):
        Faces(faces="antelope")
    with pytest.raises(InputError, match="the batch has x; prepare the data with --system pulid, or tiny-pulid"):
        pulid_features({"x": torch.zeros(1)})
    assert Faces().fingerprint() != Faces("none").fingerprint()
