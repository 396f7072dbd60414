"""Layouts and boxes to masks; up to eight people in one picture, each without any influence outside of its mask."""

import pytest
import torch

import idcore
from idcore.attention import processors
from idcore.attention.masks import grid_of, read_masks, to_tokens
from idcore.attention.regions import box_masks, layout_boxes, layout_masks
from idcore.attention.types import AttentionOptions
from idcore.errors import InputError
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet


@pytest.mark.parametrize("layout,boxes", [
    ("left, right", [(0, 0, 4, 6), (4, 0, 8, 6)]),
    ("Top-Left,bottom", [(0, 0, 4, 3), (0, 3, 8, 6)]),
    ("center", [(2, 0, 6, 6)]),
    ("1 1", [(0, 0, 4, 6), (4, 0, 8, 6)]),
    ("1 2 1", [(0, 0, 2, 6), (2, 0, 6, 6), (6, 0, 8, 6)]),
    ("2: 1 1 / 1: 1", [(0, 0, 4, 4), (4, 0, 8, 4), (0, 4, 8, 6)]),
    ("1 (2) 1 / (1)", [(0, 0, 2, 3), (6, 0, 8, 3)]),
    ("1(1)2", [(0, 0, 2, 6), (4, 0, 8, 6)]),
    ("0.5: 1 / 1.5: 1", [(0, 0, 8, 1.5), (0, 1.5, 8, 6)]),
])  # fmt: skip
def test_layouts(layout, boxes):
    assert [b == pytest.approx(w) for b, w in zip(layout_boxes(layout, 6, 8), boxes, strict=True)] == [True] * len(
        boxes
    )
    x0, y0, x1, y1 = boxes[0]
    assert layout_boxes(layout)[0] == pytest.approx((x0 / 8, y0 / 6, x1 / 8, y1 / 6))


@pytest.mark.parametrize("layout,text", [
    ("", "wanted a text such as"),
    (None, "wanted a text such as"),
    ("left, middle", "'middle' is no area; words are all, left"),
    ("left-right", "have nothing in common"),
    ("1 1 / ", "every row needs a cell"),
    ("1 0", "must be above 0"),
    ("-1: 1 1", "must be above 0"),
    ("1 (1", r"wanted widths such as '1 2' or '1 \(1\) 1', got '\(1'"),
    ("1 ; 1", "got '; 1'"),
    ("2 1: 1", "'2 1' before ':' is no height"),
    ("(1) (2)", "has no cell for a person"),
])  # fmt: skip
def test_wrong_layouts(layout, text):
    with pytest.raises(InputError, match=text):
        layout_boxes(layout)


def test_masks_cover_exactly_the_box():
    (mask,) = box_masks([(1.25, 0, 3.5, 2)], 3, 5)
    assert torch.equal(mask, torch.tensor([[0, 0.75, 1, 0.5, 0]] * 2 + [[0] * 5]))
    (cut,) = box_masks([(-3, -3, 1, 9)], 3, 5)
    assert torch.equal(cut, torch.tensor([[1.0, 0, 0, 0, 0]] * 3))
    left, right = layout_masks("1 1", 4, 6)
    assert torch.equal(left + right, torch.ones(4, 6)) and not (left * right).any()


def test_feather_rises_inside_and_never_reaches_out():
    left, right = layout_masks("1 1", 4, 20, feather=4)
    assert torch.equal(left[0, :6], torch.ones(6)) and not left[:, 10:].any()
    assert left[0, 6:10].tolist() == pytest.approx([0.875, 0.625, 0.375, 0.125])
    assert torch.equal(right, left.flip(1)) and torch.equal(left[0], left[3])


@pytest.mark.parametrize("box,text", [
    ((0, 0, 1), "box 0: wanted x0 < x1"),
    ((2, 0, 1, 1), "wanted x0 < x1"),
    ((0, 0, float("nan"), 1), "wanted x0 < x1"),
    ((9, 0, 12, 1), "lies outside of the picture of 8x8"),
])  # fmt: skip
def test_wrong_boxes(box, text):
    with pytest.raises(InputError, match=text):
        box_masks([box], 8, 8)
    with pytest.raises(InputError, match="wanted a size of at least 1x1"):
        box_masks([(0, 0, 1, 1)], 0, 8)


def test_a_layout_is_a_form_of_masks():
    for got, want in zip(read_masks("left, right", 2), layout_masks("left, right")):
        assert torch.equal(got[0], want)


def isolated(unet):
    """Runs the UNet so that each cross-attention sees inputs without history; gives {layer: its output}."""
    outputs, hooks = {}, []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            hooks.append(module.register_forward_pre_hook(lambda m, args: (args[0].detach(), *args[1:])))
            hooks.append(module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out)))
    unet(**tiny_inputs("sd", batch=1))
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("merge", ["add", "ortho", "ortho_v2"])
def test_eight_people_have_no_influence_outside_of_their_masks(merge):
    unet = tiny_unet("sd")
    system = TinySystem(unet, options=AttentionOptions(merge, num_zero=2))
    people = [system.identity(seed=j, uncond=False) for j in range(8)]
    for p in people:
        p.tokens.requires_grad_()
    masks = layout_masks("1 1 1 1 / 1 1 1 1", 8, 8)
    with idcore.attach(unet, system, people, id_scale=0.7, id_mask=masks, cfg=False):
        outputs = isolated(unet)
    assert len(outputs) == 6
    for out in outputs.values():
        weights = torch.randn_like(out)
        grid = grid_of(out.shape[1], 8, 8)
        for j, p in enumerate(people):
            inside = to_tokens(masks[j][None], grid)[0] > 0
            assert inside.sum() == out.shape[1] / 8
            far, near = (
                torch.autograd.grad((out * weights)[:, s].sum(), p.tokens, retain_graph=True)[0]
                for s in (~inside, inside)
            )
            assert not far.any(), "an identity reaches out of its region"
            assert near.abs().max() > 0


def test_eight_people_are_one_call_per_layer(monkeypatch):
    unet, calls = tiny_unet("sd"), []
    system = TinySystem(unet)
    real = processors.id_attention
    monkeypatch.setattr(processors, "id_attention", lambda *a, **k: calls.append(len(k["k_id"])) or real(*a, **k))
    people = [system.identity(seed=j) for j in range(8)]
    with idcore.attach(unet, system, people, id_mask="1 1 1 1 / 1 1 1 1", cfg=False), torch.no_grad():
        unet(**tiny_inputs("sd", batch=1))
    assert calls == [8] * 6


def test_eight_people_each_look_as_they_do_alone_in_their_region():
    unet = tiny_unet("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2"))
    people = [system.identity(seed=j) for j in range(8)]
    masks = layout_masks("1 1 1 1 / 1 1 1 1", 8, 8)
    first = next(n for n, _ in unet.named_modules() if n.endswith("attn2"))

    def layer(who, where):
        seen = []
        hook = unet.get_submodule(first).register_forward_hook(lambda m, a, out: seen.append(out))
        with idcore.attach(unet, system, who, id_mask=where, cfg=False), torch.no_grad():
            unet(**tiny_inputs("sd", batch=1))
        hook.remove()
        return seen[0]

    together = layer(people, masks)
    for p, m in zip(people, masks):
        inside = m.flatten() > 0
        torch.testing.assert_close(together[:, inside], layer(p, m)[:, inside], rtol=1e-5, atol=1e-6)
