import pytest
import torch
from torch import nn

from idcore.attention.sites import find_sites
from idcore.errors import InputError
from idcore.systems.base import AttentionOptions, System
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet, tiny_vae

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def full(**config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def test_sdxl_has_the_seventy_layers_of_published_adapters():
    sites = find_sites(full(**SDXL))
    assert [s.index for s in sites] == list(range(1, 140, 2))
    assert sum(s.hidden == 640 for s in sites) == 10 and sum(s.hidden == 1280 for s in sites) == 60
    assert {s.head_dim for s in sites} == {64} and {s.heads for s in sites} == {10, 20}
    at = {s.index: s.block for s in sites}
    assert at[1] == at[3] == "down_blocks.1.attentions.0" and at[9] == at[27] == "down_blocks.2.attentions.0"
    assert at[49] == "up_blocks.0.attentions.0" and at[107] == "up_blocks.0.attentions.2"
    assert at[119] == "up_blocks.1.attentions.2" and at[121] == at[139] == "mid_block.attentions.0"


def test_sd15_has_sixteen_layers():
    sites = find_sites(full(cross_attention_dim=768, attention_head_dim=8))
    assert [s.index for s in sites] == list(range(1, 32, 2))
    assert {(s.hidden, s.heads, s.head_dim) for s in sites} == {(320, 8, 40), (640, 8, 80), (1280, 8, 160)}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_sites_name_real_layers(kind):
    unet = tiny_unet(kind)
    for site in find_sites(unet):
        attn = unet.get_submodule(site.path)
        assert list(unet.attn_processors)[site.index] == site.name
        assert attn.to_q.out_features == site.hidden == site.heads * site.head_dim and attn.heads == site.heads


def test_a_compiled_unet_has_the_same_sites():
    unet = tiny_unet()
    assert find_sites(torch.compile(unet)) == find_sites(unet)


def test_not_a_unet():
    with pytest.raises(InputError, match="wanted a diffusers UNet.*got AutoencoderKL; give pipe.unet"):
        find_sites(tiny_vae())
    with pytest.raises(InputError, match="got StableDiffusionPipeline; give pipe.unet"):
        find_sites(tiny_pipeline())
    with pytest.raises(InputError, match="got Linear"):
        find_sites(nn.Linear(2, 2))


def test_a_unet_without_cross_attention():
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(InputError, match="no cross-attention"):
        find_sites(tiny_unet(mid_block_type="UNetMidBlock2D", **plain))


def test_added_projections_are_refused():
    unet = tiny_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    with pytest.raises(InputError, match="added key and value projections"):
        find_sites(unet)


def test_options_are_checked():
    assert AttentionOptions().updated(merge="ortho", num_zero=8) == AttentionOptions("ortho", 8, 5)
    with pytest.raises(InputError, match="merge must be one of"):
        AttentionOptions("orthogonal")
    with pytest.raises(InputError, match="num_zero must be an integer >= 0, got -1"):
        AttentionOptions(num_zero=-1)
    with pytest.raises(InputError, match="num_global must be an integer >= 1, got True"):
        AttentionOptions(num_global=True)
    with pytest.raises(InputError, match="unknown mode; known are merge, num_zero, num_global"):
        AttentionOptions().updated(mode="style")


def test_a_plain_object_is_a_system():
    assert isinstance(TinySystem(tiny_unet()), System)
