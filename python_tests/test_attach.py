"""The handle: on, off, changes. Mathematics is tested in attention/."""

import pytest
import torch
from attach_cases import run, same_objects, tiny_setup
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet


@pytest.fixture
def setup():
    return tiny_setup()


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
