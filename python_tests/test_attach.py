"""The handle: on, off, changes, errors. Mathematics is tested in attention/."""

import gc
import importlib
import sys
import threading
import weakref

import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from torch import nn

import idcore
from idcore.attention.stack import IdStack
from idcore.errors import InputError, NoBackendError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_pipeline, tiny_unet, tiny_vae


def run(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample


def same_objects(unet, before):
    now = unet.attn_processors
    return list(now) == list(before) and all(now[k] is before[k] for k in before) and not unet._forward_pre_hooks


@pytest.fixture
def setup():
    unet = tiny_unet("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 3, 2))
    return unet, system, system.identity(), tiny_inputs("sd")


def test_attach_detach_and_the_number_zero(setup):
    unet, system, person, inputs = setup
    before, plain = unet.attn_processors, run(unet, inputs)
    handle = idcore.attach(unet, system, person)
    with_id = run(unet, inputs)
    assert handle.attached and not torch.allclose(with_id, plain, atol=1e-3)
    handle.scale(0)
    assert torch.equal(run(unet, inputs), plain)
    handle.scale(1.0)
    assert torch.equal(run(unet, inputs), with_id)
    handle.detach()
    handle.detach()
    assert not handle.attached and same_objects(unet, before) and torch.equal(run(unet, inputs), plain)


def test_an_exception_inside_gives_everything_back(setup):
    unet, system, person, inputs = setup
    before = unet.attn_processors
    with pytest.raises(RuntimeError, match="mat1 and mat2|shapes"):
        with idcore.attach(unet, system, person):
            run(unet, inputs | {"encoder_hidden_states": torch.zeros(2, 77, 5)})
    assert same_objects(unet, before)


class Failing(TinySystem):
    """Fails at one of its layers."""

    def project(self, site, tokens):
        if site.index == self.fails_at:
            raise RuntimeError("out of memory, say")
        return super().project(site, tokens)


def test_a_failing_attach_leaves_nothing(setup, monkeypatch):
    unet, system, person, _ = setup
    before = unet.attn_processors
    failing = Failing(unet)
    failing.fails_at = system.sites(unet)[-1].index
    with pytest.raises(RuntimeError, match="out of memory"):
        idcore.attach(unet, failing, failing.identity())
    assert same_objects(unet, before)
    third = unet.get_submodule(system.sites(unet)[2].path)
    original = third.set_processor

    def refuse(processor):
        if type(processor).__name__ == "IdAttnProcessor":
            raise RuntimeError("no")
        original(processor)

    monkeypatch.setattr(third, "set_processor", refuse)
    with pytest.raises(RuntimeError, match="no"):
        idcore.attach(unet, system, person)
    assert same_objects(unet, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("same_options", [True, False])
def test_nested_attaches_add_up_and_come_off_in_any_order(setup, order, same_options):
    unet, _, _, inputs = setup
    before = unet.attn_processors
    merges = ["ortho_v2"] * 3 if same_options else ["add", "ortho", "ortho_v2"]
    systems = [TinySystem(unet, seed=i, options=AttentionOptions(m, 2, 3)) for i, m in enumerate(merges)]
    handles = [idcore.attach(unet, s, s.identity(i), id_scale=0.5) for i, s in enumerate(systems)]
    assert "3 attaches on this UNet" in handles[0].explain()
    left = {0, 1, 2}
    for i in order:
        ours = run(unet, inputs)
        handles[i].detach()
        left.discard(i)
        assert not torch.allclose(run(unet, inputs), ours, atol=1e-4)
        if len(left) == 1:
            rest = run(unet, inputs)
            (j,) = left
            other = tiny_unet("sd")
            with idcore.attach(other, systems[j], systems[j].identity(j), id_scale=0.5):
                assert torch.allclose(run(other, inputs), rest, atol=1e-6)
    assert same_objects(unet, before)


def test_nested_attaches_equal_one_attach_of_a_list(setup):
    unet, system, person, inputs = setup
    other = system.identity(9, length=2)
    with idcore.attach(unet, system, [person, other], id_scale=[0.4, 1.2]):
        listed = run(unet, inputs)
    with idcore.attach(unet, system, other, id_scale=1.2), idcore.attach(unet, system, person, id_scale=0.4):
        assert torch.allclose(run(unet, inputs), listed, atol=1e-6)
    mixed = torch.tensor(0.4)
    with idcore.attach(unet, system, person, id_scale=mixed), idcore.attach(unet, system, other, id_scale=1.2):
        assert torch.allclose(run(unet, inputs), listed, atol=1e-6)


def test_swapping_the_identity(setup):
    unet, system, person, inputs = setup
    other = system.identity(5, length=4)
    with idcore.attach(unet, system, other, id_scale=0.6):
        wanted = run(unet, inputs)
    with idcore.attach(unet, system, person, id_scale=0.6) as handle:
        first = run(unet, inputs)
        handle.identity(other)
        assert torch.equal(run(unet, inputs), wanted)
        with pytest.raises(InputError, match="made by system 'someone'"):
            handle.identity(Identity(torch.zeros(1, 2, 12), None, "someone"))
        with pytest.raises(RuntimeError):
            handle.identity(Identity(torch.zeros(1, 2, 7), None, system.name))
        assert torch.equal(run(unet, inputs), wanted)
        handle.identity(person)
        assert torch.equal(run(unet, inputs), first)


def test_swapping_one_identity_for_two(setup):
    unet, system, person, inputs = setup
    pair = [person, system.identity(5)]
    with idcore.attach(unet, system, pair, id_scale=0.6):
        wanted = run(unet, inputs)
    with idcore.attach(unet, system, person, id_scale=0.6, id_mask=torch.ones(4, 4)) as handle:
        with pytest.raises(InputError, match=r"masks for 1 identities are set, got 2.*masks\(None\)"):
            handle.identity(pair)
        handle.masks(None)
        handle.identity(pair)
        assert torch.equal(run(unet, inputs), wanted)
        handle.scale([0.6, 0.0])
        with pytest.raises(InputError, match="1 identities need 1 values, got 2"):
            handle.identity(person)
        assert len(handle._conditioning.people) == 2


def test_keys_and_values_are_projected_once(setup):
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person) as handle:
        layers = len(system.sites(unet))
        assert system.projections == layers
        for _ in range(3):
            run(unet, inputs)
        unet(**inputs)  # gradients allowed, nothing trainable
        assert system.projections == layers
        handle.refresh()
        run(unet, inputs)
        assert system.projections == 2 * layers


def test_another_dtype_replaces_the_old_keys(setup):
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person) as handle:
        first, size = run(unet, inputs), len(handle._conditioning.bank)
        unet.to(torch.float64)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        assert torch.allclose(run(unet, wide).float(), first, atol=1e-4)
        assert len(handle._conditioning.bank) <= size and system.projections == 2 * len(system.sites(unet))


def test_weights_that_are_offloaded(setup):
    accelerate = pytest.importorskip("accelerate")
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person):
        wanted = run(unet, inputs)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    assert unet.get_submodule(system.sites(unet)[0].path).to_q.weight.device.type == "meta"
    with idcore.attach(unet, system, person) as handle:
        assert torch.equal(run(unet, inputs), wanted)
        assert "runs this call" in handle.explain()


def test_no_stale_keys_after_a_training_step(setup):
    unet, system, person, inputs = setup
    system.requires_grad_(True)
    with idcore.attach(unet, system, person):
        old = run(unet, inputs)
        out = unet(**inputs).sample
        grads = torch.autograd.grad(out.square().mean(), list(system.parameters()))
        assert all(g.abs().max() > 0 for g in grads)
        assert torch.equal(run(unet, inputs), old)
        count = system.projections
        run(unet, inputs)
        assert system.projections == count  # without gradients the keys are kept
        with torch.no_grad():
            for p in system.parameters():
                p.mul_(1.5)
        new = run(unet, inputs)
    with idcore.attach(unet, system, person):
        assert torch.equal(run(unet, inputs), new) and not torch.equal(new, old)


def test_gradients_after_inference_mode(setup):
    unet, system, person, inputs = setup
    unet.requires_grad_(True)
    with torch.inference_mode():
        handle = idcore.attach(unet, system, person)
        unet(**inputs)
    with handle:
        unet(**inputs).sample.sum().backward()
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.grad.abs().max() > 0


def test_gradient_checkpointing(setup):
    unet, system, person, inputs = setup
    unet.train()
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    with idcore.attach(unet, system, person, id_mask=mask):
        grads = []
        for on in (False, True):
            unet.enable_gradient_checkpointing() if on else unet.disable_gradient_checkpointing()
            person.tokens.requires_grad_(True).grad = None
            unet(**inputs).sample.square().sum().backward()
            grads.append(person.tokens.grad.clone())
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6) and grads[0].abs().max() > 0


def test_a_learned_scale(setup):
    unet, system, person, inputs = setup
    scale = torch.tensor(0.5, requires_grad=True)
    with idcore.attach(unet, system, person, id_scale=scale):
        unet(**inputs).sample.square().sum().backward()
    assert scale.grad.abs() > 0


# -- what loaders of diffusers do to processors -------------------------------------------------


def test_replaced_processors_do_not_lose_the_identity(setup):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person) as handle:
        with_id = run(unet, inputs)
        new = AttnProcessor()
        unet.set_attn_processor(new)
        assert torch.allclose(run(unet, inputs), with_id, atol=1e-5)
        assert "over AttnProcessor (replaced)" in handle.explain()
    assert set(unet.attn_processors.values()) == {new}
    before = unet.attn_processors
    handle = idcore.attach(unet, system, person)
    latest = AttnProcessor2_0()
    unet.set_attn_processor(latest)
    handle.detach()  # without a forward in between
    assert set(unet.attn_processors.values()) == {latest}
    handle = idcore.attach(unet, system, person)
    # What unload_ip_adapter does to processors that it does not know.
    unet.set_attn_processor({k: v.__class__() for k, v in unet.attn_processors.items()})
    assert torch.allclose(run(unet, inputs), with_id, atol=1e-5)
    unet.set_attn_processor({k: v.__class__() for k, v in unet.attn_processors.items()})
    handle.detach()
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert len(before) == len(unet.attn_processors)


def test_state_dict_and_parameters_do_not_change(setup):
    unet, system, person, _ = setup
    keys, modules = list(unet.state_dict()), len(list(unet.modules()))
    with idcore.attach(unet, system, person):
        assert list(unet.state_dict()) == keys and len(list(unet.modules())) == modules


# -- independence -------------------------------------------------------------------------------


def test_two_unets_in_two_threads():
    unets = [tiny_unet("sd", seed=0), tiny_unet("sd", seed=0)]
    system = TinySystem(unets[0], options=AttentionOptions("ortho_v2", 3, 2))
    inputs = [tiny_inputs("sd", height=8, width=8), tiny_inputs("sd", height=4, width=16)]
    mask = torch.rand(4, 4)
    handles = [idcore.attach(u, system, system.identity(i), id_mask=mask) for i, u in enumerate(unets)]
    serial = [run(u, x) for u, x in zip(unets, inputs)]
    results = [[], []]

    def work(i):
        for _ in range(8):
            results[i].append(run(unets[i], inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i in range(2):
        assert len(results[i]) == 8 and all(torch.allclose(r, serial[i], atol=1e-6) for r in results[i])
    [h.detach() for h in handles]


def test_one_unet_in_two_threads_with_two_sizes(setup):
    unet, system, person, _ = setup
    inputs = [tiny_inputs("sd", height=8, width=8), tiny_inputs("sd", height=4, width=16)]
    with idcore.attach(unet, system, person, id_mask=torch.rand(4, 4)):
        serial = [run(unet, x) for x in inputs]
        results = [[], []]
        threads = [
            threading.Thread(target=lambda i=i: [results[i].append(run(unet, inputs[i])) for _ in range(8)])
            for i in range(2)
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(len(r) == 8 and all(torch.allclose(x, serial[i], atol=1e-6) for x in r) for i, r in enumerate(results))


def test_nothing_stays_in_memory(setup):
    unet, system, person, inputs = setup
    handle = idcore.attach(unet, system, person)
    run(unet, inputs)
    stack, conditioning = weakref.ref(handle._stack), weakref.ref(handle._conditioning)
    handle.detach()
    del handle
    gc.collect()
    assert stack() is None and conditioning() is None
    for i in range(20):
        with idcore.attach(unet, system, system.identity(i)):
            run(unet, inputs)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is IdStack]


def test_a_hundred_identities_keep_one_bank(setup):
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person) as handle:
        run(unet, inputs)
        size = len(handle._conditioning.bank)
        for i in range(100):
            handle.identity(system.identity(i))
        run(unet, inputs)
        assert len(handle._conditioning.bank) == size


# -- explain and errors -------------------------------------------------------------------------


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


def test_module_and_function_share_a_name(setup):
    unet, system, person, _ = setup
    saved = {k: m for k, m in sys.modules.items() if k == "idcore" or k.startswith("idcore.")}
    try:
        for k in saved:
            del sys.modules[k]
        module = importlib.import_module("idcore.attach")
        fresh = sys.modules["idcore"]
        assert fresh.attach is module
        with fresh.attach(unet, system, person) as handle:
            assert isinstance(handle, fresh.Handle)
    finally:
        for k in [k for k in sys.modules if k == "idcore" or k.startswith("idcore.")]:
            del sys.modules[k]
        sys.modules.update(saved)


def test_attached_layers_are_modules_of_the_unet_only(setup):
    unet, system, person, _ = setup
    with idcore.attach(unet, system, person):
        assert not any(m is system for m in unet.modules() if isinstance(m, nn.Module))


def test_a_scale_per_identity_and_image(setup):
    unet, system, person, _ = setup
    other, inputs = system.identity(7), tiny_inputs("sd", batch=4)

    def drawn(rows=slice(None), **how):
        part = {k: v[rows] if v.dim() else v for k, v in inputs.items()}
        with idcore.attach(unet, system, [person, other], cfg=True, **how):
            return run(unet, part)

    scales = torch.tensor([[0.5, 1.0], [0.0, 0.8]])
    both = drawn(id_scale=scales)
    for image in (0, 1):
        alone = drawn([image, 2 + image], id_scale=scales[:, image].tolist())
        assert (both[[image, 2 + image]] - alone).abs().max() < 1e-5
    assert (both[0] - drawn([0, 2], id_scale=[1.0, 0.8])[0]).abs().max() > 1e-3
    with pytest.raises(InputError, match="a tensor for 3 images, this batch has 2; give one each"):
        drawn(id_scale=torch.ones(2, 3))


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


def test_detach_takes_off_what_lost_handles_left(setup):
    unet, system, person, inputs = setup
    before, found = run(unet, inputs), dict(unet.attn_processors)
    for _ in range(3):  # a cell of a notebook that ran three times
        handle = idcore.attach(unet, system, person, id_scale=0.5)
    assert idcore.detach(unet) == 3 and not handle.attached
    assert torch.equal(run(unet, inputs), before) and not unet._forward_pre_hooks
    assert all(unet.attn_processors[k] is found[k] for k in found)
    assert idcore.detach(unet) == 0
    handle.detach()
    with pytest.raises(InputError, match="wanted a diffusers pipeline"):
        idcore.detach(system.identity())
