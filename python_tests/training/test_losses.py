"""Each loss against its formula in float64, its gradients, and its corner cases."""

import numpy as np
import pytest
import torch

from idcore.backends import cpu
from idcore.encoders.align import template
from idcore.encoders.arcface_torch import IResNet
from idcore.errors import InputError, WeightsError
from idcore.training.losses.alignment import AlignmentOptions, Comparison, Reference, alignment_loss
from idcore.training.losses.diffusion import diffusion_loss
from idcore.training.losses.faces import DetectedFace, FixedFace, Recogniser
from idcore.training.losses.identity import IdentityLoss
from idcore.weights import write_safetensors


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- diffusion ------------------------------------------------------------------------------------------------


def test_diffusion_norms():
    a, b = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    assert diffusion_loss(a, b).item() == pytest.approx(((a - b) ** 2).mean().item())
    each = [torch.linalg.norm((a - b)[i]).item() for i in range(2)]
    assert diffusion_loss(a, b, norm="norm").item() == pytest.approx(np.mean(each))
    same = a.clone().requires_grad_()
    diffusion_loss(same, a, norm="norm").backward()
    assert (same.grad == 0).all()
    assert diffusion_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_min_snr_is_one_weight_of_the_clean_picture_however_it_is_predicted():
    gamma, product = 5.0, torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64)
    snr, a, s = product / (1 - product), product.sqrt().view(-1, 1), (1 - product).sqrt().view(-1, 1)
    x0, noise, wrong = normal(3, 8), normal(3, 8, seed=1), normal(3, 8, seed=2)
    want = (snr.clamp(max=gamma).view(-1, 1) * (wrong - x0) ** 2).mean()
    x = a * x0 + s * noise
    eps = (x - a * wrong) / s
    predictions = {
        "sample": (wrong, x0),
        "epsilon": (eps, noise),
        "v_prediction": (a * eps - s * wrong, a * noise - s * x0),
    }
    for kind, (prediction, target) in predictions.items():
        got = diffusion_loss(prediction, target, snr=snr, min_snr=gamma, parametrisation=kind)
        assert got.item() == pytest.approx(want.item()), kind


def test_diffusion_refusals():
    a = normal(2, 3)
    for options, text in (
        (dict(norm="l1"), "norm must be one of mse, norm"),
        (dict(min_snr=5.0), "min_snr needs snr="),
        (dict(norm="norm", min_snr=5.0, snr=torch.ones(2)), "min_snr weighs mean squares"),
        (dict(min_snr=5.0, snr=torch.ones(2), parametrisation="x"), "parametrisation must be epsilon"),
    ):
        with pytest.raises(InputError, match=text):
            diffusion_loss(a, a, **options)
    with pytest.raises(InputError, match=r"prediction is \[2, 3\], its target \[2, 2\]"):
        diffusion_loss(a, a[:, :2])


# -- alignment ------------------------------------------------------------------------------------------------

LAYERS = {"a": (2, 3, 10, 8), "b": (2, 2, 6, 8)}  # [B, H, Lq, D]


def queries(seed):
    return {n: normal(*shape, seed=seed + i) for i, (n, shape) in enumerate(LAYERS.items())}


def naive(q_id, q, k):
    """Equations 3 and 4 by their words: per sample, layer -> (difference of answers, difference of queries)."""

    def answer(x, keys):
        return torch.softmax(keys @ x.transpose(-1, -2) / x.shape[-1] ** 0.5, -1) @ x

    return {n: (answer(q_id[n], k[n]) - answer(q[n], k[n]), q_id[n] - q[n]) for n in q}


def compared(q_id, q, k, options):
    reference = Reference(options)
    for n in q:
        reference(n, q[n], k[n])
    comparison = Comparison(reference)
    for n in q_id:
        comparison(n, q_id[n], k[n])
    return comparison.totals()


KEYS = {n: normal(2, h, 5, d, seed=9) for n, (_, h, _, d) in LAYERS.items()}
OVER = {
    "mse": lambda d: d.flatten(1).square().mean(1),
    "rms": lambda d: d.flatten(1).square().mean(1).sqrt(),
    "norm": lambda d: d.flatten(1).norm(dim=1),
}


@pytest.mark.parametrize("norm", OVER)
@pytest.mark.parametrize("layers", ["mean", "sum"])
def test_alignment_is_equations_3_to_5(norm, layers):
    options = AlignmentOptions(norm=norm, layers=layers)
    q, q_id = queries(0), queries(20)
    leaves = {n: t.clone().requires_grad_() for n, t in q_id.items()}
    totals = compared(leaves, q, KEYS, options)
    loss = alignment_loss(totals, options)
    loss.backward()
    truth = {n: t.clone().requires_grad_() for n, t in q_id.items()}
    found = naive(truth, q, KEYS)
    share = 1 / len(LAYERS) if layers == "mean" else 1
    want = sum(share * (0.6 * OVER[norm](s) + 0.1 * OVER[norm](lay)).mean() for s, lay in found.values())
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for n in LAYERS:
        assert torch.allclose(leaves[n].grad, truth[n].grad, rtol=1e-9, atol=1e-14)


def test_alignment_of_equal_paths_is_zero_with_zero_gradients():
    for norm in OVER:
        q = queries(0)
        leaves = {n: t.clone().requires_grad_() for n, t in q.items()}
        loss = alignment_loss(compared(leaves, q, KEYS, AlignmentOptions(norm=norm)), AlignmentOptions(norm=norm))
        loss.backward()
        assert loss.item() == 0 and all((t.grad == 0).all() for t in leaves.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_by_the_compiled_op(dtype):
    if cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    options = AlignmentOptions(backend="cpu")
    q, q_id, k = ({n: t.to(dtype) for n, t in d.items()} for d in (queries(0), queries(20), KEYS))
    leaves = {n: t.clone().requires_grad_() for n, t in q_id.items()}
    alignment_loss(compared(leaves, q, k, options), options).backward()
    truth = {n: t.double().requires_grad_() for n, t in q_id.items()}
    plain = AlignmentOptions()
    both = ({n: t.double() for n, t in d.items()} for d in (q, k))
    alignment_loss(compared(truth, *both, plain), plain).backward()
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for n in LAYERS:
        assert (leaves[n].grad.double() - truth[n].grad).abs().max() < limit * truth[n].grad.abs().max()


def test_terms_of_weight_zero_are_left_out_and_mistakes_refused():
    options = AlignmentOptions(layout=0)
    assert list(compared(queries(1), queries(0), KEYS, options)) == ["semantic"]
    with pytest.raises(InputError, match="norm must be one of mse, rms, norm, got 'l2'"):
        AlignmentOptions(norm="l2")
    with pytest.raises(InputError, match="weight semantic must be at least 0"):
        AlignmentOptions(semantic=-1)
    with pytest.raises(InputError, match="no layer was seen"):
        Comparison(Reference(options)).totals()


# -- identity -------------------------------------------------------------------------------------------------

POINTS = template("arcface") * 64 / 112


class Small(torch.nn.Module):
    """A recogniser in float64: two convolutions."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 5, 4), torch.nn.Tanh(), torch.nn.Conv2d(4, 6, 5, 4), torch.nn.Flatten()
            )
        self.net.double().requires_grad_(False)

    def forward(self, chips):
        return self.net(chips)


def loss_of(measure="cosine", locate=None):
    return IdentityLoss(Recogniser(Small(), "arcface", "bicubic", measure), locate or FixedFace(POINTS))


@pytest.mark.parametrize("measure", ["cosine", "squared_l2"])
def test_identity_gradients(measure):
    pictures = (normal(2, 3, 64, 64) * 0.3).requires_grad_()
    wanted = normal(2, loss_of().reference(pictures)[0].shape[1], seed=4)
    term = loss_of(measure)(pictures, wanted)
    term.loss.backward()
    assert term.found.all() and term.missed == 0
    towards = normal(2, 3, 64, 64, seed=7)
    step = 1e-6
    ends = [loss_of(measure)(pictures.detach() + s * step * towards, wanted).loss.item() for s in (1, -1)]
    assert (pictures.grad * towards).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    own, found = loss_of().reference(pictures.detach(), torch.tensor(np.stack([POINTS] * 2)))
    term = loss_of(measure)(pictures, own)
    assert abs(term.loss.item()) < 1e-6 and torch.allclose(term.similarity, torch.ones(2)) and found.all()


def test_a_picture_without_a_face_is_left_out_and_counted():
    pictures = (normal(3, 3, 64, 64) * 0.3).requires_grad_()
    dark = iter([FixedFace(POINTS), lambda p: None, FixedFace(POINTS)])
    loss = loss_of(locate=lambda p: next(dark)(p))
    wanted = normal(3, 216, seed=4)
    term = loss(pictures, wanted, torch.tensor([1.0, 1, 0]))
    term.loss.backward()
    alone = loss_of()(pictures[:1].detach(), wanted[:1]).loss
    assert term.loss.item() == pytest.approx(alone.item() / 3)
    assert term.found.tolist() == [True, False, True] and torch.isnan(term.similarity[1])
    assert (loss.seen, loss.missed, term.missed) == (3, 1, 1)
    assert pictures.grad[0].abs().sum() > 0 and not pictures.grad[1:].any()
    none = loss_of(locate=lambda p: None)(pictures, wanted)
    none.loss.backward()
    assert none.loss.item() == 0 and none.missed == 3
    with pytest.raises(InputError, match="none of the 3 reference pictures holds a face"):
        loss_of(locate=lambda p: None).reference(pictures)
    with pytest.raises(InputError, match=r"wanted embeddings \[3, E\], one per picture, got \[2, 216\]"):
        loss_of()(pictures, wanted[:2])


def test_the_embedded_recogniser_tells_people_apart_and_is_found_by_the_embedded_detector():
    from PIL import Image

    from idcore.encoders.analyzer import EmbeddedAnalyzer
    from idcore.metrics.gate import gate_person

    analyzer = EmbeddedAnalyzer(min_score=0.8)
    people = [gate_person(s).resize((128, 128), Image.Resampling.BICUBIC) for s in (1000, 1002)]
    pictures = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in people]).float() / 127.5 - 1
    loss = IdentityLoss(Recogniser.dlib(), DetectedFace(analyzer))
    wanted, found = loss.reference(pictures)
    assert found.all()
    for picture, row in zip(people, wanted):
        big = picture.resize((256, 256), Image.Resampling.BICUBIC)
        own = analyzer.embed(big, analyzer.detect(big)[0])
        assert np.linalg.norm(row.numpy() - own) < 0.1  # the chip is cut from the small picture here
    pictures.requires_grad_()
    right, wrong = loss(pictures, wanted), loss(pictures, wanted.flip(0))
    assert right.loss < 1e-6 < 0.05 < wrong.loss
    wrong.loss.backward()
    assert pictures.grad.abs().sum() > 0


# -- ArcFace as torch module ----------------------------------------------------------------------------------


def test_arcface_reads_the_published_layout(tmp_path):
    torch.manual_seed(0)
    net = IResNet(50)
    assert len(net.state_dict()) == 475 and sum(p.numel() for p in net.parameters()) == 43_590_848
    for name, t in net.state_dict().items():
        if name.endswith("running_var"):
            t.fill_(4.0)
    path = write_safetensors(tmp_path / "r50.safetensors", {k: t.clone() for k, t in net.state_dict().items()})
    again = IResNet.from_weights(path).train()
    chips = torch.rand(1, 3, 112, 112, requires_grad=True)
    out = again(chips)
    assert torch.equal(out, net(chips)) and not any(p.requires_grad for p in again.parameters())
    out.sum().backward()
    assert chips.grad.abs().sum() > 0
    assert Recogniser.arcface(path).measure == "cosine"
    with pytest.raises(InputError, match=r"chips \[N, 3, 112, 112\] in 0..1, got \[1, 3, 100, 100\]"):
        again(torch.rand(1, 3, 100, 100))
    bad = write_safetensors(tmp_path / "bad.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="holds no IResNet"):
        IResNet.from_weights(bad)
    with pytest.raises(InputError, match="depth must be one of"):
        IResNet(51)


def test_arcface_by_hand():
    """One block of each stage against its definition with plain functions."""
    import torch.nn.functional as F

    torch.manual_seed(1)
    net = IResNet((1, 1, 1, 1), 8).double()
    s = net.state_dict()
    for name, t in s.items():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) * 0.2 + (0.9 if name.endswith("var") else 0))

    def bn(x, name):
        return F.batch_norm(
            x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"]
        )

    chips = torch.rand(2, 3, 112, 112, dtype=torch.float64)
    x = F.prelu(bn(F.conv2d((chips - 0.5) / 0.5, s["conv1.weight"], padding=1), "bn1"), s["prelu.weight"])
    for i in range(1, 5):
        p = f"layer{i}.0"
        short = bn(F.conv2d(x, s[f"{p}.downsample.0.weight"], stride=2), f"{p}.downsample.1")
        y = bn(F.conv2d(bn(x, f"{p}.bn1"), s[f"{p}.conv1.weight"], padding=1), f"{p}.bn2")
        y = F.conv2d(F.prelu(y, s[f"{p}.prelu.weight"]), s[f"{p}.conv2.weight"], stride=2, padding=1)
        x = short + bn(y, f"{p}.bn3")
    want = bn(F.linear(bn(x, "bn2").flatten(1), s["fc.weight"], s["fc.bias"]), "features")
    assert torch.allclose(net(chips), want, rtol=1e-10)
