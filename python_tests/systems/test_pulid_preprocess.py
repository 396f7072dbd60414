"""Photos to PuLID's features: each step against loops, one face for both branches, nothing silent."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from idcore.encoders.align import template
from idcore.encoders.eva_clip import EvaClipConfig, EvaClipVisual
from idcore.encoders.face import Chooses, Face
from idcore.encoders.face_parsing import BiSeNet
from idcore.encoders.pulid_preprocess import (
    PuLIDPreprocess,
    clip_pixels,
    lmeds_transform,
    warp_bilinear,
    whiten,
)
from idcore.errors import InputError, NoFaceError, SeveralFacesError
from idcore.metrics.similarity import ARCFACE_COSINE
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig

EVA = EvaClipConfig(
    image_size=24, patch_size=8, width=16, depth=6, heads=2, mlp_dim=10, embed_dim=6, rope_grid=2, taps=(1, 2, 3, 4, 5)
)
FFHQ = template("ffhq")


class FakeAnalyzer(Chooses):
    """Faces at given places; the embedding says which face was embedded and in a picture of what size."""

    name, measure, provider = "fake", ARCFACE_COSINE, "CPUExecutionProvider"

    def __init__(self, faces, width=4):
        self.faces, self.width, self.embedded = faces, width, []

    def detect(self, image):
        return [Face(np.array(b, np.float32), 0.9, np.array(p, np.float32), image.size) for b, p in self.faces]

    def align(self, image, face):
        raise NotImplementedError

    def embed(self, image, face):
        self.embedded.append(face)
        return np.array([*face.center, image.size[0], 20.0][: self.width] + [0.0] * (self.width - 4), np.float32)


def points_at(x, y, scale):
    return FFHQ * scale + (x, y)


def photo(width=300, height=200, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


BIG = ((10, 10, 120, 120), points_at(10, 10, 0.2))
CENTRAL = ((140, 80, 170, 120), points_at(125, 75, 0.1))


def pipeline(faces=(BIG, CENTRAL), parsing=None, **kw):
    torch.manual_seed(3)
    tower = EvaClipVisual(EVA).eval()
    return PuLIDPreprocess(FakeAnalyzer(list(faces)), tower, parsing, **{"id_dim": 4, **kw})


class FakeParser:
    """Cheap stand-in for BiSeNet where a test is not about it: bright pixels are skin, the rest background."""

    weights_hash = "sha256:fake"

    def labels(self, images):
        return (images.mean(1) > 0.5).long()


def parser():
    torch.manual_seed(4)
    net = BiSeNet().eval()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    return net


# -- the chain ------------------------------------------------------------------------------------------------


def test_features_follow_the_chain_step_by_step():
    net = parser()
    pre = pipeline(parsing=net)
    image = photo()
    got = pre(image)
    chip = warp_bilinear(np.asarray(image), lmeds_transform(BIG[1], FFHQ), 512, (132, 133, 135))
    x = torch.from_numpy(chip).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    labels = net((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).argmax(1)
    clip, hidden = pre.tower(clip_pixels(whiten(x, labels), 24, False))
    want = torch.cat([torch.tensor([[65.0, 65.0, 300.0, 20.0]]), clip / clip.norm()], 1)
    torch.testing.assert_close(got.id_cond, want[None])
    assert got.n == 1 and [tuple(h.shape) for h in got.hidden] == [(1, 1, 10, 16)] * 5
    for a, b in zip(got.hidden, hidden):
        torch.testing.assert_close(a[0], b)
    torch.testing.assert_close(got.id_cond[0, 0, 4:].norm(), torch.tensor(1.0))


def test_beyond_the_edge_the_chip_has_the_published_colour():
    """RGB 132, 133, 135 (OpenCV's border value of 135, 133, 132 in BGR)."""
    chip = pipeline().align(photo(), points_at(-60, -60, 0.5))
    assert chip.shape == (512, 512, 3) and chip.dtype == np.uint8
    assert chip[0, 0].tolist() == [132, 133, 135] and chip[110, 110].tolist() == [132, 133, 135]
    assert np.abs(chip[300, 300].astype(int) - np.asarray(photo())[90, 90]).max() < 40


@pytest.mark.parametrize("policy,box", [("largest", BIG), ("center", CENTRAL), (1, CENTRAL)])
def test_one_face_serves_both_branches(policy, box):
    """The largest face is not the central one: recogniser and vision tower must see the same of the two."""
    pre = pipeline(parsing=FakeParser(), policy=policy)
    got = pre(photo())
    alone = pipeline(faces=[box], parsing=FakeParser())(photo())
    assert torch.equal(got.id_cond, alone.id_cond)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden, alone.hidden))
    assert [tuple(f.box) for f in pre.analyzer.embedded] == [box[0]]


def test_several_photos_lie_side_by_side_in_order():
    pre = pipeline(parsing=FakeParser())
    photos = [photo(seed=s) for s in range(3)]
    got = pre(photos)
    assert got.id_cond.shape == (1, 3, 10) and got.hidden[0].shape == (1, 3, 10, 16)
    for i, p in enumerate(photos):
        alone = pre(p)
        assert torch.equal(got.id_cond[:, i], alone.id_cond[:, 0])
        assert torch.equal(got.hidden[4][:, i], alone.hidden[4][:, 0])


def test_large_photos_are_shrunk_before_the_face_is_looked_for():
    pre = pipeline(faces=[BIG], parsing=FakeParser(), max_side=150)
    assert float(pre(photo(300, 200)).id_cond[0, 0, 2]) == 150


def test_without_parsing_it_warns_once_and_the_identity_says_so():
    pre = pipeline()
    with pytest.warns(UserWarning, match="PuLID without a parsing network"):
        features = pre(photo())
    assert features.meta["parsing"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre(photo())
        with_net = pipeline(parsing=FakeParser())(photo())
    assert with_net.meta["parsing"] is not None
    assert not torch.equal(with_net.id_cond[..., 4:], features.id_cond[..., 4:])


def test_meta_says_how_the_photo_was_read():
    meta = pipeline(parsing=FakeParser(), antialias=True, estimator="least_squares")(photo()).meta
    assert meta["preprocess"] == "pulid-1" and meta["face_analyzer"] == "fake" and meta["policy"] == "largest"
    assert meta["antialias"] is True and meta["estimator"] == "least_squares" and meta["max_side"] == 1024
    assert {"vision_tower", "parsing"} <= meta.keys() and meta["recogniser"] is None


def test_meta_has_the_hash_of_the_recogniser_where_it_is_a_file(tmp_path):
    (tmp_path / "glintr100.onnx").write_bytes(b"abc")
    pre = pipeline(parsing=FakeParser())
    pre.analyzer.files = {"recogniser": tmp_path / "glintr100.onnx"}
    assert pre(photo()).meta["recogniser"] == "sha256:" + hashlib.sha256(b"abc").hexdigest()


def test_errors_name_the_file(tmp_path):
    photo(310).save(tmp_path / "empty.png")

    class Sometimes(FakeAnalyzer):
        def detect(self, image):
            return [] if image.size[0] == 310 else super().detect(image)

    pre = pipeline(parsing=FakeParser())
    pre.analyzer = Sometimes([BIG])
    with pytest.raises(NoFaceError, match=r"photo 2 .*empty.png \(310x200\): There is no face"):
        pre([photo(), tmp_path / "empty.png"])


def test_from_photos_to_a_saved_identity(tmp_path):
    torch.manual_seed(0)
    encoder = EncoderConfig("v1", id_dim=10, vit_dim=16, width=16, output_dim=14)
    system = PuLID(PuLIDConfig(encoder, ((1, 8),)), preprocess=pipeline(parsing=FakeParser())).eval()
    assert len(system.state_dict()) == 112  # the tower and the parser are not part of PuLID's weights
    assert len(PuLID(system.config, preprocess=torch.nn.Linear(2, 2)).state_dict()) == 112
    me = system.encode([photo(), photo(seed=1)])
    assert me.tokens.shape == (1, 15, 14) and me.meta["photos"] == 2 and me.meta["preprocess"] == "pulid-1"
    me.save(tmp_path / "me.safetensors")
    assert type(me).load(tmp_path / "me.safetensors").meta == me.meta


@pytest.mark.parametrize("faces,kw,error,text", [
    ([], {}, NoFaceError, r"photo 1 \(300x200\): There is no face"),
    ([BIG, CENTRAL], {"policy": "only"}, SeveralFacesError, r"photo 1 .*Exactly one face is wanted, 2 were found"),
    ([BIG], {"policy": 3}, InputError, "no face 3 among 1"),
    ([BIG], {"id_dim": 512}, InputError, "embedding of 512 numbers, fake gives 4.*glintr100"),
])  # fmt: skip
def test_faces_that_do_not_fit_are_named(faces, kw, error, text):
    with pytest.raises(error, match=text):
        pipeline(faces, parsing=FakeParser(), **kw)(photo())


def test_photos_without_a_face_may_be_left_out():
    class Sometimes(FakeAnalyzer):
        def detect(self, image):
            return [] if image.size[0] == 310 else super().detect(image)

    pre = pipeline(parsing=FakeParser(), on_no_face="skip")
    pre.analyzer = Sometimes([BIG])
    got = pre([photo(310), photo(seed=1), photo(310)])
    assert got.n == 1 and got.meta["skipped"] == 2
    assert torch.equal(got.id_cond, pre(photo(seed=1)).id_cond)
    with pytest.raises(NoFaceError, match="no face in any of 2 photos"):
        pre([photo(310), photo(310)])


@pytest.mark.parametrize("kw,text", [
    ({"estimator": "ransac"}, "estimator must be 'lmeds' or 'least_squares', got 'ransac'"),
    ({"max_side": 8}, "max_side must be at least 64"),
    ({"on_no_face": "ignore"}, "on_no_face must be 'raise' or 'skip', got 'ignore'"),
])  # fmt: skip
def test_options_that_do_not_exist_are_named(kw, text):
    with pytest.raises(InputError, match=text):
        pipeline(**kw)


def test_no_photos_and_no_picture_are_named(tmp_path):
    with pytest.raises(InputError, match="at least one photo, got an empty list"):
        pipeline(parsing=FakeParser())([])
    with pytest.raises(InputError, match="There is no file"):
        pipeline(parsing=FakeParser())(tmp_path / "none.jpg")


class Landmarks:
    """A landmark detector that finds given faces."""

    weights_hash = "sha256:marks"

    def __init__(self, *faces):
        self.faces = faces

    def detect(self, image):
        return [Face(np.array(b, np.float32), 0.99, np.array(p, np.float32), image.size) for b, p in self.faces]


def test_another_detectors_landmarks_on_the_same_face_align_the_chip():
    moved = points_at(20, 14, 0.18)
    other = ((150, 60, 190, 130), points_at(125, 75, 0.1))
    seen = []
    for marks in (None, Landmarks(other, ((12, 8, 118, 124), moved))):
        p = pipeline(faces=(BIG,), parsing=FakeParser(), landmarks=marks)
        p._matrix = lambda points, p=p: seen.append(points) or PuLIDPreprocess._matrix(p, points)
        features = p(photo())
        assert features.meta["landmarks"] == (None if marks is None else "sha256:marks")
    assert np.allclose(seen[0], BIG[1]) and np.allclose(seen[1], moved)
    lost = pipeline(faces=(BIG,), parsing=FakeParser(), landmarks=Landmarks(other))
    with pytest.raises(NoFaceError, match="photo 1: the landmark detector found 1 faces, none where the analyzer"):
        lost(photo())
