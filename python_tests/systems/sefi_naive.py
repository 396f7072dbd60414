"""SeFi-IDE as the paper writes it, slowly: diffusers encodes each stage's two prompts, every layer attends by loops."""

import math

import torch

from idcore.testing.tiny_models import tiny_pipeline

WIDTHS = {"sd": (32,), "sdxl": (32, 32)}


class NaiveAttention:
    """softmax(q k^T / sqrt d) v with the stage's own text for k and for v, and identities added plainly."""

    def __init__(self, now, name, add=None):
        self.now, self.name, self.add = now, name, add

    def __call__(self, attn, states, encoder_hidden_states=None, attention_mask=None, temb=None):
        keys, values = self.now["texts"]
        q, k, v = attn.to_q(states), attn.to_k(keys), attn.to_v(values)
        out, d = [], q.shape[-1] // attn.heads
        for h in range(0, q.shape[-1], d):
            cut = slice(h, h + d)
            weights = (q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(d)).softmax(-1)
            made = weights @ v[..., cut]
            if self.add is not None:
                ik, iv = (t[..., cut].to(q) for t in self.add(self.name))
                made = made + (q[..., cut] @ ik.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ iv
            out.append(made)
        return attn.to_out[0](torch.cat(out, -1))


def naive_pictures(kind, people, prompt, negative="", *, stages, steps, guidance, class_word="x", add=None, count=1):
    """Latents of diffusers' own pipeline in float64 with these people: {"V*": tokens [1, 2 S, E]}."""
    pipe = tiny_pipeline(kind).to(torch.float64)
    for p, (_, tokens) in enumerate(people.items()):
        for i, part in enumerate(tokens[0].double().split(list(WIDTHS[kind]), -1)):
            end = "_2" if i else ""
            pipe.load_textual_inversion(
                part, token=[f"<{p}-{j}>" for j in range(len(part))], tokenizer=getattr(pipe, f"tokenizer{end}"),
                text_encoder=getattr(pipe, f"text_encoder{end}"),
            )  # fmt: skip

    def encoded(which):
        """Text of [negative, prompt] with `which` word of every person."""
        words = [prompt, negative]
        for p, name in enumerate(people):
            words = [t.replace(name, class_word if which is None else f"<{p}-{which}>") for t in words]
        made = pipe.encode_prompt(prompt=words[0], negative_prompt=words[1], device="cpu", num_images_per_prompt=count,
                                  do_classifier_free_guidance=guidance > 1)  # fmt: skip
        return [t for t in made if t is not None]

    table = []
    for s in range(stages):
        k, v = encoded(2 * s), encoded(2 * s + 1)
        table.append([torch.cat([m[1], m[0]]) if guidance > 1 else m[0] for m in (k, v)])
    now = {}

    def stage_of(module, args, kwargs):
        t = float(args[1] if len(args) > 1 else kwargs["timestep"])
        now["texts"] = table[min(int(t * stages / 1000), stages - 1)]

    pipe.unet.register_forward_pre_hook(stage_of, with_kwargs=True)
    processors = dict(pipe.unet.attn_processors)
    for name in processors:
        if ".attn2." in name:
            processors[name] = NaiveAttention(now, name, add)
    pipe.unet.set_attn_processor(processors)
    plain = prompt
    base = negative
    for name in people:
        plain, base = plain.replace(name, class_word), base.replace(name, class_word)
    return drawn(pipe, plain, base, steps, guidance, count)


def drawn(pipe, prompt, negative="", steps=5, guidance=3.0, count=1, **more):
    """Latents from fixed noise."""
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return pipe(
            prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, height=16, width=16,
            latents=noise.to(pipe.unet.dtype), num_images_per_prompt=count, output_type="latent", **more,
        ).images  # fmt: skip
