"""The U-Net is wired as it says: shapes, what reaches what, whole-network gradients, clear refusals."""

import math

import numpy as np
import pytest

from minidiff.models import UNet, UNetConfig, parameter_count
from minidiff.models.unet import CrossAttentionBlock, ResBlock, TransformerBlock
from minidiff.nn import Module
from minidiff.tensor import Tensor, no_grad

B, L, TEXT = 2, 5, 6

CONFIGS = {
    "one level": dict(channels=(8,), attention=("cross",), heads=(2,), transformer_layers=(1,), blocks=1),
    "two levels, self": dict(attention=("none", "self"), heads=(1, 4), mid_attention="self"),
    "no attention, three blocks": dict(attention=("none", "none"), mid_attention="none", blocks=3),
    "attention at the bottom only": dict(attention=("none", "none"), mid_attention="cross"),
    "none, self, cross": dict(
        channels=(8, 12, 16), attention=("none", "self", "cross"), heads=(1, 3, 2),
        transformer_layers=(1, 1, 2),
    ),
    "four levels, linear": dict(
        channels=(8, 8, 12, 12), attention=("cross", "cross", "cross", "none"), heads=(1, 2, 3, 4),
        transformer_layers=(1, 2, 1, 1), linear_projection=True,
    ),
    "scale and shift": dict(time_scale_shift=True, in_channels=4, out_channels=5),
    "ddpm's details": dict(downsample_padding=0, sin_first=True, frequency_shift=1.0, norm_eps=1e-6),
}  # fmt: skip


def tiny(**changes):
    levels = dict(channels=(8, 12), attention=("none", "cross"), heads=(2, 2), transformer_layers=(1, 1))
    return UNetConfig(**{**levels, "blocks": 1, "text_width": TEXT, "norm_groups": 4, **changes})


def modules(value):
    """A module and all modules inside it."""
    if isinstance(value, Module):
        yield value
    inside = vars(value).values() if isinstance(value, Module) else value if isinstance(value, list) else ()
    for part in inside:
        yield from modules(part)


def randomised(config, seed=0, dtype=np.float64):
    """A network whose every parameter is random, those that begin at 0 or 1 too."""
    net, rng = UNet(config, seed=None), np.random.default_rng(seed)
    for p in net.parameters():
        *inputs, _ = shape = p.wanted_shape
        scale = 1 / math.sqrt(math.prod(inputs)) if inputs else 0.3
        p.data = ((p.init == "ones") + rng.normal(0, scale, shape)).astype(dtype)
    return net


def inputs(config, dtype=np.float64):
    """x_t, t, (tokens, mask): an oblong image whose lowest level still has two positions."""
    rng = np.random.default_rng(1)
    size = max(4, 2 ** (len(config.channels) - 1))
    x = rng.normal(size=(B, size, 2 * size, config.in_channels)).astype(dtype)
    tokens = rng.normal(size=(B, L, TEXT)).astype(dtype)
    mask = np.array([[True] * L, [True] * 3 + [False] * 2])
    return x, np.array([1, 700]), (tokens, mask)


def uses_text(config):
    return "cross" in (*config.attention, config.mid_attention)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return tiny(**request.param)


# ---- shapes, and the network at its beginning


def test_output_has_the_size_of_the_input_and_the_asked_channels(config):
    x, t, cond = inputs(config, np.float32)
    with no_grad():
        y = randomised(config, dtype=np.float32)(x, t, cond if uses_text(config) else None)
    assert y.shape == (*x.shape[:3], config.out_channels) and y.dtype == np.float32
    assert np.isfinite(y.data).all() and y.data.std() > 0.01


def test_at_the_beginning_the_output_is_zero(config):
    x, t, cond = inputs(config, np.float32)
    assert not UNet(config, seed=5)(x, t, cond).data.any()


def test_at_the_beginning_residual_and_cross_attention_blocks_are_identities(config):
    rng = np.random.default_rng(0)
    emb = Tensor(rng.normal(size=(B, 4 * config.channels[0])).astype(np.float32))
    tokens, mask = inputs(config, np.float32)[2]
    for block in modules(UNet(config)):
        if isinstance(block, ResBlock):
            x = Tensor(rng.normal(size=(B, 4, 4, *block.norm1.weight.shape)).astype(np.float32))
            wanted = x if block.conv_shortcut is None else block.conv_shortcut(x)
            assert np.array_equal(block(x, emb).data, wanted.data)
        elif isinstance(block, CrossAttentionBlock):
            x = Tensor(rng.normal(size=(B, 4, 4, *block.norm.weight.shape)).astype(np.float32))
            assert np.array_equal(block(x, Tensor(tokens), mask).data, x.data)


def test_the_seed_decides_the_parameters(config):
    first, same, other = (UNet(config, seed).parameters() for seed in (3, 3, 4))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a.data, b.data) for a, b in zip(first, other, strict=True))
    assert parameter_count(UNet(config, seed=None)) == sum(p.size for p in first)


DDPM = dict(channels=(128, 256, 256, 256), attention=("none", "self", "none", "none"), mid_attention="self")
STABLE_DIFFUSION = dict(
    in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280),
    attention=("cross", "cross", "cross", "none"),
)  # fmt: skip


@pytest.mark.parametrize(
    "sizes, count",
    [
        (dict(DDPM, heads=(1,) * 4), 35_746_307),
        (dict(STABLE_DIFFUSION, heads=(8,) * 4, text_width=768), 859_520_964),
        (dict(STABLE_DIFFUSION, heads=(5, 10, 20, 20), text_width=1024, linear_projection=True), 865_910_724),
    ],
    ids=["google/ddpm-cifar10-32", "Stable Diffusion 1.5", "Stable Diffusion 2.1"],
)
def test_published_networks_have_their_number_of_parameters(sizes, count):
    assert parameter_count(UNet(UNetConfig(transformer_layers=(1,) * 4, **sizes), seed=None)) == count


# ---- what reaches what


def change(net, x, t, cond, other_t, other_cond):
    """How far the output moves with another t or text."""
    with no_grad():
        return np.abs(net(x, t, cond).data - net(x, other_t, other_cond).data).max()


def test_a_sample_does_not_depend_on_its_batch(config):
    net, (x, t, (tokens, mask)) = randomised(config), inputs(config)
    both = net(x, t, (tokens, mask)).data
    for i in range(B):
        alone = net(x[i : i + 1], t[i : i + 1], (tokens[i : i + 1], mask[i : i + 1])).data
        assert np.abs(alone[0] - both[i]).max() <= 1e-12


def test_the_timestep_reaches_every_residual_block(config):
    """With the others' ways in closed, each block alone lets the output see t."""
    net, (x, t, cond) = randomised(config), inputs(config)
    projections = [block.time_emb_proj.weight for block in modules(net) if isinstance(block, ResBlock)]
    assert len(projections) == len(config.channels) * (2 * config.blocks + 1) + 2
    weights = [p.data for p in projections]
    for p in projections:
        p.data = np.zeros_like(p.data)
    closed = change(net, x, t, cond, t + 50, cond)
    opened = []
    for p, weight in zip(projections, weights, strict=True):
        p.data = weight
        opened.append(change(net, x, t, cond, t + 50, cond))
        p.data = np.zeros_like(weight)
    assert closed == 0 and min(opened) > 1e-6, opened


def test_the_text_reaches_every_cross_attention(config):
    net, (x, t, (tokens, mask)) = randomised(config), inputs(config)
    values = [block.attn2.to_v.weight for block in modules(net) if isinstance(block, TransformerBlock)]
    levels = [i for i, kind in enumerate(config.attention) if kind == "cross"]
    wanted = sum(config.transformer_layers[i] * (2 * config.blocks + 1) for i in levels)
    assert len(values) == wanted + (config.transformer_layers[-1] if config.mid_attention == "cross" else 0)
    weights, other = [p.data for p in values], (tokens[::-1].copy(), mask)
    for p in values:
        p.data = np.zeros_like(p.data)
    closed = change(net, x, t, (tokens, mask), t, other)
    opened = []
    for p, weight in zip(values, weights, strict=True):
        p.data = weight
        opened.append(change(net, x, t, (tokens, mask), t, other))
        p.data = np.zeros_like(weight)
    assert closed == 0 and all(moved > 1e-6 for moved in opened), opened


def test_the_first_timestep_is_embedded_as_zero(config):
    """cos 0 = 1 and sin 0 = 0: t counts from 1, the waves from 0 as in diffusers."""
    embedding = randomised(config).time_embedding
    half = config.channels[0] // 2
    waves = np.r_[np.zeros(half), np.ones(half)] if config.sin_first else np.r_[np.ones(half), np.zeros(half)]
    hidden = waves @ embedding.linear_1.weight.data + embedding.linear_1.bias.data
    wanted = hidden / (1 + np.exp(-hidden)) @ embedding.linear_2.weight.data + embedding.linear_2.bias.data
    assert np.abs(embedding(np.array([1])).data - wanted).max() <= 1e-12


def test_every_position_of_the_input_reaches_every_position_of_the_output():
    config = tiny(channels=(8, 8, 8), attention=("none",) * 3, mid_attention="self", heads=(1,) * 3,
                  transformer_layers=(1,) * 3)  # fmt: skip
    net, (x, t, _) = randomised(config), inputs(config)
    before = net(x, t).data
    for corner in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        moved = x.copy()
        moved[:, corner[0], corner[1]] += 1
        assert (np.abs(net(moved, t).data - before).max(axis=-1) > 0).all()


def test_masked_tokens_have_no_influence():
    config = tiny()
    net, (x, t, (tokens, mask)) = randomised(config), inputs(config)
    moved = np.where(mask[..., None], tokens, 1e4)
    assert np.array_equal(net(x, t, (tokens, mask)).data, net(x, t, (moved, mask)).data)
    assert not np.array_equal(net(x, t, (tokens, None)).data, net(x, t, (moved, None)).data)

    cut = net(x[1:], t[1:], (tokens[1:, :3], None)).data
    assert np.abs(net(x, t, (tokens, mask)).data[1:] - cut).max() <= 1e-12

    tokens = Tensor(tokens, requires_grad=True)
    (net(x, t, (tokens, mask)) * x).sum().backward()
    assert not tokens.grad[~mask].any() and (np.abs(tokens.grad[mask]).max(axis=-1) > 0).all()


def test_t_may_be_a_number_an_array_or_a_fraction(config):
    net, (x, _, cond) = randomised(config), inputs(config)
    whole = net(x, 500, cond).data
    for same in (np.array([500, 500]), 500.0, np.float32(500)):
        assert np.array_equal(net(x, same, cond).data, whole)
    between, beside = net(x, 500.5, cond).data, net(x, 500 + 1e-4, cond).data
    assert np.isfinite(between).all()
    assert 0 < np.abs(beside - whole).max() < 0.1 * np.abs(between - whole).max()


# ---- gradients


def gradients(net, x, t, cond, dy):
    """The output and the gradients of sum(output * dy): of x, of the tokens, of every parameter by name."""
    x, tokens = Tensor(x, requires_grad=True), Tensor(cond[0], requires_grad=True)
    y = net(x, t, (tokens, cond[1]))
    y.backward(dy)
    found = {"x": x.grad, "tokens": tokens.grad, **{name: p.grad for name, p in net.named_parameters()}}
    for p in net.parameters():
        p.grad = None
    if not uses_text(net.config):
        assert found.pop("tokens") is None
    return y.data, found


def cotangent(net, x):
    return np.random.default_rng(2).normal(size=(*x.shape[:3], net.config.out_channels))


def test_every_parameter_has_a_gradient(config):
    """Only the keys' bias in self-attention has none: it adds the same to all scores of a query."""
    net, (x, t, cond) = randomised(config), inputs(config)
    _, found = gradients(net, x, t, cond, cotangent(net, x))
    for name, dp in found.items():
        assert dp is not None and np.isfinite(dp).all(), name
        if name.endswith("to_k.bias"):
            assert np.abs(dp).max() < 1e-10, name
        else:
            assert np.abs(dp).max() > 1e-4, name


def test_the_gradient_is_that_of_finite_differences(config):
    """Along a random direction of everything at once, and of each kind of parameter alone (conv1.weight)."""
    net, (x, t, (tokens, mask)) = randomised(config), inputs(config)
    rng, dy, h = np.random.default_rng(3), cotangent(net, x), 1e-6
    _, found = gradients(net, x, t, (tokens, mask), dy)
    leaves = {"x": Tensor(x), "tokens": Tensor(tokens), **dict(net.named_parameters())}
    directions = {name: rng.normal(size=dp.shape) for name, dp in found.items()}

    def value(names, step):
        start = {name: leaves[name].data for name in names}
        for name in names:
            leaves[name].data = start[name] + step * directions[name]
        with no_grad():
            y = net(leaves["x"], t, (leaves["tokens"], mask)).data
        for name in names:
            leaves[name].data = start[name]
        return float((y * dy).sum())

    along = {name: float((dp * directions[name]).sum()) for name, dp in found.items()}
    kinds = {"everything": list(found)}
    for name in found:
        kinds.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    for kind, names in kinds.items():
        analytic = sum(along[name] for name in names)
        numeric = (value(names, h) - value(names, -h)) / (2 * h)
        error = abs(numeric - analytic) / max(abs(analytic), 1)
        assert error <= 1e-6, f"{kind}: numeric {numeric}, analytic {analytic}"


def test_checkpointing_changes_nothing(config):
    net, (x, t, cond) = randomised(config), inputs(config)
    dy = cotangent(net, x)
    y, wanted = gradients(net, x, t, cond, dy)
    net.checkpointing = True
    y_again, found = gradients(net, x, t, cond, dy)
    assert np.array_equal(y, y_again) and found.keys() == wanted.keys()
    for name, dp in found.items():
        error = np.abs(dp - wanted[name]).max() / max(np.abs(wanted[name]).max(), 1)
        assert error <= 1e-12, f"{name}: {error}"


def test_checkpointing_keeps_fewer_arrays():
    """The blocks' inner results are not on the tape."""
    config = tiny(blocks=2)
    net, (x, t, cond) = randomised(config), inputs(config)

    def recorded(y):
        seen, stack = set(), [y]
        while stack:
            tensor = stack.pop()
            if id(tensor) not in seen:
                seen.add(id(tensor))
                stack += tensor.node.inputs if tensor.node else ()
        return len(seen) - len(net.parameters())

    plain = recorded(net(x, t, cond))
    net.checkpointing = True
    assert recorded(net(x, t, cond)) < plain / 2


# ---- refusals


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(attention=("none",)), "unet.attention has 1 entries for 2 levels"),
        (dict(heads=(1, 1, 1)), "unet.heads has 3 entries for 2 levels"),
        (dict(transformer_layers=(1, 0)), "transformer_layers must be at least 1"),
        (dict(transformer_layers=()), "unet.transformer_layers has 0 entries for 2 levels"),
        (dict(attention=("none", "both")), "'both' is not one of none, self, cross"),
        (dict(mid_attention="both"), "'both' is not one of none, self, cross"),
        (dict(heads=(2, 5)), "12 does not divide into 4 norm groups and 5 heads"),
        (dict(norm_groups=8), "12 does not divide into 8 norm groups"),
        (dict(heads=(0, 1)), "at least 1"),
        (dict(norm_groups=0), "at least 1"),
        (dict(blocks=0), "at least 1"),
        (dict(channels=(), attention=(), heads=(), transformer_layers=()), "unet needs a level"),
        (dict(downsample_padding=2), "unet.downsample_padding must be 0 or 1, got 2"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x_shape, cond_shapes, told",
    [
        ((B, 5, 4, 3), ((B, L, TEXT), (B, L)), "H and W divisible by 2"),
        ((B, 4, 5, 3), ((B, L, TEXT), (B, L)), "H and W divisible by 2"),
        ((B, 4, 4, 4), ((B, L, TEXT), (B, L)), r"wanted x_t \(B, H, W, 3\)"),
        ((4, 4, 3), ((B, L, TEXT), (B, L)), r"got \(4, 4, 3\)"),
        ((B, 4, 4, 3), None, r"needs cond = \(tokens, mask\)"),
        ((B, 4, 4, 3), ((B, L, TEXT + 1), (B, L)), r"\(2, 5, 7\) does not fit"),
        ((B, 4, 4, 3), ((B + 1, L, TEXT), (B + 1, L)), r"2 images, got \(3, 5, 6\)"),
        ((B, 4, 4, 3), ((B, L, TEXT), (B, L + 1)), r"mask must be booleans of shape \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x_shape, cond_shapes, told):
    cond = cond_shapes and (np.zeros(cond_shapes[0], np.float32), np.ones(cond_shapes[1], bool))
    with pytest.raises(ValueError, match=told) as caught:
        UNet(tiny())(np.zeros(x_shape, np.float32), 1, cond)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("conditions", [2, 3])
@pytest.mark.parametrize("times", ["one", "each its own"])
@pytest.mark.parametrize("name", CONFIGS)
def test_images_meet_several_conditions_as_if_repeated(name, times, conditions):
    net = randomised(tiny(**CONFIGS[name]))
    x, t, _ = inputs(net.config)
    t = t[:1].repeat(len(x)) if times == "one" else t
    rng = np.random.default_rng(2)
    tokens, mask = rng.normal(size=(conditions * len(x), L, TEXT)), rng.random((conditions * len(x), L)) < 0.7
    mask[:, 0] = True
    dy = rng.normal(size=(len(tokens), *x.shape[1:3], net.config.out_channels))

    def run(x, t):
        y = net(x, t, (tokens, mask))
        y.backward(dy)
        grads = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        for p in net.parameters():
            p.grad = None
        return y.data, grads

    y, grads = run(x, t)
    wanted, wanted_grads = run(np.concatenate([x] * conditions), np.concatenate([t] * conditions))
    np.testing.assert_allclose(y, wanted, rtol=1e-10, atol=1e-10)
    assert grads.keys() == wanted_grads.keys()
    for key, g in grads.items():
        np.testing.assert_allclose(g, wanted_grads[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prepared_text_gives_the_same_at_every_call(name):
    net = randomised(tiny(**CONFIGS[name]))
    x, t, cond = inputs(net.config)
    with no_grad():
        prepared = net.prepare(cond)
        for i in range(3):
            np.testing.assert_array_equal(net(x + i, t + i, prepared).data, net(x + i, t + i, cond).data)
    attentions = [m for m in modules(net) if isinstance(m, TransformerBlock)]
    assert len(prepared[0].kept) == len(attentions)


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_a_wrong_number_of_timesteps_is_refused(shape):
    x, _, cond = inputs(tiny(), np.float32)
    with pytest.raises(ValueError, match=r"wanted one t, or one a sample \(2,\)"):
        UNet(tiny())(x, np.ones(shape, int), cond)
