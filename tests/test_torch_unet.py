"""The U-Net that the benchmarks time on PyTorch is ours: same parameters, same outputs and gradients."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import import_or_skip

from minidiff.models import UNet, UNetConfig
from minidiff.tensor import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

torch = import_or_skip("torch")
torch_unet = importlib.import_module("torch_unet")

SMALL = UNetConfig(
    channels=(8, 16, 24, 32), blocks=2, attention=("none", "none", "self", "self"), mid_attention="self",
    heads=(1, 1, 2, 2), transformer_layers=(1, 1, 1, 1), text_width=10, norm_groups=4,
)  # fmt: skip
CONFIGS = {
    "self attention at the two lowest levels": SMALL,
    "cross attention": UNetConfig(
        in_channels=4, out_channels=5, channels=(8, 16), blocks=1, attention=("none", "cross"), heads=(2, 4),
        transformer_layers=(1, 1), text_width=10, norm_groups=4,
    ),
    "scale and shift, linear projections, two transformer layers": UNetConfig(
        channels=(8, 16), blocks=1, attention=("cross", "self"), heads=(2, 4), transformer_layers=(2, 2),
        text_width=16, norm_groups=4, time_scale_shift=True, linear_projection=True, sin_first=True,
    ),
    "DDPM CIFAR-10": replace(
        SMALL, attention=("none", "self", "none", "none"), heads=(1, 1, 1, 1), norm_eps=1e-6, downsample_padding=0,
        sin_first=True, frequency_shift=1.0,
    ),
    "no attention, an odd width": replace(
        SMALL, channels=(9, 12), norm_groups=3, attention=("none",) * 2, heads=(1, 1), transformer_layers=(1, 1),
        mid_attention="none",
    ),
}  # fmt: skip
LIMITS = {"float32": 1e-4, "float64": 1e-6}  # ours in float64 has the waves of t in float32


def both(config, dtype):
    """The two networks with the same random weights: what begins at 0 or 1 would hide its place."""
    ours, rng = UNet(config, seed=1), np.random.default_rng(0)
    for p in ours.parameters():
        if p.init == "zeros" and p.data.ndim > 1:
            p.data = rng.normal(size=p.data.shape) / np.prod(p.data.shape[:-1]) ** 0.5
        elif p.data.ndim == 1:
            p.data = p.data + 0.2 * rng.normal(size=p.data.shape)
        p.data = p.data.astype(dtype)
    theirs = torch_unet.TorchUNet(config).double()
    torch_unet.load(theirs, ours.state())
    return ours, theirs


def inputs(config, dtype):
    """An oblong image, so that height and width cannot be confused; times that differ; tokens; a cotangent."""
    rng = np.random.default_rng(1)
    x, tokens, dy = (
        rng.normal(size=shape).astype(dtype)
        for shape in ((2, 8, 16, config.in_channels), (2, 5, config.text_width), (2, 8, 16, config.out_channels))
    )
    return x, np.array([1, 618]), tokens, dy


def run_ours(net, x, t, tokens, dy):
    x, tokens = Tensor(x, requires_grad=True), Tensor(tokens, requires_grad=True)
    y = net(x, t, (tokens, None))
    y.backward(dy)
    text = {} if tokens.grad is None else {"tokens": tokens.grad}
    return {"y": y.data, "x": x.grad, **text, **{name: p.grad for name, p in net.named_parameters()}}


def run_theirs(model, x, t, tokens, dy):
    """In float64, channels last in memory. Output and gradients in our layout."""
    x, dy = (torch.tensor(a.transpose(0, 3, 1, 2), dtype=torch.float64) for a in (x, dy))
    x, tokens = x.to(memory_format=torch.channels_last), torch.tensor(tokens, dtype=torch.float64)
    for leaf in (x, tokens):
        leaf.requires_grad_()
    y = model(x, torch.tensor(t), tokens)
    y.backward(dy)
    found = {"y": y, "x": x.grad}
    found = {name: a.detach().permute(0, 2, 3, 1).numpy() for name, a in found.items()}
    text = {} if tokens.grad is None else {"tokens": tokens.grad.numpy()}
    return {**found, **text, **{name: torch_unet.our_layout(p.grad) for name, p in model.named_parameters()}}


def errors(ours, theirs):
    """Root-mean-square differences, relative to each array's size.

    A key's bias is added to all of a query's scores, which changes nothing: its gradient is 0 but for rounding, and
    relative to its weight's.
    """
    assert ours.keys() == theirs.keys()
    found = {}
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape, name
        assert np.isfinite(wanted).all() and np.isfinite(ours[name]).all(), name
        size = theirs[name.replace("to_k.bias", "to_k.weight")]
        found[name] = np.sqrt(((ours[name] - wanted) ** 2).mean() / (size**2).mean())
    return found


def worst(config, dtype, changed=None):
    """The largest error, and of what; PyTorch's network is built from `changed`, if given."""
    ours, theirs = both(config, dtype)
    if changed is not None:
        state = theirs.state_dict()
        theirs = torch_unet.TorchUNet(changed).double()
        theirs.load_state_dict(state)
    given = inputs(config, dtype)
    return max((e, name) for name, e in errors(run_ours(ours, *given), run_theirs(theirs, *given)).items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_has_our_paths_in_our_order(name):
    ours, theirs = both(CONFIGS[name], "float32")
    assert list(theirs.state_dict()) == list(ours.state())
    for path, array in theirs.state_dict().items():
        assert np.array_equal(torch_unet.our_layout(array), ours.state()[path]), path


@pytest.mark.usefixtures("kernels_kind")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients(name, dtype):
    error, where = worst(CONFIGS[name], dtype)
    print(f"{error:.1e} ({where})")
    assert error <= LIMITS[dtype], f"{where}: {error:.1e}"


FAULTS = {
    "waves the other way round": ("self attention at the two lowest levels", {"sin_first": True}),
    "waves of other lengths": ("self attention at the two lowest levels", {"frequency_shift": 1.0}),
    "another epsilon": ("self attention at the two lowest levels", {"norm_eps": 2e-5}),
    "other heads": ("cross attention", {"heads": (2, 2)}),
    "padded on the other sides": ("DDPM CIFAR-10", {"downsample_padding": 1}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_that_computes_something_else_is_noticed(fault):
    name, change = FAULTS[fault]
    error, _ = worst(CONFIGS[name], "float64", changed=replace(CONFIGS[name], **change))
    assert not error <= LIMITS["float64"]
