"""Our U-Net is diffusers' UNet2DModel and UNet2DConditionModel: same weights, outputs, blocks and gradients."""

import numpy as np
import pytest
from helpers import import_or_skip, in_our_layout, plain

from minidiff.models import UNet
from minidiff.pretrained.configs import unet_config
from minidiff.tensor import Tensor, no_grad

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")

pytestmark = pytest.mark.usefixtures("kernels_kind")


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


def their_unet(given, dtype):
    kind = diffusers.UNet2DConditionModel if "cross_attention_dim" in given else diffusers.UNet2DModel
    model = randomise(kind(**given), dtype)
    net = UNet(unet_config(plain(model.config) | {"_class_name": kind.__name__}), seed=None)
    net.load(in_our_layout(model.state_dict()))
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
    gradients = in_our_layout({name: p.grad for name, p in model.named_parameters()})
    return {**found, **({"tokens": tokens.grad.numpy()} if text else {}), **gradients}


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


# ---- block by block

BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Attention", "Downsample2D", "Upsample2D")


def ours_on(block, x, theirs, tokens):
    """Our block's answer to what theirs was given: x, and the timestep's vector or the text."""
    given = Tensor(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
    kind = type(block).__name__
    if kind == "ResBlock":
        temb = theirs[0].numpy()
        y = block(given, Tensor(temb / (1 + np.exp(-temb))))  # theirs takes its SiLU inside
    elif kind == "CrossAttentionBlock":
        y = block(given, tokens, None)
    elif kind == "TransformerBlock":
        y = block(given, tokens, None)
    elif kind == "Attention":
        y = block(given, tokens if ".attn2" in block.path else None)
    else:
        y = block(given)
    return y.data.transpose(0, 3, 1, 2) if y.ndim == 4 else y.data


@pytest.mark.parametrize("name", UNETS)
def test_every_block(name):
    """Each block of ours, given what theirs is given, makes what theirs makes: a failure names the block."""
    model, net = their_unet(UNETS[name], torch.float32)
    x, tokens, _ = batch(UNETS[name], np.float32)
    seen = {}
    for path, module in model.named_modules():
        if type(module).__name__ in BLOCKS:
            module.register_forward_hook(
                lambda _, args, kwargs, y, path=path: seen.update({path: (args, kwargs, y)}), with_kwargs=True
            )
    text = {"encoder_hidden_states": torch.from_numpy(tokens)} if "cross_attention_dim" in UNETS[name] else {}
    with torch.no_grad():
        model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor([37, 500]), **text)
    assert len(seen) >= 10
    for path, (args, kwargs, y) in seen.items():
        block = net
        for key in path.split("."):
            block = block[int(key)] if key.isdigit() else getattr(block, key)
        block.path = f".{path}"
        given, *others = [*args, *kwargs.values()] if args else [kwargs.pop("hidden_states"), *kwargs.values()]
        y = getattr(y, "sample", y[0] if isinstance(y, tuple) else y).numpy()
        with no_grad():
            found = ours_on(block, given.numpy(), others, Tensor(tokens))
        error = np.abs(found - y).max() / np.abs(y).max()
        assert np.isfinite(found).all() and error <= 1e-5, f"{path} ({type(block).__name__}): off by {error:.1e}"
