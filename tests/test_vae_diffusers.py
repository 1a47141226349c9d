"""Our VAE is diffusers' AutoencoderKL: same weights, same latents, images and gradients; block by block too."""

import functools

import numpy as np
import pytest
from helpers import import_or_skip, in_our_layout, plain

from minidiff.models import VAE, Posterior
from minidiff.pretrained.configs import vae_config
from minidiff.pretrained.weights import current_keys
from minidiff.tensor import Tensor, no_grad

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")


def theirs_with(channels, **others):
    levels = len(channels)
    return dict(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=4, **others,
    )  # fmt: skip


VAES = {
    "Stable Diffusion": theirs_with([8, 16, 24, 24], layers_per_block=2),
    "three levels, other channels": theirs_with(
        [12, 8, 16], in_channels=1, out_channels=2, latent_channels=3, scaling_factor=0.5
    ),
    "one level": theirs_with([8]),
}
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}


@functools.cache
def both(name, dtype):
    """Theirs with every parameter random (what begins at 0 or 1 would hide its place), and ours with its weights."""
    model, rng = diffusers.AutoencoderKL(**VAES[name]).to(getattr(torch, dtype)), np.random.default_rng(0)
    for p in model.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
        with torch.no_grad():
            p.copy_(torch.from_numpy(rng.normal((p.ndim == 1) * p.mean().round().item(), scale, tuple(p.shape))))
    vae = VAE(vae_config(plain(model.config)), seed=None)
    vae.load(in_our_layout(model.state_dict()))
    return model, vae


def first(images):
    """Channels first."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def last(tensor):
    """Channels last."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def assert_same(ours, theirs, name):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    assert np.isfinite(ours).all() and np.isfinite(theirs).all(), name
    error, tolerance = np.abs(ours - theirs).max() / np.abs(theirs).max(), TOLERANCES[str(ours.dtype)]
    print(f"{name}: {error:.1e}")
    assert error <= tolerance, f"{name}: off by {error:.1e}, allowed {tolerance}"


def given(vae, dtype, B=2, h=2, w=3):
    """Images and latents of an oblong shape."""
    rng, config = np.random.default_rng(1), vae.config
    images = rng.uniform(-1, 1, (B, h * config.stride, w * config.stride, config.in_channels))
    return images.astype(dtype), rng.normal(size=(B, h, w, config.latent_channels)).astype(dtype)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (3, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VAES)
def test_images_to_latents_and_latents_to_images(name, dtype, size):
    model, vae = both(name, dtype)
    images, latents = given(vae, dtype, *size)
    with no_grad(), torch.no_grad():
        assert_same(vae.encode(images).data / vae.config.scaling_factor,
                    last(model.encode(first(images)).latent_dist.mode()), "latents")  # fmt: skip
        theirs = model.decode(first(latents) / model.config.scaling_factor).sample
        assert_same(vae.decode(latents).data, last(theirs), "images")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VAES)
def test_the_posterior(name, dtype):
    model, vae = both(name, dtype)
    images, noise = given(vae, dtype)
    with no_grad(), torch.no_grad():
        ours, theirs = vae.posterior(images), model.encode(first(images)).latent_dist
        assert_same(ours.mean.data, last(theirs.mean), "mean")
        assert_same(ours.log_variance.data, last(theirs.logvar), "log-variance")
        assert_same(ours.kl().data, theirs.kl().numpy(), "KL")
        assert_same(ours.sample(noise).data, last(theirs.mean + theirs.std * first(noise)), "sample")


def test_extreme_moments():
    moments = np.random.default_rng(0).normal(0, 30, (3, 2, 5, 8))
    ours = Posterior(Tensor(moments))
    theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(first(moments))
    assert (np.abs(moments) > 30).any() and ours.log_variance.data.max() == 20
    assert_same(ours.log_variance.data, last(theirs.logvar), "log-variance")
    assert_same(ours.kl().data, theirs.kl().numpy(), "KL")


BLOCKS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")
ENDS = ("conv_in", "conv_norm_out", "conv_out", "quant_conv", "post_quant_conv")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VAES)
def test_every_block(name, dtype):
    """Each of ours, given what theirs is given, makes what theirs makes; our last norms have their SiLU in them."""
    model, vae = both(name, dtype)
    images, latents = given(vae, dtype)
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, x, y, path=path: seen.update({path: (x[0], y)}))
        for path, module in model.named_modules()
        if type(module).__name__ in BLOCKS or path.split(".")[-1] in ENDS
    ]
    with torch.no_grad():
        model.encode(first(images))
        model.decode(first(latents))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(list(vae.encoder.layers())) + len(list(vae.decoder.layers())) + 2
    for path, (x, y) in seen.items():
        block = vae
        for key in path.split("."):
            block = block[int(key)] if key.isdigit() else getattr(block, key)
        y = torch.nn.functional.silu(y) if path.endswith("conv_norm_out") else y
        with no_grad():
            assert_same(block(Tensor(last(x))).data, last(y), path)


@pytest.mark.parametrize("name", VAES)
def test_gradients(name):
    """Of sum(decoded dy) + sum(KL), in float64: of the images and of every parameter."""
    model, vae = both(name, "float64")
    images, noise = given(vae, "float64")
    dy = np.random.default_rng(2).normal(size=(*images.shape[:3], vae.config.out_channels))

    x = first(images).requires_grad_()
    q = model.encode(x).latent_dist
    decoded = model.decode(q.mean + q.std * first(noise)).sample
    model.zero_grad()
    ((decoded * first(dy)).sum() + q.kl().sum()).backward()
    wanted = {"images": last(x.grad), **in_our_layout({n: p.grad for n, p in model.named_parameters()})}

    ours = Tensor(images, requires_grad=True)
    decoded, q = vae(ours, noise)
    ((decoded * dy).sum() + q.kl().sum()).backward()
    found = {"images": ours.grad, **{n: p.grad for n, p in vae.named_parameters()}}
    for p in vae.parameters():
        p.grad = None
    assert found.keys() == wanted.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    for path, g in wanted.items():
        error = np.abs(found[path] - g).max() / max(np.abs(g).max(), 1e-3 * largest)
        assert error <= 1e-10, f"{path}: {error:.1e}"


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["linear", "1x1 convolution"])
def test_a_file_from_before_diffusers_0_17(shape):
    model, vae = both("Stable Diffusion", "float32")
    older = {}
    for name, array in model.state_dict().items():
        for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{now}.weight" in name:
                array = array.reshape(*array.shape, *shape)
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        older[name] = array
    again = VAE(vae.config, seed=None)
    again.load(current_keys(in_our_layout(older)))
    images, latents = given(vae, "float32")
    with no_grad():
        assert np.array_equal(again.encode(images).data, vae.encode(images).data)
        assert np.array_equal(again.decode(latents).data, vae.decode(latents).data)


def test_the_defaults_are_theirs():
    model = diffusers.AutoencoderKL()
    assert vae_config({}) == vae_config(plain(model.config))
