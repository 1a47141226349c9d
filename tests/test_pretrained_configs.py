"""The config.json files of published models, of today and older, and what in them is refused."""

import math
import re

import pytest

from minidiff.errors import UserError
from minidiff.models import TextEncoder, TextEncoderConfig, UNet, UNetConfig, VAEConfig, parameter_count
from minidiff.pretrained.configs import (
    diffusers_unet_config,
    text_config,
    transformers_text_config,
    unet_config,
    vae_config,
)

# ---- the U-Net

UNET_1 = {  # unet/config.json of Stable Diffusion 1.5
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
UNET_2 = {  # of 2.1
    **UNET_1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
CIFAR10 = {  # config.json of google/ddpm-cifar10-32
    "_class_name": "UNet2DModel", "_diffusers_version": "0.1.1", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


@pytest.mark.parametrize(
    "config, parameters", [(UNET_1, 859_520_964), (UNET_2, 865_910_724), (CIFAR10, 35_746_307)], ids=["1", "2", "ddpm"]
)
def test_published_unets_have_their_published_size(config, parameters):
    assert parameter_count(UNet(unet_config(config), seed=None)) == parameters


def test_attention_head_dim_is_a_number_of_heads_or_a_size():
    assert unet_config(UNET_1).heads == (8, 8, 8, 8)
    assert unet_config(UNET_2).heads == (5, 10, 20, 20)
    assert unet_config(CIFAR10).heads == (1, 1, 1, 1)
    assert unet_config({**CIFAR10, "attention_head_dim": 64}).heads == (2, 4, 4, 4)


def test_the_timestep_embeddings_order_shift_and_the_padding():
    ours, ddpm = unet_config(UNET_1), unet_config(CIFAR10)
    assert (ours.sin_first, ours.frequency_shift, ours.downsample_padding) == (False, 0, 1)
    assert (ddpm.sin_first, ddpm.frequency_shift, ddpm.downsample_padding) == (True, 1, 0)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(up_block_types=["UpBlock2D"] * 4), "the same kind of block on a level's way down and up"),
        (dict(block_out_channels=[320, 640]), "one for each of block_out_channels"),
        (dict(down_block_types=["ResnetDownsampleBlock2D"] * 4), "does not know down_block_types = ['Resnet"),
        (dict(down_block_types=["AttnDownBlock2D"] * 4), "does not know down_block_types = ['AttnDown"),
        (dict(layers_per_block=[1, 2, 2, 2]), "does not know layers_per_block = [1, 2, 2, 2]"),
        (dict(class_embed_type="timestep"), "class_embed_type = 'timestep' (only None)"),
        (dict(mid_block_type=None), "mid_block_type = None (only 'UNetMidBlock2DCrossAttn')"),
        (dict(act_fn="gelu", secret=7, wings=[]), "act_fn = 'gelu' (only 'silu'), secret = 7, wings = []"),
        (dict(_class_name="UNet3DConditionModel"), "_class_name = 'UNet3DConditionModel' (only"),
        (dict(attention_head_dim=None), "attention_head_dim = None"),
        (dict(attention_head_dim=[5, 10]), "attention_head_dim has 2 entries for 4 levels"),
        (dict(attention_head_dim=7), "320 does not divide into 32 norm groups and 7 heads"),
        (dict(transformer_layers_per_block=[1, 2]), "transformer_layers has 2 entries for 4 levels"),
        (dict(cross_attention_dim=[768] * 4), "cross_attention_dim = [768, 768"),
        (dict(norm_num_groups=3), "does not divide into 3 norm groups"),
        (dict(norm_eps=float("nan")), "norm_eps = nan"),
        (dict(downsample_padding=2), "downsample_padding = 2"),
        (dict(flip_sin_to_cos=1), "flip_sin_to_cos = 1"),
        (dict(in_channels=True), "in_channels = True"),
        (dict(num_attention_heads=8), "num_attention_heads = 8 (only None)"),
    ],
)
def test_unets_that_our_config_cannot_say_are_refused(changes, told):
    with pytest.raises(UserError, match=f"^my/config.json: .*{re.escape(told)}") as caught:
        unet_config({**UNET_1, **changes}, "my/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(resnet_time_scale_shift="scale_shift"), "not attn_norm_num_groups = None"),
        (dict(attn_norm_num_groups=8), "not attn_norm_num_groups = 8"),
        (dict(attention_head_dim=48), "heads of 48 channels do not divide"),
        (dict(_class_name="UNet1DModel"), "_class_name = 'UNet1DModel'"),
    ],
)
def test_pixel_unets_that_our_config_cannot_say_are_refused(changes, told):
    with pytest.raises(UserError, match=re.escape(told)):
        unet_config({**CIFAR10, **changes})


@pytest.mark.parametrize("config", [UNET_1, UNET_2], ids=["1", "2"])
def test_what_we_write_is_what_we_read(config):
    ours = unet_config(config)
    assert unet_config(diffusers_unet_config(ours, (64, 96))) == ours


def test_what_the_file_cannot_say_is_not_written():
    ours = UNetConfig(
        channels=(32, 64, 96), attention=("none", "none", "cross"), heads=(2, 4, 3), time_scale_shift=True
    )
    assert unet_config(diffusers_unet_config(ours, (8, 8))) == ours
    for changes in (dict(mid_attention="self"), dict(mid_attention="none"), dict(attention=("none", "self", "cross"))):
        with pytest.raises(UserError, match="diffusers' conditional U-Net has cross-attention in the middle"):
            diffusers_unet_config(UNetConfig(**changes), (8, 8))


# ---- the text encoder

# What the folders of Stable Diffusion 1.5 and 2.1 hold as text_encoder/config.json.
SD1 = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
SD2 = {
    **SD1, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip


def test_the_published_configurations():
    assert text_config(SD1) == TextEncoderConfig(49408, 77, 768, 12, 12, 3072, "quick", 1e-5)
    assert text_config(SD2) == TextEncoderConfig(49408, 77, 1024, 23, 16, 4096, "exact", 1e-5)
    assert parameter_count(TextEncoder(text_config(SD1), seed=None)) == 123_060_480
    assert parameter_count(TextEncoder(text_config(SD2), seed=None)) == 340_387_840


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(hidden_act="relu"), "does not know hidden_act = 'relu'"),
        (dict(hidden_act=None), "does not know hidden_act = None"),
        (dict(use_attention_mask=True, rope=[1]), "does not know use_attention_mask = True, rope = [1]"),
        (dict(model_type="t5"), "does not know model_type = 't5' (only 'clip_text_model')"),
        (dict(hidden_size=768.0), "does not know hidden_size = 768.0"),
        (dict(num_hidden_layers=0, vocab_size=True), "does not know vocab_size = True, num_hidden_layers = 0"),
        (dict(layer_norm_eps="1e-5"), "does not know layer_norm_eps = '1e-5'"),
        (dict(layer_norm_eps=float("nan")), "does not know layer_norm_eps = nan"),
        (dict(num_attention_heads=7), "text.width: 768 does not divide into 7 heads"),
    ],
)
def test_what_the_config_cannot_say_is_named(changes, told):
    with pytest.raises(UserError, match=f"^FILE: .*{re.escape(told)}$"):
        text_config({**SD1, **changes}, "FILE")


def test_a_text_config_that_we_write_is_what_we_read():
    for ours in (text_config(SD1), text_config(SD2), TextEncoderConfig(30, 10, 64, 1, 4, norm_eps=1e-3)):
        theirs = transformers_text_config(ours, 1, 2, 0)
        again = text_config(theirs)
        assert theirs["hidden_act"] == ("quick_gelu" if ours.gelu == "quick" else "gelu")
        assert again.hidden == (ours.hidden or 4 * ours.width)
        for name in ("vocabulary", "context", "width", "layers", "heads", "gelu", "norm_eps"):
            assert getattr(again, name) == getattr(ours, name), name


# ---- the VAE

STABLE_DIFFUSION_1 = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
OF_TODAY = {
    "_name_or_path": "x", "force_upcast": True, "scaling_factor": 0.18215, "latents_mean": None, "latents_std": None,
    "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
    "sample_size": 768,
}  # fmt: skip


def test_the_published_configs_are_ours():
    assert vae_config(STABLE_DIFFUSION_1) == VAEConfig()
    assert vae_config({**STABLE_DIFFUSION_1, **OF_TODAY}) == VAEConfig()
    assert vae_config({**STABLE_DIFFUSION_1, "scaling_factor": 0.13025}).scaling_factor == 0.13025


def test_what_a_config_leaves_out_is_as_in_diffusers():
    assert vae_config({}) == VAEConfig(channels=(64,), blocks=1)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(temporal=True, depth=3), "does not know temporal = True, depth = 3"),
        (dict(_class_name="AutoencoderTiny"), "_class_name = 'AutoencoderTiny' (only 'AutoencoderKL')"),
        (dict(act_fn="relu"), "act_fn = 'relu'"),
        (dict(shift_factor=0.0609), "shift_factor = 0.0609"),
        (dict(latents_mean=[0.0] * 4), "latents_mean = [0.0"),
        (dict(latents_std=[1.0] * 4), "latents_std = [1.0"),
        (dict(use_quant_conv=False), "use_quant_conv = False (only True)"),
        (dict(use_post_quant_conv=False), "use_post_quant_conv = False"),
        (dict(mid_block_add_attention=False), "mid_block_add_attention = False"),
        (dict(down_block_types=["DownEncoderBlock2D"] * 3), "down_block_types = ["),
        (dict(up_block_types=["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"]), "up_block_types = ["),
        (dict(up_block_types=None), "up_block_types = None"),
        (dict(up_block_types=7), "up_block_types = 7"),
        (dict(block_out_channels=[128, "256", 512, 512]), "block_out_channels = [128, '256', 512, 512]"),
        (dict(block_out_channels=512), "block_out_channels = 512"),
        (dict(block_out_channels=[]), "block_out_channels = []"),
        (dict(block_out_channels=[128, 256, 512, 500]), "500 channels do not divide into 32"),
        (dict(layers_per_block=2.5), "layers_per_block = 2.5"),
        (dict(layers_per_block=[2, 2]), "layers_per_block = "),
        (dict(layers_per_block=0), "layers_per_block = 0"),
        (dict(latent_channels=None), "latent_channels = None"),
        (dict(norm_num_groups=True), "norm_num_groups = True"),
        (dict(scaling_factor="0.18215"), "scaling_factor = '0.18215'"),
        (dict(scaling_factor=0), "scaling_factor must be a positive number, got 0"),
        (dict(scaling_factor=math.nan), "scaling_factor = nan"),
    ],
)
def test_configs_of_other_networks_are_refused(changes, told):
    with pytest.raises(UserError, match=f"^my/config.json: .*{re.escape(told)}") as caught:
        vae_config({**STABLE_DIFFUSION_1, **changes}, "my/config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
