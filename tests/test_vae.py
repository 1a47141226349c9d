"""The VAE: shapes, posterior, scaling, gradients, training, what is kept in memory, configs and weights of any age."""

import math
import weakref

import numpy as np
import pytest
from helpers import assert_close

from minidiff import ops
from minidiff.gradcheck import gradcheck
from minidiff.models import VAE, Posterior, VAEConfig, parameter_count
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
