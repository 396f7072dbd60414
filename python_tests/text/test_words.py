"""Learned words in prompts: positions, several people, threads, no trace; against diffusers' own textual inversion."""

import threading

import pytest
import torch

import idcore
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.words import WordSystem, encode_with_words
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet
from idcore.text.inversion import is_inversion, read_words, write_words
from idcore.text.placeholders import mentions, replaced

WIDTHS = {"sd": (32,), "sdxl": (32, 32)}


def person(kind="sd", k=2, seed=1, **meta):
    tokens = torch.randn(1, k, sum(WIDTHS[kind]), generator=torch.Generator().manual_seed(seed)) * 0.02
    return Identity(tokens, None, "words", {"widths": list(WIDTHS[kind]), **meta})


def text_of(pipe, prompt, negative="ugly"):
    with torch.no_grad():
        made = pipe.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1,
                                  do_classifier_free_guidance=True, negative_prompt=negative)  # fmt: skip
    return [t for t in made if t is not None]


def by_hand(pipe, end, ids, vectors):
    """The text transformer on word embeddings that were put together one by one, in float64."""
    import copy

    encoder = copy.deepcopy(getattr(pipe, f"text_encoder{end}")).double()
    model = getattr(encoder, "text_model", encoder)
    table = encoder.get_input_embeddings().weight
    rows = [vectors[i].double() if isinstance(i, str) else table[i] for i in ids]

    class Fixed(torch.nn.Module):
        weight = table

        def forward(self, _):
            return torch.stack(rows)[None]

    model.embeddings.token_embedding = Fixed()
    plain = torch.tensor([[0 if isinstance(i, str) else i for i in ids]])
    with torch.no_grad():
        return encoder(plain, output_hidden_states=True)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_people_in_one_prompt_equal_the_prompt_put_together_by_hand(kind):
    pipe, a, b = tiny_pipeline(kind), person(kind, 2, 1), person(kind, 3, 2)
    with idcore.attach(pipe, None, [a, b], placeholder=["S*", "<b>"]):
        made = text_of(pipe, "S* and <b>'s cat")
    plain = pipe.tokenizer
    middle, after = (plain(t, add_special_tokens=False)["input_ids"] for t in (" and ", "'s cat"))
    ids = [512, "a0", "a1", *middle, "b0", "b1", "b2", *after, 513]
    ids += [513] * (77 - len(ids))
    got, pooled, at = made[0], made[2] if kind == "sdxl" else None, 0
    for i, width in enumerate(WIDTHS[kind]):
        own = {f"a{j}": a.tokens[0, j, at : at + width] for j in range(2)}
        own |= {f"b{j}": b.tokens[0, j, at : at + width] for j in range(3)}
        truth = by_hand(pipe, "_2" if i else "", ids, own)
        states = truth.hidden_states[-2] if kind == "sdxl" else truth.last_hidden_state
        assert torch.allclose(got[..., at : at + width].double(), states, atol=2e-5)
        at += width
    if pooled is not None:
        assert torch.allclose(pooled.double(), truth.text_embeds, atol=2e-5), "read at the end of the text"


def test_what_diffusers_itself_makes_of_a_textual_inversion_file(tmp_path):
    ours, theirs, me = tiny_pipeline(), tiny_pipeline(), person(k=3)
    path = write_words(tmp_path / "learned_embeds.safetensors", me.tokens[0], [32], "<me>")
    theirs.load_textual_inversion(path)
    prompt = ["a photo of <me> as a nurse", "<me>"]
    wanted = text_of(theirs, prompt, ["", "a <me>"])
    found = read_words(path)
    with idcore.attach(ours, None, found) as handle:
        assert handle.placeholders == ("<me>",)
        got = text_of(ours, prompt, ["", "a <me>"])
    assert is_inversion(path) and torch.equal(found.tokens, me.tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    # and words of theirs that were loaded before stay, with ours beside them
    with idcore.attach(theirs, None, person(k=1, seed=3)):
        assert torch.equal(text_of(theirs, prompt, ["", "a <me>"])[0], wanted[0])
        assert not torch.equal(text_of(theirs, "S* <me>")[0], text_of(theirs, "person <me>")[0])


def test_textual_inversion_loaded_while_words_are_attached():
    pipe, me = tiny_pipeline(), person()
    with idcore.attach(pipe, None, me):
        before = text_of(pipe, "a photo of S*")
        pipe.load_textual_inversion({"<new>": torch.ones(32)}, token="<new>")
        assert torch.equal(text_of(pipe, "a photo of S*")[0], before[0]), "the word embeddings were replaced"
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_sdxl_files_hold_the_pair_that_diffusers_reads(tmp_path):
    me = person("sdxl")
    path = write_words(tmp_path / "e.safetensors", me.tokens[0], [32, 32], "T*", {"more": "x"})
    from safetensors.torch import load_file

    state = load_file(path)
    assert sorted(state) == ["clip_g", "clip_l"] and state["clip_g"].shape == (2, 32)
    theirs = tiny_pipeline("sdxl")
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        theirs.load_textual_inversion(
            state[name], token=["<s0>", "<s1>"], text_encoder=getattr(theirs, f"text_encoder{end}"),
            tokenizer=getattr(theirs, f"tokenizer{end}"),
        )  # fmt: skip
    ours, back = tiny_pipeline("sdxl"), read_words(path)
    assert torch.equal(back.tokens, me.tokens) and back.meta["placeholder"] == "T*"
    with idcore.attach(ours, None, back):
        got = text_of(ours, "T* smiles")
    for a, b in zip(got, text_of(theirs, "<s0><s1> smiles")):
        assert torch.equal(a, b)


def test_no_trace_remains_and_other_prompts_are_untouched():
    pipe = tiny_pipeline("sdxl")
    cls, keys = type(pipe.tokenizer), set(pipe.tokenizer.__dict__)
    before = text_of(pipe, ["a photo of S*", "x"], ["", "y"])
    first = idcore.attach(pipe, None, person("sdxl"))
    second = idcore.attach(pipe, None, person("sdxl", seed=4), placeholder="T*")
    assert isinstance(pipe.tokenizer, cls) and type(pipe.tokenizer).__name__ == cls.__name__
    assert torch.equal(text_of(pipe, "no one")[0], text_of(tiny_pipeline("sdxl"), "no one")[0])
    both = text_of(pipe, "T*")
    first.detach()
    first.detach()
    assert torch.equal(text_of(pipe, "T*")[0], both[0]), "the other attach stays"
    second.detach()
    for a, b in zip(text_of(pipe, ["a photo of S*", "x"], ["", "y"]), before):
        assert torch.equal(a, b)
    assert type(pipe.tokenizer) is cls and set(pipe.tokenizer.__dict__) == keys
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        module = encoder.get_input_embeddings()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_scale_0_reads_the_class_word_and_identities_can_be_swapped():
    pipe, a, b = tiny_pipeline(), person(seed=1), person(seed=2)
    with idcore.attach(pipe, None, a, id_scale=0, class_word="man") as handle:
        assert torch.equal(text_of(pipe, "a photo of S*")[0], text_of(pipe, "a photo of man")[0])
        assert 'read as "man"' in handle.explain()
        handle.scale(1)
        one = text_of(pipe, "a photo of S*")[0]
        handle.identity(b)
        other = text_of(pipe, "a photo of S*")[0]
        assert not torch.equal(one, other)
        with pytest.raises(InputError, match="1 placeholders"):
            handle.identity([a, b])
        assert torch.equal(text_of(pipe, "a photo of S*")[0], other)
    with idcore.attach(pipe, None, b):
        assert torch.equal(text_of(pipe, "a photo of S*")[0], other)


def test_rows_of_an_identity_go_to_prompts():
    pipe, rows = tiny_pipeline(), Identity.batch([person(seed=1), person(seed=2)])
    alone = []
    for seed in (1, 2):
        with idcore.attach(pipe, None, person(seed=seed)):
            alone.append(text_of(pipe, "S*")[0])
    with idcore.attach(pipe, None, rows):
        assert torch.equal(text_of(pipe, ["S*", "S*"], ["", ""])[0], torch.cat(alone))
        with pytest.raises(InputError, match="2 prompts, which do not divide the 3"):
            text_of(pipe, ["S*"] * 3, [""] * 3)


def test_long_prompts_warn_as_diffusers_does_or_say_that_the_person_is_lost(caplog):
    pipe = tiny_pipeline()
    with idcore.attach(pipe, None, person(k=4)):
        with caplog.at_level("WARNING"):
            made = text_of(pipe, "S* " + "a" * 90)[0]
        assert "was truncated" in caplog.text and made.shape[1] == 77
        text_of(pipe, "a" * 71 + " S*")  # 71 + 4 fit beside begin and end
        with pytest.raises(InputError, match=r"76 tokens, the text encoder reads 75 of them, and S\* or a part of it"):
            text_of(pipe, "a" * 72 + " S*")


def test_threads_with_people_of_their_own_do_not_mix():
    pipe = tiny_pipeline()
    people = {f"p{i}*": person(seed=i) for i in range(4)}
    wanted = {}
    with idcore.attach(pipe, None, list(people.values()), placeholder=list(people)):
        for name in people:
            wanted[name] = text_of(pipe, f"a photo of {name}")[0]
        wrong, barrier = [], threading.Barrier(4)

        def work(name):
            barrier.wait()
            for _ in range(8):
                if not torch.equal(text_of(pipe, f"a photo of {name}")[0], wanted[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(n,)) for n in people]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong and len({t.sum().item() for t in wanted.values()}) == 4


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_gradients_reach_the_words_as_by_finite_differences(kind):
    pipe = tiny_pipeline(kind)
    for end in ("", "_2") if kind == "sdxl" else ("",):
        getattr(pipe, f"text_encoder{end}").double()
    words = [torch.randn(2, 2, w, dtype=torch.float64) * 0.02 for w in WIDTHS[kind]]

    def loss(*vectors):
        text, pooled = encode_with_words(pipe, ["a S*", "S* b"], {"S*": vectors})
        return text.square().mean() + (0 if pooled is None else pooled.square().mean())

    leaves = [w.clone().requires_grad_() for w in words]
    loss(*leaves).backward()
    g = torch.Generator().manual_seed(0)
    for i, leaf in enumerate(leaves):
        step = torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        up, down = ([w + s * 1e-5 * step if i == j else w for j, w in enumerate(words)] for s in (1, -1))
        slope = (loss(*up) - loss(*down)) / 2e-5
        assert torch.allclose(slope, (leaf.grad * step).sum(), rtol=1e-5) and leaf.grad[1].abs().max() > 0


def test_pictures_and_idpipeline_take_words_beside_an_identity_in_the_attention():
    pipe = tiny_pipeline("sdxl")
    both = idcore.IDPipeline(pipe, sampler="own")
    system = TinySystem(pipe.unet)

    def draw(target, **more):
        made = target("a photo of S*", num_inference_steps=2, guidance_scale=2.0, height=16, width=16,
                      generator=torch.Generator().manual_seed(0), output_type="np", **more)  # fmt: skip
        return torch.as_tensor(made.images)

    plain = draw(pipe)
    with idcore.attach(both, None, person("sdxl")), idcore.attach(pipe, system, system.identity()):
        two = draw(pipe)
        assert torch.allclose(two, draw(both), atol=1e-6)
    with idcore.attach(pipe, None, person("sdxl")):
        words = draw(pipe)
    assert (plain - words).abs().max() > 1e-4 and (words - two).abs().max() > 1e-4
    assert torch.equal(draw(pipe), plain)


def test_placeholders_are_found_as_words():
    assert mentions("(S*), and", ["S*"]) and mentions("S*'s", ["S*"]) and not mentions("gaS*", ["S*"])
    assert not mentions("s*", ["S*"]) and not mentions("V1", ["V"]) and not mentions("", ["V"])
    assert replaced("V*2 and V*", {"V*": "a", "V*2": "b"}) == "b and a"


def test_errors_say_what_to_do(tmp_path):
    pipe, me = tiny_pipeline(), person()
    with pytest.raises(InputError, match="width 32 \\+ 32, this pipeline's text encoders have 32"):
        idcore.attach(pipe, None, person("sdxl"))
    with pytest.raises(InputError, match="Give the pipeline, not its UNet"):
        idcore.attach(tiny_unet(), WordSystem(), me)
    with pytest.raises(InputError, match="does not take id_mask, cfg, merge; it takes id_scale, placeholder"):
        idcore.attach(pipe, None, me, id_mask="left", cfg=True, merge="add")
    with pytest.raises(InputError, match="acts through the prompt; make the pipeline without it"):
        idcore.IDPipeline(tiny_pipeline("sdxl"), WordSystem())
    with pytest.raises(InputError, match="acts through the prompt and has no keys and values"):
        me.with_bank(WordSystem(), pipe)
    with pytest.raises(InputError, match="act or do not: 1, or 0"):
        idcore.attach(pipe, None, me, id_scale=0.5)
    with pytest.raises(InputError, match="need different ones"):
        idcore.attach(pipe, None, [me, person(seed=2)])
    with pytest.raises(InputError, match="word without blanks"):
        idcore.attach(pipe, None, me, placeholder="a b")
    with idcore.attach(pipe, None, me), pytest.raises(InputError, match="stands for another person"):
        idcore.attach(pipe, None, me)
    with pytest.raises(InputError, match="must be words for the prompt"):
        idcore.attach(pipe, WordSystem(), Identity(torch.zeros(1, 1, 32), None, "pulid-v1"))
    with pytest.raises(InputError, match="return_offsets_mapping cannot be used"), idcore.attach(pipe, None, me):
        pipe.tokenizer("S*", return_offsets_mapping=True)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="wanted one tensor, or clip_l and clip_g, got 2 tensors"):
        read_words(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(3, 2, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match=r"word embeddings \[k, E\] or \[E\], got \[3, 2, 2\]"):
        read_words(tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="clip_l has 1 words and clip_g 2"):
        save_file({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(2, 4)}, tmp_path / "z.safetensors")
        read_words(tmp_path / "z.safetensors")
    with pytest.raises(InputError, match="one or two text encoders"):
        write_words(tmp_path / "w.safetensors", torch.zeros(2, 5), [2, 2], "S*")
    assert type(pipe.tokenizer).__name__ == "CLIPTokenizer" and "_idcore_words" not in pipe.tokenizer.__dict__
