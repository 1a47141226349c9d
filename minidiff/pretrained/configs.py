"""The config.json files of a diffusers folder, in our terms and back.

All that a file says is accounted for: a size that our network can have, a key without effect here, or one of the
choices that our network has made. What is left is named, all of it in one error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from minidiff.errors import UserError
from minidiff.files import listed
from minidiff.models import TextEncoderConfig, UNetConfig, VAEConfig

Fits = Callable[[Any], bool]


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _layers(value: Any) -> bool:
    return _count(value) and value <= 1000


def _counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_count, value))


def _each_level(value: Any) -> bool:
    return _count(value) or _counts(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _epsilon(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _one_of(*choices: Any) -> Fits:
    return lambda value: value in choices


def _read(
    theirs: Mapping[str, Any],
    source: str,
    network: str,
    known: Mapping[str, tuple[Any, Fits]],
    only: Mapping[str, Any],
    without_effect: frozenset[str],
) -> dict[str, Any]:
    """What the file says of `known`: {key: (what it is where the file leaves it out, which values there are)}.

    only: other keys, and the one value that they may have. Raises UserError naming all that is not so.
    """
    found = {key: theirs.get(key, default) for key, (default, _) in known.items()}
    wrong = [f"{key} = {reprlib.repr(value)}" for key, value in found.items() if not known[key][1](value)]
    for key, value in theirs.items():
        if key in known or key in without_effect or (key.startswith("_") and key != "_class_name"):
            continue
        if key not in only:
            wrong.append(f"{key} = {reprlib.repr(value)}")
        elif value != only[key]:
            wrong.append(f"{key} = {reprlib.repr(value)} (only {only[key]!r})")
    if wrong:
        raise UserError(f"{source}: minidiff's {network} does not know {listed(wrong)}")
    return found


# ---- the U-Net

DOWN_BLOCKS = {"DownBlock2D": "none", "AttnDownBlock2D": "self", "CrossAttnDownBlock2D": "cross"}
UP_BLOCKS = {"UpBlock2D": "none", "AttnUpBlock2D": "self", "CrossAttnUpBlock2D": "cross"}
"""Attn blocks, without Cross, are UNet2DModel's alone: UNet2DConditionModel takes the size of their heads on the way up
from the mirrored level (diffusers 0.42)."""


def _blocks(kinds: Mapping[str, str], without: str) -> Fits:
    known = [name for name, kind in kinds.items() if kind != without]
    return lambda value: isinstance(value, (list, tuple)) and all(v in known for v in value)


_EITHER: dict[str, tuple[Any, Fits]] = {
    "layers_per_block": (2, _layers),
    "norm_num_groups": (32, _count),
    "norm_eps": (1e-5, _epsilon),
    "downsample_padding": (1, lambda value: type(value) is int and value in (0, 1)),
    "flip_sin_to_cos": (True, _flag),
    "freq_shift": (0, _number),
    "resnet_time_scale_shift": ("default", _one_of("default", "scale_shift")),
}
CONDITIONAL: dict[str, tuple[Any, Fits]] = {
    "in_channels": (4, _count),
    "out_channels": (4, _count),
    "block_out_channels": ((320, 640, 1280, 1280), _counts),
    "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), _blocks(DOWN_BLOCKS, "self")),
    "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, _blocks(UP_BLOCKS, "self")),
    "cross_attention_dim": (1280, _count),
    "attention_head_dim": (8, _each_level),
    "transformer_layers_per_block": (1, lambda value: all(map(_layers, value)) if _counts(value) else _layers(value)),
    "use_linear_projection": (False, _flag),
    **_EITHER,
}
UNCONDITIONAL: dict[str, tuple[Any, Fits]] = {
    "in_channels": (3, _count),
    "out_channels": (3, _count),
    "block_out_channels": ((224, 448, 672, 896), _counts),
    "down_block_types": (("DownBlock2D",) + ("AttnDownBlock2D",) * 3, _blocks(DOWN_BLOCKS, "cross")),
    "up_block_types": (("AttnUpBlock2D",) * 3 + ("UpBlock2D",), _blocks(UP_BLOCKS, "cross")),
    "attention_head_dim": (8, lambda value: value is None or _count(value)),
    "attn_norm_num_groups": (None, lambda value: value is None or _count(value)),
    "add_attention": (True, _flag),
    **_EITHER,
}
"""The keys of UNet2DConditionModel and of UNet2DModel that ours can follow."""

ONLY_EITHER = {
    "act_fn": "silu", "center_input_sample": False, "class_embed_type": None, "downsample_type": "conv",
    "mid_block_scale_factor": 1, "num_class_embeds": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "upsample_type": "conv",
}  # fmt: skip
ONLY_CONDITIONAL = {
    "_class_name": "UNet2DConditionModel", "mid_block_type": "UNetMidBlock2DCrossAttn",
    "addition_embed_type": None, "addition_time_embed_dim": None, "attention_type": "default",
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None, "num_attention_heads": None, "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1, "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, **ONLY_EITHER,
}  # fmt: skip
ONLY_UNCONDITIONAL = {"_class_name": "UNet2DModel", "mid_block_type": "UNetMidBlock2D", **ONLY_EITHER}
"""What else the files may say, and the one value that our U-Net has."""

WITHOUT_EFFECT = frozenset(
    [
        "addition_embed_type_num_heads", "dropout", "num_train_timesteps", "sample_size", "upcast_attention",
        "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
    ]
)  # fmt: skip
"""Of training and its moving average, of a feature that ONLY_CONDITIONAL refuses, of the pictures' usual size, and of
float16."""


def unet_config(theirs: Mapping[str, Any], source: str = "unet/config.json") -> UNetConfig:
    """The config.json of a diffusers UNet2DModel or UNet2DConditionModel -> UNetConfig; else UserError.

    A trap: attention_head_dim means the size of a head in UNet2DModel (none: there is one head), but the number of
    heads in UNet2DConditionModel.
    """
    conditional = theirs.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
    if conditional:
        c = _read(theirs, source, "U-Net", CONDITIONAL, ONLY_CONDITIONAL, WITHOUT_EFFECT)
    else:
        c = _read(theirs, source, "U-Net", UNCONDITIONAL, ONLY_UNCONDITIONAL, WITHOUT_EFFECT)
    channels = tuple(c["block_out_channels"])
    attention = tuple(DOWN_BLOCKS[kind] for kind in c["down_block_types"])
    upwards = tuple(UP_BLOCKS[kind] for kind in reversed(c["up_block_types"]))
    if attention != upwards or len(attention) != len(channels):
        raise UserError(
            f"{source}: minidiff's U-Net has the same kind of block on a level's way down and up, one for each of "
            f"block_out_channels; got {list(c['down_block_types'])}, {list(c['up_block_types'])}, {list(channels)}"
        )

    def each_level(key: str) -> tuple[int, ...]:
        value = c[key]
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(channels)

    if c["freq_shift"] >= channels[0] // 2:
        raise UserError(f"{source}: freq_shift should be below {channels[0] // 2}, the number of waves of t")
    given = each_level("attention_head_dim")
    if len(given) != len(channels):
        raise UserError(f"{source}: attention_head_dim has {len(given)} entries for {len(channels)} levels")
    if conditional:
        mid, heads = "cross", given
    else:
        heads = tuple(width // (n or width) for n, width in zip(given, channels, strict=True))
        if any(n and width % n for n, width in zip(given, channels, strict=True)):
            raise UserError(f"{source}: attention_head_dim: heads of {given[0]} channels do not divide {channels}")
        mid = "self" if c["add_attention"] else "none"
        scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
        groups = c["attn_norm_num_groups"] or (None if scale_shift else c["norm_num_groups"])
        if mid == "self" and groups != c["norm_num_groups"]:
            raise UserError(
                f"{source}: minidiff's U-Net has norm_num_groups = {c['norm_num_groups']} in the middle attention too, "
                f"not attn_norm_num_groups = {groups}"
            )
    try:
        return UNetConfig(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            channels=channels,
            blocks=c["layers_per_block"],
            attention=attention,
            mid_attention=mid,
            heads=heads,
            transformer_layers=each_level("transformer_layers_per_block") if conditional else (1,) * len(channels),
            text_width=c.get("cross_attention_dim", 1),
            linear_projection=c.get("use_linear_projection", False),
            norm_groups=c["norm_num_groups"],
            norm_eps=float(c["norm_eps"]),
            time_scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
            downsample_padding=c["downsample_padding"],
            sin_first=not c["flip_sin_to_cos"],
            frequency_shift=float(c["freq_shift"]),
        )
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e


def diffusers_unet_config(config: UNetConfig, sample_size: tuple[int, int]) -> dict[str, Any]:
    """UNetConfig -> the config.json of a UNet2DConditionModel for latents of this height and width.

    UserError where diffusers has no such network.
    """
    if config.mid_attention != "cross" or "self" in config.attention:
        raise UserError(
            "diffusers' conditional U-Net has cross-attention in the middle, and at a level cross-attention or none; "
            f"this one has {config.mid_attention}, and {', '.join(config.attention)}"
        )
    down, up = ({ours: theirs for theirs, ours in kinds.items()} for kinds in (DOWN_BLOCKS, UP_BLOCKS))
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": list(sample_size),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": [down[kind] for kind in config.attention],
        "up_block_types": [up[kind] for kind in reversed(config.attention)],
        "layers_per_block": config.blocks,
        "cross_attention_dim": config.text_width,
        "attention_head_dim": list(config.heads),
        "transformer_layers_per_block": list(config.transformer_layers),
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.time_scale_shift else "default",
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": not config.sin_first,
        "freq_shift": config.frequency_shift,
    }


# ---- the text encoder

TEXT: dict[str, tuple[Any, Fits]] = {
    "vocab_size": (49408, _count),
    "max_position_embeddings": (77, _count),
    "hidden_size": (512, _count),
    "num_hidden_layers": (12, _layers),
    "num_attention_heads": (8, _count),
    "intermediate_size": (2048, _count),
    "hidden_act": ("quick_gelu", _one_of("quick_gelu", "gelu")),
    "layer_norm_eps": (1e-5, _epsilon),
}
"""The keys of CLIPTextConfig that ours can follow."""
TEXT_WITHOUT_EFFECT = frozenset(
    [
        "architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "eos_token_id",
        "gradient_checkpointing", "initializer_factor", "initializer_range", "pad_token_id", "projection_dim",
        "return_dict", "torch_dtype", "transformers_version", "use_cache",
    ]
)  # fmt: skip
"""Keys about training, the tokenizer, file formats, and the pooled output, which is not computed here."""


def text_config(theirs: Mapping[str, Any], source: str = "text_encoder/config.json") -> TextEncoderConfig:
    """The config.json of a transformers CLIPTextModel -> TextEncoderConfig; else UserError.

    Nothing in it says that Stable Diffusion 2 takes the penultimate of OpenCLIP-H's 24 layers: its folders hold 23
    layers.
    """
    only = {"model_type": "clip_text_model"}
    c = _read(theirs, source, "CLIP text encoder", TEXT, only, TEXT_WITHOUT_EFFECT)
    try:
        return TextEncoderConfig(
            vocabulary=c["vocab_size"],
            context=c["max_position_embeddings"],
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            hidden=c["intermediate_size"],
            gelu="quick" if c["hidden_act"] == "quick_gelu" else "exact",
            norm_eps=float(c["layer_norm_eps"]),
        )
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e


def transformers_text_config(config: TextEncoderConfig, start: int, end: int, pad: int) -> dict[str, Any]:
    """TextEncoderConfig and the ids of the special tokens -> the config.json of a CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden or 4 * config.width,
        "hidden_act": "quick_gelu" if config.gelu == "quick" else "gelu",
        "layer_norm_eps": config.norm_eps,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


# ---- the VAE

AUTOENCODER: dict[str, tuple[Any, Fits]] = {
    "in_channels": (3, _count),
    "out_channels": (3, _count),
    "block_out_channels": ((64,), _counts),
    "layers_per_block": (1, _layers),
    "latent_channels": (4, _count),
    "norm_num_groups": (32, _count),
    "scaling_factor": (0.18215, _number),
}
"""The keys of AutoencoderKL that ours can follow."""
ONLY_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None,
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip


def vae_config(theirs: Mapping[str, Any], source: str = "vae/config.json") -> VAEConfig:
    """The config.json of a diffusers AutoencoderKL -> VAEConfig; else UserError."""
    widths, only = theirs.get("block_out_channels", (64,)), dict(ONLY_AUTOENCODER)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        only[key] = [kind] * len(widths) if _counts(widths) else theirs.get(key)
    c = _read(theirs, source, "VAE", AUTOENCODER, only, frozenset(["sample_size", "force_upcast"]))
    try:
        return VAEConfig(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            channels=tuple(c["block_out_channels"]),
            blocks=c["layers_per_block"],
            latent_channels=c["latent_channels"],
            norm_groups=c["norm_num_groups"],
            scaling_factor=float(c["scaling_factor"]),
        )
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e
