"""RetinaFace: the published keys, a plain form of the network, decoding by loops, and its place in PuLID's chain."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from idcore.encoders.retinaface import ANCHORS, RetinaFace, anchors_of, decode_boxes, decode_points
from idcore.errors import InputError, WeightsError
from idcore.weights import convert, describe


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = RetinaFace(threshold=0.5).eval().requires_grad_(False)
    for key, t in net.state_dict().items():
        if "running_mean" in key:
            t.normal_(0, 0.1)
        elif "running_var" in key:
            t.uniform_(0.5, 1.5)
    return net


def plain(t, x):
    """The network from its state dict alone, float64, without its modules."""

    def bn(x, key):
        mean, var, w, b = (t[f"{key}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    def conv(x, key, stride=1):
        w = t[f"{key}.weight"]
        return F.conv2d(x, w, t.get(f"{key}.bias"), stride, w.shape[-1] // 2)

    def unit(x, key, relu=True):
        x = bn(conv(x, f"{key}.0"), f"{key}.1")
        return x.clamp(min=0) if relu else x

    x = bn(conv(x, "body.conv1", 2), "body.bn1").clamp(min=0)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 2)
    levels = []
    for layer, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), 1):
        for b in range(blocks):
            p, s = f"body.layer{layer}.{b}", stride if b == 0 else 1
            short = x
            if f"{p}.downsample.0.weight" in t:
                short = bn(conv(x, f"{p}.downsample.0", s), f"{p}.downsample.1")
            y = bn(conv(x, f"{p}.conv1"), f"{p}.bn1").clamp(min=0)
            y = bn(conv(y, f"{p}.conv2", s), f"{p}.bn2").clamp(min=0)
            x = (short + bn(conv(y, f"{p}.conv3"), f"{p}.bn3")).clamp(min=0)
        levels.append(x)
    a, b, c = (unit(f, f"fpn.output{i}") for i, f in enumerate(levels[1:], 1))
    b = unit(b + F.interpolate(c, b.shape[2:]), "fpn.merge2")
    a = unit(a + F.interpolate(b, a.shape[2:]), "fpn.merge1")
    out = {"ClassHead": [], "BboxHead": [], "LandmarkHead": []}
    for i, f in enumerate((a, b, c)):
        p, five = f"ssh{i + 1}", unit(f, f"ssh{i + 1}.conv5X5_1")
        seven = unit(unit(five, f"{p}.conv7X7_2"), f"{p}.conv7x7_3", False)
        f = torch.cat([unit(f, f"{p}.conv3X3", False), unit(five, f"{p}.conv5X5_2", False), seven], 1).clamp(min=0)
        for head, rows in out.items():
            y = conv(f, f"{head}.{i}.conv1x1")[0]
            for r in range(y.shape[1]):
                for col in range(y.shape[2]):
                    rows.extend(y[:, r, col].view(2, -1))
    return [torch.stack(rows) for rows in out.values()]


def test_the_network_equals_a_plain_form_at_odd_sizes(net):
    x = torch.randn(1, 3, 75, 101) * 50
    t = {k: v.double() for k, v in net.state_dict().items()}
    want = plain(t, x.double())
    got = net(x)
    assert [g.shape[2] for g in got] == [2, 4, 10] and len(anchors_of(75, 101)) == got[0].shape[1] == len(want[0])
    for g, w in zip(got, want):
        torch.testing.assert_close(g[0].double(), w, rtol=1e-3, atol=1e-4 * float(w.abs().max()))


def test_anchors_and_decoding_by_loops():
    height, width = 40, 70
    found, k = anchors_of(height, width), 0
    raw = torch.randn(len(found), 14, dtype=torch.float64)
    boxes, points = decode_boxes(raw[:, :4], found), decode_points(raw[:, 4:], found)
    for stride, sides in zip((8, 16, 32), ANCHORS):
        for row in range((height + stride - 1) // stride):
            for column in range((width + stride - 1) // stride):
                for side in sides:
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    assert found[k].tolist() == [x, y, side, side]
                    r = raw[k].tolist()
                    cx, cy, w, h = (
                        x + r[0] * 0.1 * side,
                        y + r[1] * 0.1 * side,
                        *(side * np.exp(v * 0.2) for v in r[2:4]),
                    )
                    assert boxes[k].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                    marks = [[x + r[4 + 2 * i] * 0.1 * side, y + r[5 + 2 * i] * 0.1 * side] for i in range(5)]
                    assert points[k].flatten().tolist() == pytest.approx(np.ravel(marks).tolist())
                    k += 1
    assert k == len(found)


class OneFace(RetinaFace):
    """Sees a face where it is told to, twice."""

    def forward(self, x):
        self.pixels = x
        n = len(anchors_of(*x.shape[2:]))
        logits, boxes, points = torch.zeros(1, n, 2), torch.zeros(1, n, 4), torch.ones(1, n, 10)
        logits[..., 0] = 9
        for k, score in ((5, 8.0), (4, 6.0)):
            logits[0, k] = torch.tensor([0.0, score])
        boxes[0, 4, 2:] = 5 * np.log(2)  # as large as its neighbour
        return logits, boxes, points


def test_detect_reads_bgr_and_gives_pixels_and_suppresses(monkeypatch):
    with torch.device("meta"):
        net = OneFace()
    net.body.conv1 = torch.nn.Conv2d(3, 1, 1)
    picture = Image.new("RGB", (64, 48), (10, 20, 30))
    (face,) = net.detect(picture)
    assert net.pixels[0, :, 0, 0].tolist() == [30 - 104, 20 - 117, 10 - 123]
    assert anchors_of(48, 64)[5].tolist() == [20, 4, 32, 32]
    assert face.box.tolist() == pytest.approx([4, -12, 36, 20]) and face.image_size == (64, 48)
    assert face.points.tolist() == [[pytest.approx(23.2), pytest.approx(7.2)]] * 5
    assert face.score == pytest.approx(1 / (1 + np.exp(-8.0)))


def test_the_published_pickle_is_read_through_convert(net, tmp_path):
    """Its keys begin with "module."; its size is that of these tensors and a little for their names."""
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / "detection_Resnet50_Final.pth")
    numbers = sum(4 * v.numel() if v.is_floating_point() else 8 for v in state.values())
    assert 0 < 109_497_761 - numbers < 400 * len(state)
    info = convert(tmp_path / "detection_Resnet50_Final.pth", tmp_path / "r.safetensors", unpickle=True)
    assert info.layout == describe(tmp_path / "r.safetensors").layout == "retinaface"
    loaded = RetinaFace.from_weights(tmp_path / "r.safetensors")
    assert loaded.threshold == 0.97 and loaded.weights_hash.startswith("sha256:")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    loaded.threshold = net.threshold
    ours, theirs = loaded.detect(picture), net.detect(picture)
    assert len(ours) == len(theirs) and all(np.array_equal(a.points, b.points) for a, b in zip(ours, theirs))
    torch.save({"module.body.conv1.weight": torch.ones(1)}, tmp_path / "bad.pth")
    convert_error = pytest.raises(WeightsError)
    with convert_error:
        convert(tmp_path / "bad.pth", tmp_path / "bad.safetensors", unpickle=True)
        RetinaFace.from_weights(tmp_path / "bad.safetensors")


def test_thresholds_are_checked():
    with pytest.raises(InputError, match="lie between 0 and 1, got 1.5 and 0.4"):
        RetinaFace(1.5)
