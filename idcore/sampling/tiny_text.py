"""The embedded model's text: a word-level tokenizer without files, and a small transformer."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn

from ..errors import InputError

PAD, START = 0, 1
WORDS = tuple(
    """a an and antique anime ahead astonished at back backdrop background beard black blue calm camera canvas
    cartoon charcoal classic close colored coloured colour color comic dark detailed digital drawing drawn expression
    face facing for forward friendly from front frontal glad graphite gray green grey happily happy head headshot
    high hand her his illustration image in into is it joyful laughing left light like look looking looks lady man
    midnight moonlight moonlit mouth neutral night no of off oil old on one open orange over painted painting pencil
    person photo photograph photographic picture pink plain portrait profile purple quality realistic red relaxed
    right retro same screen seen sepia serious shocked shot side simple sketch smile smiles smiling someone staring
    startled straight studio style surprise surprised that the their this to toned tone toward towards turned turning
    view vintage violet wall watching well white wide with woman yellow young""".split()
)


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, in lower case."""
    return re.findall(r"[^\W\d_]+", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that training never showed; they act like noise."""
    return list(dict.fromkeys(w for w in words_of(prompt) if w not in WORDS))


class WordTokenizer:
    """Lower-case words to ids: known words by table, others by one of `buckets` CRC-32 buckets.

    Ids: 0 padding, 1 start, then `WORDS`, then the buckets. A prompt longer than `length - 1` words is cut.
    """

    def __init__(self, length: int = 24, buckets: int = 64) -> None:
        self.length, self.buckets = length, buckets
        self.table = {w: i + 2 for i, w in enumerate(WORDS)}

    @property
    def size(self) -> int:
        return 2 + len(WORDS) + self.buckets

    def __call__(self, prompts: list[str]) -> Tensor:
        """int64 [len(prompts), length]; raises InputError for anything but strings."""
        out = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"a prompt is a string, got {type(prompt).__name__}; write what to draw in words")
            words = words_of(prompt)[: self.length - 1]
            ids = [START] + [self._id(w) for w in words]
            out[row, : len(ids)] = torch.tensor(ids)
        return out

    def _id(self, word: str) -> int:
        known = self.table.get(word)
        return known if known else 2 + len(WORDS) + zlib.crc32(word.encode()) % self.buckets


class _Block(nn.Module):
    """Pre-norm self-attention and MLP; plain matrix products (at 24 tokens faster than a fused kernel)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
        h = (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Ids [B, L] -> tokens [B, L, width] and their pooled mean [B, width] (padding left out, its tokens 0)."""

    def __init__(self, vocabulary: int, length: int, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList([_Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        padding = ids == PAD
        bias = torch.zeros(ids.shape, device=ids.device).masked_fill(padding, -1e4)[:, None, None]
        x = self.embed(ids) + self.position
        for layer in self.layers:
            x = layer(x, bias)
        x = self.norm(x)
        keep = (~padding).to(x.dtype)[..., None]
        return x * keep, (x * keep).sum(1) / keep.sum(1)
