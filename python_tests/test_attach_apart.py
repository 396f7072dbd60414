"""What `attach` leaves alone: other UNets, threads and sizes, memory, modules, the module of its name."""

import gc
import importlib
import pickle
import sys
import threading
import weakref

import pytest
import torch
from attach_cases import generate, run, tiny_setup
from naive_attention import one_thread  # noqa: F401
from torch import nn

import idcore
from idcore.attention.stack import IdStack
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_pipeline, tiny_unet


@pytest.fixture
def setup():
    return tiny_setup()


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


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("how", [{}, {"id_schedule": [1.0, 0.2, 0.6]}])
def test_another_thread_runs_the_unet_between_two_layers(how, silent):
    """With another guidance and other timesteps, in the middle of each pass."""
    mine = tiny_pipeline("sd")
    theirs = tiny_pipeline("sd", unet=mine.unet)
    system = TinySystem(mine.unet, options=AttentionOptions("ortho_v2", 3, 2))
    made = []

    def beside(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: made.append(generate(theirs, guidance=1.0, n=2, seeds=(1, 2))))
            thread.start()
            thread.join()

    with idcore.attach(mine, system, system.identity(uncond=not silent), **how):
        alone, want = generate(mine, n=2, seeds=(3, 4)), generate(theirs, guidance=1.0, n=2, seeds=(1, 2))
        hook = mine.unet.mid_block.register_forward_pre_hook(beside)
        assert torch.equal(generate(mine, n=2, seeds=(3, 4)), alone)
        hook.remove()
    assert len(made) == 2 and all(torch.equal(m, want) for m in made)


def test_an_attached_unet_can_be_pickled():
    pipe = tiny_pipeline("sd")
    system = TinySystem(pipe.unet)
    inputs = tiny_inputs("sd")
    plain = run(pipe.unet, inputs)
    for cfg in ("auto", True):
        with idcore.attach(pipe, system, system.identity(), cfg=cfg, id_guidance_end=0.5):
            pipe.unet(**inputs) if cfg is True else generate(pipe)
            copy = pickle.loads(pickle.dumps(pipe.unet))
        assert idcore.detach(copy) == 1 and torch.equal(run(copy, inputs), plain)


def test_nothing_stays_in_memory(setup):
    unet, system, person, inputs = setup
    gc.collect()
    before = [o for o in gc.get_objects() if type(o) is IdStack]  # what other tests of this process hold
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
    left = [o for o in gc.get_objects() if type(o) is IdStack]
    assert {id(o) for o in left} <= {id(o) for o in before}


def test_a_hundred_identities_keep_one_bank(setup):
    unet, system, person, inputs = setup
    with idcore.attach(unet, system, person) as handle:
        run(unet, inputs)
        size = len(handle._conditioning.bank)
        for i in range(100):
            handle.identity(system.identity(i))
        run(unet, inputs)
        assert len(handle._conditioning.bank) == size


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
