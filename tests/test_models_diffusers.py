"""Our networks are those of diffusers and transformers: same weights, same outputs and gradients."""

import numpy as np
import pytest
from helpers import import_or_skip

from minidiff.models import TextEncoder, TextEncoderConfig, UNet, UNetConfig, parameter_count
from minidiff.tensor import Tensor

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")
transformers = import_or_skip("transformers")

pytestmark = pytest.mark.usefixtures("kernels_kind")


# ---- their configuration and weights as ours; to move to minidiff/pretrained.py

DOWN_BLOCKS = {"DownBlock2D": "none", "AttnDownBlock2D": "self", "CrossAttnDownBlock2D": "cross"}
UP_BLOCKS = {"UpBlock2D": "none", "AttnUpBlock2D": "self", "CrossAttnUpBlock2D": "cross"}
ONLY = {
    "act_fn": "silu", "addition_embed_type": None, "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_type": "conv", "dual_cross_attention": False, "encoder_hid_dim": None,
    "mid_block_scale_factor": 1, "num_class_embeds": None, "only_cross_attention": False,
    "resnet_out_scale_factor": 1, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "upsample_type": "conv",
}  # fmt: skip
"""What a diffusers U-Net may also be configured to, and the one value that our U-Net has."""
ONLY_TEXT = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TABLES = ("token_embedding.weight", "position_embedding.weight")


def refuse_others(theirs, only):
    for name, value in only.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"the config has {name} = {theirs[name]!r}; minidiff knows only {value!r}")


def unet_config(theirs):
    """The config.json of a diffusers UNet2DModel or UNet2DConditionModel -> UNetConfig.

    Raises ValueError for what UNetConfig cannot say.
    """
    refuse_others(theirs, ONLY)
    channels, blocks = tuple(theirs["block_out_channels"]), theirs["layers_per_block"]
    attention = tuple(DOWN_BLOCKS.get(kind) for kind in theirs["down_block_types"])
    upwards = tuple(UP_BLOCKS.get(kind) for kind in reversed(theirs["up_block_types"]))
    if None in attention or attention != upwards or not isinstance(blocks, int):
        raise ValueError("these weights' blocks are of other kinds or numbers than minidiff's U-Net can have")

    def each_level(value):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(channels)

    if "cross_attention_dim" in theirs:
        refuse_others(theirs, {"mid_block_type": "UNetMidBlock2DCrossAttn"})
        mid_attention = "cross"
        # attention_head_dim is here, in spite of its name, the number of heads
        heads = each_level(theirs.get("num_attention_heads") or theirs["attention_head_dim"])
    else:
        refuse_others(theirs, {"mid_block_type": "UNetMidBlock2D"})
        mid_attention = "self" if theirs.get("add_attention", True) else "none"
        heads = tuple(c // (theirs["attention_head_dim"] or c) for c in channels)
    scale_shift = theirs.get("resnet_time_scale_shift") == "scale_shift"
    if mid_attention == "self":  # with scale_shift its attention has no norm, unless one is asked for
        groups = theirs.get("attn_norm_num_groups") or (None if scale_shift else theirs["norm_num_groups"])
        refuse_others({"attn_norm_num_groups": groups}, {"attn_norm_num_groups": theirs["norm_num_groups"]})
    return UNetConfig(
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        channels=channels,
        blocks=blocks,
        attention=attention,
        mid_attention=mid_attention,
        heads=heads,
        transformer_layers=each_level(theirs.get("transformer_layers_per_block", 1)),
        text_width=theirs.get("cross_attention_dim", 1),
        linear_projection=theirs.get("use_linear_projection", False),
        norm_groups=theirs["norm_num_groups"],
        norm_eps=theirs["norm_eps"],
        time_scale_shift=scale_shift,
        downsample_padding=theirs["downsample_padding"],
        sin_first=not theirs["flip_sin_to_cos"],
        frequency_shift=theirs["freq_shift"],
    )


def text_encoder_config(theirs):
    """The config.json of a transformers CLIPTextModel -> TextEncoderConfig; else ValueError."""
    refuse_others(theirs, ONLY_TEXT)
    refuse_others(theirs, {"intermediate_size": 4 * theirs["hidden_size"]})
    return TextEncoderConfig(
        vocabulary=theirs["vocab_size"],
        context=theirs["max_position_embeddings"],
        width=theirs["hidden_size"],
        layers=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
    )


def our_layout(name, array):
    """conv (out, in, kh, kw) -> (kh, kw, in, out), linear (out, in) -> (in, out); tables and vectors stay."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and not name.endswith(TABLES) else array


def our_state(theirs):
    """Their arrays by name -> ours by path, in our layout."""
    state = {}
    for name, array in theirs.items():
        path = name.removeprefix("text_model.").removeprefix("embeddings.").removeprefix("encoder.")
        if path != "position_ids":  # 0, 1, 2, ...: a buffer of older checkpoints
            state[path] = np.ascontiguousarray(our_layout(path, array))
    return state


# ---- tiny networks of theirs, every number random

UNCONDITIONAL = dict(
    sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, downsample_padding=0,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=4, attention_head_dim=None,
)  # fmt: skip
CONDITIONAL = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 24), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=10, norm_num_groups=4, attention_head_dim=4,
)  # fmt: skip
LINEAR = dict(CONDITIONAL, use_linear_projection=True, attention_head_dim=(1, 2, 3))
UNETS = {
    "DDPM": UNCONDITIONAL,
    "DDPM, head width 8": dict(UNCONDITIONAL, attention_head_dim=8, layers_per_block=1),
    "DDPM, no attention in the middle": dict(UNCONDITIONAL, add_attention=False, downsample_padding=1),
    "DDPM, scale and shift": dict(UNCONDITIONAL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
    "Stable Diffusion 1": CONDITIONAL,
    "Stable Diffusion 2": LINEAR,
    "two transformer layers": dict(LINEAR, transformer_layers_per_block=2, layers_per_block=1),
    "transformer layers a level": dict(LINEAR, transformer_layers_per_block=(1, 2, 3), out_channels=8),
    "scale and shift": dict(CONDITIONAL, resnet_time_scale_shift="scale_shift"),
}
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])


def randomise(model, dtype):
    """Every parameter random: what begins at 0 or 1 would hide its place."""
    generator = torch.Generator().manual_seed(0)
    for p in model.to(dtype).parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else (p == 1) + 0.2 * noise)
    return model


def numpy_state(model):
    return our_state({name: array.detach().numpy() for name, array in model.state_dict().items()})


def numpy_gradients(model):
    return our_state({name: p.grad.numpy() for name, p in model.named_parameters()})


def their_unet(given, dtype):
    kind = diffusers.UNet2DConditionModel if "cross_attention_dim" in given else diffusers.UNet2DModel
    model = randomise(kind(**given), dtype)
    net = UNet(unet_config(model.config), seed=None)
    net.load(numpy_state(model))
    return model, net


def run_theirs(model, x, t, tokens, mask, dy):
    """diffusers: channels first, t from 0. Output and gradients in our layout."""
    x, dy = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, dy))
    tokens = torch.from_numpy(tokens)
    text = (tokens,) if "cross_attention_dim" in model.config else ()
    masks = {"encoder_attention_mask": torch.from_numpy(mask)} if text and mask is not None else {}
    for leaf in (x, tokens):
        leaf.requires_grad_()
    y = model(x, torch.from_numpy(t), *text, **masks).sample
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad}
    found = {name: a.numpy().transpose(0, 2, 3, 1) for name, a in found.items()}
    return {**found, **({"tokens": tokens.grad.numpy()} if text else {}), **numpy_gradients(model)}


def run_ours(net, x, t, tokens, mask, dy):
    x, tokens = Tensor(x, requires_grad=True), Tensor(tokens, requires_grad=True)
    y = net(x, t + 1, (tokens, mask))
    y.backward(dy)
    text = {} if tokens.grad is None else {"tokens": tokens.grad}
    return {"y": y.data, "x": x.grad, **text, **{name: p.grad for name, p in net.named_parameters()}}


def assert_same(ours, theirs):
    """Relative to each array's largest element, or to 1% of the largest of all where it is below that.

    In float32 either side's gradients are up to 2e-5 from those in float64.
    """
    assert ours.keys() == theirs.keys()
    size = {name: np.abs(wanted).max() for name, wanted in theirs.items()}
    errors = {}
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape and ours[name].dtype == wanted.dtype, name
        assert np.isfinite(wanted).all() and np.isfinite(ours[name]).all(), name
        errors[name] = np.abs(ours[name] - wanted).max() / max(size[name], 0.01 * max(size.values()))
    output, worst = errors.pop("y"), max(errors, key=errors.get)
    print(f"output {output:.1e}, worst gradient {errors[worst]:.1e} ({worst})")
    for_output, for_gradient = (1e-12, 1e-11) if ours["y"].dtype == np.float64 else (1e-5, 1e-4)
    assert output <= for_output, f"output: {output:.1e}"
    assert errors[worst] <= for_gradient, f"{worst}: {errors[worst]:.1e}"


def batch(given, dtype):
    """An oblong image, so that height and width cannot be confused."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 16, given.get("in_channels", 3))).astype(dtype)
    dy = rng.normal(size=(2, 8, 16, given.get("out_channels", 3))).astype(dtype)
    return x, rng.normal(size=(2, 5, given.get("cross_attention_dim", 1))).astype(dtype), dy


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", UNETS)
def test_unet_in_float64(name, mask):
    """At t = 0, where the waves of t, which diffusers computes in float32, are exact."""
    model, net = their_unet(UNETS[name], torch.float64)
    x, tokens, dy = batch(UNETS[name], np.float64)
    given = (x, np.array([0, 0]), tokens, mask, dy)
    assert_same(run_ours(net, *given), run_theirs(model, *given))


@pytest.mark.parametrize("t", [(0, 1), (37, 120), (500, 999)])
@pytest.mark.parametrize("name", UNETS)
def test_unet_in_float32(name, t):
    model, net = their_unet(UNETS[name], torch.float32)
    x, tokens, dy = batch(UNETS[name], np.float32)
    given = (x, np.array(t), tokens, MASK, dy)
    assert_same(run_ours(net, *given), run_theirs(model, *given))


PUBLISHED = dict(
    act_fn="silu", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280], center_input_sample=False,
    cross_attention_dim=768, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32, out_channels=4,
    sample_size=64,
)  # fmt: skip


def test_the_config_file_of_stable_diffusion_1_says_less_than_the_model():
    assert parameter_count(UNet(unet_config(PUBLISHED), seed=None)) == 859_520_964


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(up_block_types=["UpBlock2D"] * 4), "of other kinds"),
        (dict(down_block_types=["ResnetDownsampleBlock2D"] * 4), "of other kinds"),
        (dict(layers_per_block=[1, 2, 2, 2]), "of other kinds"),
        (dict(class_embed_type="timestep"), "class_embed_type = 'timestep'"),
        (dict(mid_block_type=None), "mid_block_type = None"),
    ],
)
def test_unets_that_our_config_cannot_say_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        unet_config({**PUBLISHED, **changes})


def test_attention_without_a_norm_is_refused():
    with pytest.raises(ValueError, match="attn_norm_num_groups = None"):
        unet_config(dict(UNCONDITIONAL, resnet_time_scale_shift="scale_shift"))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("length", [9, 4])
def test_text_encoder(length, dtype):
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=9, hidden_act="quick_gelu", bos_token_id=18, eos_token_id=19,
    )  # fmt: skip
    model = randomise(transformers.CLIPTextModel(config), getattr(torch, dtype))
    encoder = TextEncoder(text_encoder_config(config.to_dict()), seed=None)
    encoder.load(numpy_state(model))

    rng = np.random.default_rng(1)
    ids, dy = rng.integers(0, 20, (2, length)), rng.normal(size=(2, length, 24)).astype(dtype)
    theirs = model(torch.from_numpy(ids)).last_hidden_state
    theirs.backward(torch.from_numpy(dy))
    ours = encoder(ids)
    ours.backward(dy)
    assert_same(
        {"y": ours.data, **{name: p.grad for name, p in encoder.named_parameters()}},
        {"y": theirs.detach().numpy(), **numpy_gradients(model)},
    )


def test_a_text_encoder_with_another_gelu_is_refused():
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        text_encoder_config(transformers.CLIPTextConfig(hidden_act="gelu").to_dict())
