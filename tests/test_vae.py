"""The VAE: shapes, posterior, scaling, gradients, training, what is kept in memory, configs and weights of any age."""

import math
import weakref

import numpy as np
import pytest
from helpers import assert_close

from minidiff import ops
from minidiff.errors import UserError
from minidiff.gradcheck import gradcheck
from minidiff.models import VAE, Posterior, VAEConfig, current_keys, parameter_count, vae_config
from minidiff.nn import Module, Parameter
from minidiff.optim import AdamW
from minidiff.tensor import Tensor, no_grad

TINY = VAEConfig(channels=(4, 8), blocks=1, latent_channels=2, norm_groups=2)
FOUR_LEVELS = VAEConfig(channels=(4, 4, 8, 8), blocks=1, norm_groups=2)


def randomised(config, dtype=np.float64):
    """A VAE whose every parameter is random, those that begin at 0 or 1 too."""
    vae, rng = VAE(config, seed=None), np.random.default_rng(0)
    for p in vae.parameters():
        *inputs, _ = shape = p.wanted_shape
        scale = 1 / math.sqrt(math.prod(inputs)) if inputs else 0.3
        p.data = ((p.init == "ones") + rng.normal(0, scale, shape)).astype(dtype)
    return vae


def draw(*shape, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# ---- sizes


@pytest.mark.parametrize("H, W", [(8, 8), (24, 40), (72, 8)])
def test_images_become_latents_an_eighth_as_large_and_come_back(H, W):
    vae, images = randomised(FOUR_LEVELS, np.float32), draw(2, H, W, 3, dtype=np.float32)
    with no_grad():
        latents = vae.encode(images)
        decoded = vae.decode(latents)
    assert latents.shape == (2, H // 8, W // 8, 4) and latents.dtype == np.float32
    assert decoded.shape == images.shape and decoded.dtype == np.float32
    assert np.isfinite(decoded.data).all() and decoded.data.std() > 0.01


def test_an_image_does_not_depend_on_its_batch():
    vae, images, noise = randomised(FOUR_LEVELS), draw(3, 16, 8, 3), draw(3, 2, 1, 4, seed=2)
    latents = vae.encode(images, noise)
    decoded = vae.decode(latents)
    for i in range(3):
        one = slice(i, i + 1)
        assert_close(vae.encode(images[one], noise[one]).data, latents.data[one])
        assert_close(vae.decode(latents.data[one]).data, decoded.data[one])


def test_the_published_network_has_its_number_of_parameters():
    vae = VAE(VAEConfig(), seed=None)
    assert (parameter_count(vae.encoder), parameter_count(vae.decoder)) == (34_163_592, 49_490_179)
    assert parameter_count(vae) == 83_653_863


@pytest.mark.parametrize(
    "call, shape, told",
    [
        ("encode", (1, 12, 8, 3), r"H and W divisible by 8; got \(1, 12, 8, 3\)"),
        ("encode", (1, 8, 20, 3), "H and W divisible by 8"),
        ("encode", (1, 8, 8, 4), r"wanted images \(B, H, W, 3\)"),
        ("encode", (8, 8, 3), r"got \(8, 8, 3\)"),
        ("decode", (1, 8, 8, 3), r"wanted latents \(B, h, w, 4\), got \(1, 8, 8, 3\)"),
        ("decode", (8, 8, 4), "wanted latents"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call, shape, told):
    with pytest.raises(ValueError, match=told) as caught:
        getattr(VAE(FOUR_LEVELS), call)(np.zeros(shape, np.float32))
    assert "\n" not in str(caught.value)


def test_noise_of_another_shape_is_refused():
    vae, images = VAE(FOUR_LEVELS), np.zeros((2, 8, 16, 3), np.float32)
    with pytest.raises(ValueError, match=r"wanted noise \(2, 1, 2, 4\), like the latents, got \(1, 1, 2, 4\)"):
        vae.encode(images, np.zeros((1, 1, 2, 4), np.float32))


# ---- the posterior, and the scaling factor


def posterior(mean, log_variance):
    return Posterior(Tensor(np.concatenate(np.broadcast_arrays(mean, log_variance), axis=-1)))


def test_samples_have_the_posteriors_moments():
    mean, log_variance = draw(1, 2, 3, 4), draw(1, 2, 3, 4, seed=2)
    n = 40_000
    q = posterior(*(np.repeat(a, n, axis=0) for a in (mean, log_variance)))
    z = q.sample(draw(n, 2, 3, 4, seed=3)).data
    sigma = np.exp(log_variance[0]) ** 0.5
    assert (np.abs(z.mean(axis=0) - mean[0]) <= 5 * sigma / n**0.5).all()
    assert (np.abs(z.std(axis=0) / sigma - 1) <= 5 / (2 * n) ** 0.5).all()
    assert np.array_equal(q.mode().data[:1], mean)


def test_the_divergence_is_the_integral_of_its_definition():
    """KL = integral of q log(q / p), number by number, summed over each sample's."""
    mean, log_variance = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=2)
    x = np.linspace(-30, 30, 60_001).reshape(-1, 1, 1, 1, 1)
    log_q = -0.5 * ((x - mean) ** 2 / np.exp(log_variance) + log_variance + np.log(2 * np.pi))
    log_p = -0.5 * (x**2 + np.log(2 * np.pi))
    wanted = (np.exp(log_q) * (log_q - log_p)).sum(axis=0) * (x[1] - x[0]).item()
    assert_close(posterior(mean, log_variance).kl().data, wanted.sum(axis=(1, 2, 3)), condition=100)


def test_the_log_variance_is_held_within_its_bounds():
    given = np.array([-1e3, -31.0, -30.0, -3.0, 20.0, 21.0, np.inf, np.nan]).reshape(1, 1, 2, 4)
    moments = Tensor(np.concatenate([np.zeros_like(given), given], axis=-1), requires_grad=True)
    found = Posterior(moments).log_variance
    np.testing.assert_array_equal(found.data.ravel(), [-30, -30, -30, -3, 20, 20, 20, np.nan])
    found.backward(np.full(found.shape, 2.0))
    assert moments.grad[..., 4:].ravel().tolist() == [0, 0, 2, 2, 2, 0, 0, 0] and not moments.grad[..., :4].any()


@pytest.mark.parametrize("factor", [0.18215, 2.0])
def test_latents_are_scaled_once_each_way(factor):
    config = VAEConfig(channels=(4, 8), blocks=1, latent_channels=2, norm_groups=2, scaling_factor=factor)
    vae, images, noise = randomised(config), draw(2, 4, 6, 3), draw(2, 2, 3, 2, seed=2)
    q = vae.posterior(images)
    assert_close(vae.encode(images).data, factor * q.mean.data)
    z = q.mean.data + np.exp(q.log_variance.data / 2) * noise
    assert_close(vae.encode(images, noise).data, factor * z)
    decoded, _ = vae(images, noise)
    assert_close(vae.decode(factor * z).data, decoded.data, condition=10)
    assert_close(decoded.data, vae.decoder(vae.post_quant_conv(Tensor(z))).data)


# ---- gradients and training


def places(value, path=""):
    """(owner, attribute, path) of every parameter of a module."""
    for name, inside in vars(value).items() if isinstance(value, Module) else enumerate(value):
        if isinstance(inside, Parameter):
            yield value, name, f"{path}{name}"
        elif isinstance(inside, Module | list):
            yield from places(inside, f"{path}{name}.")


def test_gradients_are_those_of_finite_differences():
    """Of the images, and of every parameter alone and all together."""
    vae, noise = randomised(TINY), draw(2, 1, 2, 2, seed=2)
    found = list(places(vae))
    assert [path for *_, path in found] == list(vae.state())

    def there_and_back(images, *parameters):
        for (owner, name, _), p in zip(found, parameters, strict=True):
            setattr(owner, name, p)
        decoded, q = vae(images, noise)
        return ops.concat([decoded.reshape(-1), q.kl()])

    gradcheck(there_and_back, draw(2, 2, 4, 3), *vae.state().values())


def test_every_parameter_has_a_gradient():
    """Only the keys' bias has none: it adds the same to all scores of a query."""
    vae, images = randomised(FOUR_LEVELS), draw(2, 16, 24, 3)
    decoded, q = vae(images, draw(2, 2, 3, 4, seed=2))
    (ops.mse(decoded, images) + q.kl().sum()).backward()
    for name, p in vae.named_parameters():
        assert p.grad is not None and np.isfinite(p.grad).all(), name
        assert (np.abs(p.grad).max() > 1e-6) != name.endswith("to_k.bias"), name


def test_training_lowers_the_loss():
    """loss = mean squared error + a little KL, on horizontal and vertical ramps in random colours."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, 8, dtype=np.float32) * np.ones((8, 1), np.float32)
    images = np.stack([ramp, ramp.T] * 8)[..., None] * rng.uniform(-1, 1, (16, 1, 1, 3)).astype(np.float32)
    vae = VAE(VAEConfig(channels=(8, 16), blocks=1, latent_channels=2, norm_groups=2))
    optimizer, losses = AdamW(dict(vae.named_parameters())), []
    for _ in range(150):
        decoded, q = vae(images, rng.normal(size=(16, 4, 4, 2)))
        loss = ops.mse(decoded, images) + q.kl().mean() * 1e-4
        loss.backward()
        optimizer.step(1e-2, {name: p.grad for name, p in vae.named_parameters()})
        for p in vae.parameters():
            p.grad = None
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.2 * losses[0], losses[::10]


# ---- memory: what is no longer needed is let go of


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_no_layer_finds_the_result_of_the_one_before_the_last_alive(part, monkeypatch):
    half = getattr(randomised(TINY), part)
    layers, made = list(half.layers()), []

    def watched(layer):
        def call(x):
            assert all(earlier() is None for earlier in made[:-1])
            y = layer(x)
            made.append(weakref.ref(y))
            return y

        return call

    monkeypatch.setattr(half, "layers", lambda: map(watched, layers))
    with no_grad():
        half(Tensor(draw(1, 4, 4, half.conv_in.weight.shape[2])))
    assert len(made) == len(layers) > 8


def test_the_first_norm_of_a_residual_block_is_gone_when_the_second_runs(monkeypatch):
    block, made = randomised(TINY).decoder.up_blocks[1].resnets[0], []
    norm1, norm2 = block.norm1, block.norm2

    def first(*args, **kwargs):
        y = norm1(*args, **kwargs)
        made.append(weakref.ref(y))
        return y

    def second(*args, **kwargs):
        assert made.pop()() is None
        return norm2(*args, **kwargs)

    monkeypatch.setattr(block, "norm1", first)
    monkeypatch.setattr(block, "norm2", second)
    with no_grad():
        block(Tensor(draw(1, 4, 4, 8)))
    assert not made


# ---- config.json

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
        (dict(temporal=True, depth=3), "has no depth, temporal"),
        (dict(_class_name="AutoencoderTiny"), "_class_name is 'AutoencoderTiny'; .* has only 'AutoencoderKL'"),
        (dict(act_fn="relu"), "act_fn is 'relu'"),
        (dict(shift_factor=0.0609), "shift_factor is 0.0609"),
        (dict(latents_mean=[0.0] * 4), "latents_mean is"),
        (dict(latents_std=[1.0] * 4), "latents_std is"),
        (dict(use_quant_conv=False), "use_quant_conv is False; .* has only True"),
        (dict(use_post_quant_conv=False), "use_post_quant_conv is False"),
        (dict(mid_block_add_attention=False), "mid_block_add_attention is False"),
        (dict(down_block_types=["DownEncoderBlock2D"] * 3), "down_block_types is"),
        (dict(up_block_types=["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"]), "up_block_types is"),
        (dict(up_block_types=None), "up_block_types is None"),
        (dict(up_block_types=7), "up_block_types is 7"),
        (dict(block_out_channels=[128, "256", 512, 512]), "block_out_channels cannot be"),
        (dict(block_out_channels=512), "block_out_channels cannot be 512"),
        (dict(block_out_channels=[], down_block_types=[], up_block_types=[]), "a VAE needs a level"),
        (dict(block_out_channels=[128, 256, 512, 500]), "500 channels do not divide into 32"),
        (dict(layers_per_block=2.5), "layers_per_block cannot be 2.5"),
        (dict(layers_per_block=[2, 2]), "layers_per_block cannot be"),
        (dict(layers_per_block=0), "at least 1"),
        (dict(latent_channels=None), "latent_channels cannot be None"),
        (dict(norm_num_groups=True), "norm_num_groups cannot be True"),
        (dict(scaling_factor="0.18215"), "scaling_factor cannot be '0.18215'"),
        (dict(scaling_factor=0), "scaling_factor must be a positive number, got 0"),
        (dict(scaling_factor=math.nan), "scaling_factor must be a positive number, got nan"),
    ],
)
def test_configs_of_other_networks_are_refused(changes, told):
    with pytest.raises(UserError, match=f"^my/config.json: .*{told}") as caught:
        vae_config({**STABLE_DIFFUSION_1, **changes}, "my/config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# ---- weights from before diffusers 0.17

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def older_keys(state, matrix):
    """The state with the keys of before 0.17; matrix: what becomes of the attention's matrices."""
    older = {}
    for name, array in state.items():
        for now, before in OLDER.items():
            if f".attentions.0.{now}." in name:
                name, array = name.replace(now, before), array if array.ndim == 1 else matrix(array)
        older[name] = array
    return older


@pytest.mark.parametrize(
    "matrix",
    [lambda a: a, lambda a: a[None, None], lambda a: a[..., None, None], lambda a: a[..., None]],
    ids=["linear", "1x1 convolution in our layout", "in theirs", "1-d convolution"],
)
def test_older_keys_are_renamed(matrix):
    state = randomised(TINY).state()
    older = older_keys(state, matrix)
    assert len(older.keys() - state.keys()) == 16
    current = current_keys(older)
    assert list(current) == list(state)
    for name, array in state.items():
        assert current[name].shape == array.shape and np.shares_memory(current[name], array), name
    VAE(TINY, seed=None).load(current)


def test_keys_of_today_and_of_other_attentions_stay():
    names = [*VAE(TINY, seed=None).state(), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
             "down_blocks.0.attentions.0.proj_in.weight", "key.weight", "attentions.0.query.scale"]  # fmt: skip
    state = {name: np.zeros((1, 1, 3, 3)) for name in names}
    current = current_keys(state)
    assert list(current) == names and all(a.shape == (1, 1, 3, 3) for a in current.values())


def test_older_keys_beside_those_of_today_are_refused():
    state = randomised(TINY).state()
    twice = {**state, **older_keys(state, lambda a: a)}
    with pytest.raises(UserError, match=r"attentions.0.query.weight beside .*encoder.mid_block.attentions.0.to_q.wei"):
        current_keys(twice)
