"""`IDPipeline`: equal to diffusers' own pipeline with `attach`, thread-safe, without a trace afterwards."""

import gc
import threading
import weakref

import pytest
import torch
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.errors import InputError
from idcore.sampling.sdxl import scheduler_by_name
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

V2 = AttentionOptions("ortho_v2", 4, 3)


def seeded(*seeds):
    made = [torch.Generator().manual_seed(s) for s in seeds]
    return made if len(made) > 1 else made[0]


SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}


@pytest.fixture
def pipe():
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    return idcore.IDPipeline(stock, TinySystem(stock.unet, options=V2))


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def latents(pipe, *people, seeds=(0,), **more):
    if people:
        more["id_embeds"] = list(people)
    return pipe("a dog", generator=seeded(*seeds), output_type="latent", **more).images


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(
    "sampler, steps", [("lightning", 4), ("lightning-euler", 2), ("karras-2m", 5), ("karras-sde", 3)]
)
def test_equal_to_the_stock_pipeline_with_attach(sampler, steps, guidance):
    stock = tiny_pipeline("sdxl")
    system = TinySystem(stock.unet, options=V2)
    pipe = idcore.IDPipeline(stock, system, sampler=sampler)
    me, you = system.identity(0), system.identity(1, uncond=False)
    half = torch.zeros(4, 4)
    half[:, 2:] = 1
    how = dict(id_scale=[0.9, 0.4], id_guidance_end=[0.8, 1.0], id_schedule=[1.0, 0.5])
    words = dict(negative_prompt="bad", num_inference_steps=steps, guidance_scale=guidance, num_images_per_prompt=2)
    ours = latents(pipe, me, you, seeds=(5, 6), id_masks=[half, None], **how, **words)
    plain = latents(pipe, seeds=(5, 6), **words)
    pipe.forget_identity()
    stock.scheduler = scheduler_by_name(sampler, stock.scheduler.config)

    def theirs():
        generator = seeded(5, 6)
        return stock("a dog", height=16, width=16, generator=generator, output_type="latent", **words).images

    assert torch.equal(theirs(), plain)
    with idcore.attach(stock, system, [me, you], id_mask=[half, None], **how):
        assert torch.equal(theirs(), ours)
    assert not torch.equal(ours, plain)


def test_pictures_and_what_comes_back(pipe):
    made = pipe(["a dog", "a cat"], generator=seeded(0, 1), output_type="pt")
    assert made.images.shape == (2, 3, 16, 16) and made.images.min() >= 0 and made.images.max() <= 1
    (pictures,) = pipe("a dog", generator=seeded(0), return_dict=False, height=32, width=16)
    assert pictures[0].size == (16, 32)
    array = pipe("a cat", generator=seeded(1), output_type="np").images
    assert abs(torch.from_numpy(array[0]).permute(2, 0, 1) - made.images[1]).max() < 1e-4
    stock = pipe.pipe
    stock.scheduler = scheduler_by_name("lightning", stock.scheduler.config)
    theirs = stock("a dog", height=16, width=16, num_inference_steps=4, guidance_scale=1.0, generator=seeded(0))
    ours = pipe("a dog", generator=seeded(0))
    assert theirs.images[0].tobytes() == ours.images[0].tobytes()


def test_each_picture_of_a_batch_is_the_one_of_its_generator(pipe):
    me = pipe.system.identity()
    batch = latents(pipe, me, seeds=(1, 2, 3), num_images_per_prompt=3, guidance_scale=1.5)
    for i in range(3):
        one = latents(pipe, me, seeds=(1 + i,), guidance_scale=1.5)[0]
        assert (batch[i] - one).abs().max() < 1e-4 * one.abs().max()


def test_without_guidance_one_pass(pipe):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kw: batches.append(len(args[0])), with_kwargs=True)
    me = pipe.system.identity()
    latents(pipe, me, guidance_scale=1.0)
    latents(pipe, me, guidance_scale=2.0)
    hook.remove()
    assert batches == [1] * 4 + [2] * 4


def test_identities_are_off_between_calls_and_projected_once(pipe):
    plain = latents(pipe)
    me = pipe.system.identity()
    first = latents(pipe, me)
    count = pipe.system.projections
    assert torch.equal(latents(pipe), plain)
    assert torch.equal(latents(pipe, me), first) and pipe.system.projections == count
    other = latents(pipe, pipe.system.identity(7))
    assert not torch.equal(other, first) and pipe.system.projections > count
    stock = pipe.pipe
    stock.scheduler = scheduler_by_name("lightning", stock.scheduler.config)
    theirs = stock("a dog", height=16, width=16, num_inference_steps=4, guidance_scale=1.0, generator=seeded(0),
                   output_type="latent").images  # fmt: skip
    assert torch.equal(theirs, plain)
    pipe.forget_identity()
    assert not pipe.unet._forward_pre_hooks
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_adapter_weights_may_go_after_the_first_call(pipe):
    me = pipe.system.identity()
    first = latents(pipe, me)
    for weight in pipe.system.parameters():
        weight.data = torch.empty(0)
    assert torch.equal(latents(pipe, me), first)


def test_photos_go_through_the_system(pipe):
    seen = []
    pipe.system.encode = lambda photos: seen.append(photos) or pipe.system.identity(len(seen))
    one = latents(pipe, id_image="me.jpg")
    assert seen == ["me.jpg"] and torch.equal(one, latents(pipe, pipe.system.identity(1)))
    latents(pipe, id_image=["me1.jpg", "me2.jpg"])
    assert seen[1] == ["me1.jpg", "me2.jpg"]
    latents(pipe, id_image=[["me.jpg"], ["you.jpg"]])
    assert seen[2:] == [["me.jpg"], ["you.jpg"]]


def test_saved_identities(pipe, tmp_path):
    me = pipe.system.identity()
    me.save(tmp_path / "me.safetensors")
    assert torch.equal(latents(pipe, tmp_path / "me.safetensors"), latents(pipe, me))


def test_callbacks_see_and_change_the_run(pipe):
    from diffusers.callbacks import SDXLCFGCutoffCallback

    seen = []

    def look(view, i, t, tensors):
        seen.append((i, int(t), view.num_timesteps, sorted(tensors)))
        return {"latents": tensors["latents"] * 0} if i == 3 else {}

    names = ["latents", "prompt_embeds"]
    out = latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [s[:3] for s in seen] == [(0, 999, 4), (1, 749, 4), (2, 499, 4), (3, 249, 4)]
    assert seen[0][3] == names and not out.any()

    def stop(view, i, t, tensors):
        view._interrupt = i == 1
        return tensors

    stopped = latents(pipe, callback_on_step_end=stop)
    steps = []
    latents(pipe, callback_on_step_end=lambda v, i, t, kw: steps.append(kw["latents"]) or kw)
    assert torch.equal(stopped, steps[1])
    # diffusers' own callback: guidance for the first half of the steps only
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kw: batches.append(len(args[0])), with_kwargs=True)
    cut = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    latents(pipe, pipe.system.identity(), guidance_scale=3.0, callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=cut.tensor_inputs)  # fmt: skip
    hook.remove()
    assert batches[0] == 2 and batches[-1] == 1


def test_an_exception_leaves_the_pipeline_usable(pipe):
    me, plain = pipe.system.identity(), latents(pipe)

    def fail(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        latents(pipe, me, callback_on_step_end=fail)
    assert torch.equal(latents(pipe), plain)
    with pytest.raises(InputError, match="id_scale"):
        latents(pipe, me, id_scale="strong")
    with pytest.raises(InputError, match="divide"):
        latents(pipe, pipe.system.identity(rows=2), seeds=(0,))
    assert torch.equal(latents(pipe), plain)


def test_sixteen_threads_get_what_one_gets(pipe):
    people = [pipe.system.identity(i, uncond=i % 2 == 0) for i in range(5)]
    half = torch.zeros(4, 4)
    half[2:] = 1

    def request(thread, n):
        k = (thread + 3 * n) % 7
        who = [] if k == 6 else people[: 2 if k == 5 else 1] if k >= 5 else [people[k]]
        masks = {"id_masks": [half, None]} if len(who) == 2 else {}
        return latents(pipe, *who, seeds=(10 * thread + n,), num_inference_steps=1, guidance_scale=1.0 + k % 2,
                       id_scale=0.5 + 0.1 * k, **masks)  # fmt: skip

    serial = {(t, n): request(t, n) for t in range(16) for n in range(10)}
    results, wrong = {}, []

    def work(thread):
        try:
            for n in range(10):
                results[thread, n] = request(thread, n)
        except Exception as e:  # a failing thread must fail the test
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert all(torch.equal(results[key], serial[key]) for key in serial) and len(results) == 160


def test_two_hundred_identities_leak_nothing(pipe):
    gone = []
    for i in range(200):
        person = pipe.system.identity(i)
        gone.append(weakref.ref(person))
        latents(pipe, person, num_inference_steps=1)
        if i == 20:
            before = tensors_alive()
    del person
    after = tensors_alive()
    assert sum(r() is not None for r in gone) == 1  # the one that is seated
    assert after <= before + 5


def test_a_hundred_attaches_leak_nothing():
    pipe = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    system = TinySystem(pipe.unet, options=V2)
    before_processors = pipe.unet.attn_processors

    def cycle(i):
        with idcore.attach(pipe, system, system.identity(i), id_guidance_end=0.5):
            pipe("a dog", num_inference_steps=1, height=16, width=16, output_type="latent")

    for i in range(3):
        cycle(i)
    before = tensors_alive()
    for i in range(100):
        cycle(i)
    assert tensors_alive() <= before + 5
    now = pipe.unet.attn_processors
    assert all(now[k] is before_processors[k] for k in now) and not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("adapter", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mix_of_dtypes(weights, adapter):
    stock = tiny_pipeline("sdxl").to(weights)
    pipe = idcore.IDPipeline(stock, TinySystem(stock.unet, options=V2).to(adapter))
    out = pipe("a dog", id_embeds=pipe.system.identity(), generator=seeded(0), guidance_scale=1.5, output_type="pt")
    assert torch.isfinite(out.images).all() and out.images.shape == (1, 3, 16, 16)
    assert latents(pipe, pipe.system.identity()).dtype == weights


@pytest.mark.parametrize(
    "more, text",
    [
        (dict(prompt=3), "prompt must be a string or a list of strings, got 3"),
        (dict(prompt=["a", "b"], negative_prompt=["c"]), "2 prompts need one or 2, got 1"),
        (dict(output_type="gif"), "output_type must be one of pil, np, pt, latent, got 'gif'"),
        (dict(guidance_scale=-1), "guidance_scale must be a number from 0, got -1"),
        (dict(num_inference_steps=0), "num_inference_steps must be a whole number from 1, got 0"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be a whole number from 1, got 0"),
        (dict(height=17), "height and width must be multiples of 4, got 17 and 16"),
        (dict(latents=torch.zeros(2, 4, 8, 8)), r"latents must be \[1, 4, 8, 8\]"),
        (dict(generator=[torch.Generator()] * 2), "generator: 1 pictures need one or 1, got 2"),
        (dict(id_image="me.jpg"), "system TinySystem cannot read photos; give id_embeds"),
        (dict(id_image="me.jpg", id_embeds="me.safetensors"), "give id_image or id_embeds, not both"),
        (
            dict(callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"]),
            "callback_on_step_end_tensor_inputs knows latents, prompt_embeds",
        ),
    ],
)
def test_wrong_arguments(pipe, more, text):
    with pytest.raises(InputError, match=text):
        pipe(**({"prompt": "a dog"} | more))


def test_wrong_pipelines():
    sd, xl = tiny_pipeline("sd"), tiny_pipeline("sdxl")
    with pytest.raises(InputError, match="wanted a StableDiffusionXLPipeline, got StableDiffusionPipeline"):
        idcore.IDPipeline(sd)
    with pytest.raises(InputError, match="runner must be one of eager, graph, got 'fast'"):
        idcore.IDPipeline(xl, runner="fast")
    with pytest.raises(InputError, match='runner="graph" records a CUDA graph and the UNet is on cpu'):
        idcore.IDPipeline(xl, runner="graph")
    with pytest.raises(InputError, match="sampler must be one of lightning"):
        idcore.IDPipeline(xl, sampler="ddim")
    with pytest.raises(InputError, match="vae_dtype must be auto, float32, bfloat16, float16"):
        idcore.IDPipeline(xl, vae_dtype="int8")
    with pytest.raises(InputError, match="without a system cannot use id_embeds"):
        idcore.IDPipeline(xl)("a dog", id_embeds=[1])
