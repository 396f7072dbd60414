"""tiny-sd: a small text-to-image model of drawn people in Stable Diffusion 1.5's layout, for training and tests.

Diffusers' own `StableDiffusionPipeline` with small parts, so that every system runs on it as it does on a large model.
`idcore train tiny-sd` made its weights from nothing but the project's own drawings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..errors import WeightsError
from .tiny_text import WORDS

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny_sd"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FOLD = 4  # pixels of a latent cell's edge

START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
RARE = ("sks", "v", "w")  # words that training never showed: identifiers for new subjects and styles
MORE = (
    "comic",
    "cap",
    "style",
    "subject",
    "people",
    "faces",
    "backgrounds",
    "scene",
    "empty",
    "nobody",
    "guy",
    "boy",
    "girl",
)
_FIRST = """al an ar bel ber cor dan dor el em fen fin gar hel ir jan jor kal ker lan lor mar mel nar nol or pel ral
ser tal ver wil""".split()
_SECOND = "ado ben dia eka fio gus ina jo kim lia mon nas olo rik sun via".split()


def names() -> tuple[str, ...]:
    """The 512 people that tiny-sd knows by name; person i is drawn from seed `NAMED_SEED + i`."""
    return tuple(a + b for a in _FIRST for b in _SECOND)


NAMED_SEED = 5_000_000


@dataclass(frozen=True)
class TinySDConfig:
    """Hyper-parameters of tiny-sd (all our choice)."""

    size: int = 64
    channels: tuple[int, ...] = (64, 128)
    width: int = 128
    text_layers: int = 2
    text_length: int = 24

    def as_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> TinySDConfig:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class FoldedPixels(ModelMixin, ConfigMixin):
    """Stands where the autoencoder stands: 4x4 pixels of three colours are one latent cell of 48 numbers, exactly."""

    @register_to_config
    def __init__(self, latent_channels: int = 3 * FOLD * FOLD, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.register_to_config(block_out_channels=(1,) * (FOLD.bit_length()), force_upcast=False)
        self.register_buffer("_where", torch.zeros(()), persistent=False)  # a dtype and a device to have

    @property
    def dtype(self) -> torch.dtype:
        return self._where.dtype

    @property
    def device(self) -> torch.device:
        return self._where.device

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Pixels [B, 3, H, W] in -1..1 to latents [B, 48, H / 4, W / 4], as a distribution without spread."""
        latents = F.pixel_unshuffle(x, FOLD)
        one = SimpleNamespace(mode=lambda: latents, sample=lambda generator=None: latents, mean=latents)
        return SimpleNamespace(latent_dist=one) if return_dict else (one,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Latents [B, 48, h, w] to pixels [B, 3, 4 h, 4 w]."""
        x = F.pixel_shuffle(z, FOLD)
        return SimpleNamespace(sample=x) if return_dict else (x,)


def vocabulary() -> list[str]:
    """Words in the order of their ids."""
    words = [START, END, UNKNOWN, *WORDS, *RARE]
    words += [w for w in MORE if w not in words]
    return words + list(names())


def make_tokenizer(config: TinySDConfig) -> Any:
    """Word-level tokenizer: lower case, punctuation dropped, unknown words as one token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {w: i for i, w in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}\s]"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, table[START]), (END, table[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, unk_token=UNKNOWN, pad_token=END,
        model_max_length=config.text_length,
    )  # fmt: skip


def make_unet(config: TinySDConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel

    n, folded = len(config.channels), 3 * FOLD * FOLD
    return UNet2DConditionModel(
        sample_size=config.size // FOLD,
        in_channels=folded,
        out_channels=folded,
        layers_per_block=1,
        block_out_channels=config.channels,
        cross_attention_dim=config.width,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n,
        attention_head_dim=tuple(c // 32 for c in config.channels),  # diffusers' name for the number of heads
        use_linear_projection=True,
    )


def make_text_encoder(config: TinySDConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.text_length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def make_pipeline(unet: nn.Module, text_encoder: nn.Module, config: TinySDConfig) -> Any:
    """The parts as diffusers' `StableDiffusionPipeline`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        prediction_type="sample", steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        FoldedPixels(), text_encoder, make_tokenizer(config), unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(folder: str | Path = PACKAGE_FOLDER) -> Any:
    """tiny-sd as a `StableDiffusionPipeline` (float32, on the CPU): 64x64 pictures, four steps, `guidance_scale=1`.

    Args:
        folder: of `idcore train tiny-sd`; default: the weights that the package ships.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit.
    """
    from ..weights import read_safetensors, require_keys

    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise WeightsError(
                f"{folder} has no {name}; wanted a folder with {WEIGHTS} and {CONFIG}. Install idcore again, or make "
                "one with `idcore train tiny-sd`"
            )
    facts = json.loads((folder / CONFIG).read_text())
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if facts.get("sha256") != found:
        raise WeightsError(f"{folder / WEIGHTS} is not the file of {CONFIG} (SHA-256 {found}); copy the folder again")
    config = TinySDConfig.from_dict(facts["model"])
    parts = nn.ModuleDict({"unet": make_unet(config), "text_encoder": make_text_encoder(config)})
    tensors, _ = read_safetensors(folder / WEIGHTS, what="tiny-sd")
    require_keys(tensors, {k: v.shape for k, v in parts.state_dict().items()}, "tiny-sd")
    parts.load_state_dict({k: v.float() for k, v in tensors.items()})
    pipe = make_pipeline(parts["unet"], parts["text_encoder"], config)
    for module in (pipe.unet, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe


def save_tiny_sd(
    unet: nn.Module, text_encoder: nn.Module, config: TinySDConfig, folder: str | Path, figures: dict | None = None
) -> list[Path]:
    """Write `model.safetensors` (float16) and `config.json` with its hash; returns the files."""
    from ..weights import write_safetensors

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    path = write_safetensors(folder / WEIGHTS, {k: v.half() for k, v in parts.state_dict().items()})
    facts = {
        "kind": "tiny-sd",
        "model": config.as_dict(),
        **(figures or {}),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
    return sorted(folder.iterdir())
