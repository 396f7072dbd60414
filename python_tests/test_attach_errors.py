"""What `attach` and its handle tell: explanations, and errors that change nothing."""

import gc

import pytest
import torch
from attach_cases import run, same_objects, tiny_setup
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.errors import InputError, NoBackendError
from idcore.identity import Identity
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_pipeline, tiny_vae


@pytest.fixture
def setup():
    return tiny_setup()


def test_explain(setup):
    unet, system, person, inputs = setup
    masks = [None, torch.ones(2, 2)]
    with idcore.attach(unet, system, [person, person], id_scale={"mid": 0.8}, id_mask=masks) as handle:
        run(unet, inputs)
        text = handle.explain()
    assert "tiny-random on UNet2DConditionModel" in text and "attached" in text.splitlines()[0]
    assert "2 identities (6 tokens, 6 tokens); masks -m" in text
    assert "merge ortho_v2, num_zero 3, num_global 2" in text and "batch parts now: cond" in text
    mid = next(line for line in text.splitlines() if "mid_block" in line)
    assert "scale 0.8, 0.8" in mid and "over AttnProcessor2_0 (replaced)" in mid
    assert any("skipped" in line for line in text.splitlines() if "down_blocks" in line)
    assert "cuda: " in text and "runs this call" in text
    assert "detached" in handle.explain().splitlines()[0]


def test_a_named_backend_that_cannot_run_says_so_at_attach(setup):
    unet, system, person, _ = setup
    before = unet.attn_processors
    with pytest.raises(NoBackendError, match="backend 'cuda' cannot run this call"):
        idcore.attach(unet, system, person, backend="cuda")
    with pytest.raises(InputError, match="backend must be one of"):
        idcore.attach(unet, system, person, backend="cudnn")
    assert same_objects(unet, before)
    with idcore.attach(unet, system, person, backend="reference") as handle:
        assert "reference (named in attach): runs this call" in handle.explain()


def test_batches_that_do_not_fit(setup):
    unet, system, _, _ = setup
    with idcore.attach(unet, system, system.identity(rows=2), cfg=True):
        with pytest.raises(InputError, match=r"made of \('uncond', 'cond'\), got a batch of 3"):
            run(unet, tiny_inputs("sd", batch=3))
        with pytest.raises(InputError, match="rows for 2 images, which do not divide the 3 images"):
            run(unet, tiny_inputs("sd", batch=6))
    with idcore.attach(unet, system, system.identity(), id_mask=torch.ones(3, 4, 4)):
        with pytest.raises(InputError, match="mask 0 has 3 rows for 2 images"):
            run(unet, tiny_inputs("sd", batch=2))


class NoLayers(TinySystem):
    def sites(self, unet):
        return []


class WrongShape(TinySystem):
    def project(self, site, tokens):
        return tokens, tokens


def test_wrong_arguments(setup):
    unet, system, person, _ = setup
    wrong = [
        ((tiny_vae(), system, person), {}, "find_sites: wanted a diffusers UNet"),
        ((object(), system, person), {}, "wanted a diffusers pipeline .*; object has no unet"),
        ((type("Flux", (), {"transformer": 1})(), system, person), {}, "Flux has a transformer in place of a UNet"),
        ((unet, system, []), {}, "empty list of identities"),
        ((unet, system, "me.safetensors"), {}, r"must be an Identity with .* tokens \[Bi, L, E\], got str"),
        ((unet, system, Identity(torch.zeros(1, 2, 12), None, "pulid-v1")), {}, "made by system 'pulid-v1'"),
        ((unet, system, person), {"cfg": "on"}, "cfg must be 'auto', True, False or the order"),
        ((unet, system, person), {"cfg": ("uncond",)}, "cfg must be"),
        ((unet, system, person), {"mode": "style"}, "unknown mode; known are merge, num_zero, num_global"),
        ((unet, system, person), {"id_scale": "strong"}, "must be a finite number, got 'strong'"),
        ((unet, system, person), {"id_mask": [None, None]}, "1 identities need 1 masks"),
        ((unet, NoLayers(unet), person), {}, "names no layer"),
        ((unet, WrongShape(unet), person), {}, r"must project .*attn2.* \[2, 6, 32\], got \[\[2, 6, 12"),
    ]
    before = unet.attn_processors
    for args, options, text in wrong:
        with pytest.raises(InputError, match=text):
            idcore.attach(*args, **options)
    assert same_objects(unet, before)


def test_wrong_changes_change_nothing(setup):
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person, id_scale=0.5) as handle:
        before = run(unet, inputs)
        for change, text in (
            (lambda: handle.scale([1.0, 2.0]), "1 identities need 1 values"),
            (lambda: handle.masks(torch.full((2, 2), 3.0)), "must lie in 0..1"),
            (lambda: handle.identity(None), "must be an Identity"),
        ):
            with pytest.raises(InputError, match=text):
                change()
        assert torch.equal(run(unet, inputs), before)


def test_a_unet_outside_of_its_pipeline():
    pipe = tiny_pipeline("sd")
    system = TinySystem(pipe.unet)
    with idcore.attach(pipe, system, system.identity()) as handle:
        assert "batch parts: told by the pipeline" in handle.explain()
        with pytest.raises(InputError, match="runs outside of the StableDiffusionPipeline that was attached"):
            run(pipe.unet, tiny_inputs("sd"))


def test_a_pipeline_that_is_gone():
    pipe = tiny_pipeline("sd")
    unet, system = pipe.unet, TinySystem(pipe.unet)
    with idcore.attach(pipe, system, system.identity()):
        del pipe
        gc.collect()
        with pytest.raises(InputError, match="the pipeline that was attached is gone"):
            run(unet, tiny_inputs("sd"))


@pytest.mark.parametrize(
    "make, got",
    [
        (lambda system: "pulid_v1.safetensors", "str 'pulid_v1.safetensors'"),
        (lambda system: type(system), "the class TinySystem"),
        (lambda system: system.identity(), "Identity"),
    ],
)
def test_what_is_no_system_is_named(setup, make, got):
    unet, system, person, _ = setup
    with pytest.raises(InputError, match=f"system must be a loaded system.*got {got}"):
        idcore.attach(unet, make(system), person)
    assert not unet._forward_pre_hooks


@pytest.mark.parametrize("wrong, meant", [("id_sclae", "id_scale"), ("scale", "id_scale"), ("mask", "id_mask")])
def test_an_unknown_argument_names_the_nearest(setup, wrong, meant):
    unet, system, person, _ = setup
    with pytest.raises(InputError, match=f"unknown {wrong}.*did you mean {meant} in place of {wrong}"):
        idcore.attach(unet, system, person, **{wrong: 0.8})
    with pytest.raises(InputError, match="got str; idcore.Identity.load"):
        idcore.attach(unet, system, "me.safetensors")
