"""The latent space: an autoencoder that makes images small, so that diffusion has less to compute.

    images (B, H, W, 3) ── encoder ── quant_conv ── mean, log-variance ── z ~ N(mean, exp(log-variance))
    z (B, H/8, W/8, 4) ── post_quant_conv ── decoder ── images (B, H, W, 3)

Eight pixels by eight become one position of four numbers. The encoder does not give one z but a normal distribution,
the posterior q(z | image), and is trained to keep it near N(0, 1) by its Kullback-Leibler divergence from that: so
images that look alike lie close together, and what diffusion draws between them can be decoded. Diffusion works on
latents = scaling_factor z, whose variance is about 1.

Kingma and Welling 2013, arXiv 1312.6114; Rombach et al. 2022, arXiv 2112.10752, sections 3.1 and G.
Structure and parameter names are those of diffusers' AutoencoderKL, so that its weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minidiff import ops
from minidiff.backend import Array, array_module
from minidiff.models.unet import Downsample, ResBlock, SelfAttentionBlock, Upsample
from minidiff.nn import Conv2d, GroupNorm, Module
from minidiff.tensor import Tensor, as_tensor, record, recording
from minidiff.threads import release_memory

EPS = 1e-6  # of every GroupNorm


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; as they stand, those of Stable Diffusion 1 and 2."""

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level, from the finest
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215  # latents = scaling_factor z

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.latent_channels, self.blocks, self.norm_groups)
        if not self.channels or min(*self.channels, *sizes) < 1:
            raise ValueError("a VAE needs a level, and channels, blocks and norm_groups of at least 1")
        for c in self.channels:
            if c % self.norm_groups:
                raise ValueError(f"a VAE's {c} channels do not divide into {self.norm_groups} norm groups")
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"a VAE's scaling_factor must be a positive number, got {self.scaling_factor}")

    @property
    def stride(self) -> int:
        """Pixels, in height and in width, that become one position of the latents."""
        return 2 ** (len(self.channels) - 1)


class Posterior:
    """q(z | image) = N(mean, exp(log_variance)), every number of z by itself; both (B, h, w, c).

    moments (B, h, w, 2 c): mean and log-variance side by side; the latter is held within [-30, 20].
    """

    def __init__(self, moments: Tensor):
        c = moments.shape[-1] // 2
        self.mean = moments[..., :c]
        self.log_variance = _clip(moments[..., c:], -30.0, 20.0)

    def mode(self) -> Tensor:
        """The most probable z."""
        return self.mean

    def sample(self, noise: Array) -> Tensor:
        """z = mean + sigma noise, for noise (B, h, w, c) from N(0, 1); raises ValueError where it has another shape."""
        if noise.shape != self.mean.shape:
            raise ValueError(f"VAE: wanted noise {self.mean.shape}, like the latents, got {noise.shape}")
        noise = array_module(self.mean.data).asarray(noise, dtype=self.mean.dtype)
        return self.mean + ops.exp(self.log_variance * 0.5) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) = 1/2 sum(mean^2 + variance - 1 - log variance), in nats: (B,)."""
        mean, log_variance = self.mean, self.log_variance
        return (mean * mean + ops.exp(log_variance) - 1.0 - log_variance).sum(axis=(1, 2, 3)) * 0.5


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    """x held within [low, high]; outside no gradient comes back."""
    y = x.data.clip(low, high)
    return record("clip", y, (x,), lambda dy: (dy * (x.data == y),))


class DownBlock(Module):
    """One level of the encoder: residual blocks, then half the size unless it is the lowest level."""

    def __init__(self, c_in: int, c: int, blocks: int, groups: int, last: bool):
        self.resnets = _res_blocks(c_in, c, blocks, groups)
        self.downsamplers = [] if last else [Downsample(c, padding=0)]

    def layers(self) -> list[Module]:
        """In the order of their use."""
        return [*self.resnets, *self.downsamplers]


class UpBlock(Module):
    """One level of the decoder: residual blocks, then twice the size unless it is the highest level."""

    def __init__(self, c_in: int, c: int, blocks: int, groups: int, last: bool):
        self.resnets = _res_blocks(c_in, c, blocks, groups)
        self.upsamplers = [] if last else [Upsample(c)]

    def layers(self) -> list[Module]:
        """In the order of their use."""
        return [*self.resnets, *self.upsamplers]


class MidBlock(Module):
    """At the smallest size: residual block, self-attention with one head, residual block."""

    def __init__(self, c: int, groups: int):
        self.resnets = _res_blocks(c, c, 2, groups)
        self.attentions = [SelfAttentionBlock(c, 1, groups, EPS)]

    def layers(self) -> list[Module]:
        """In the order of their use."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


def _res_blocks(c_in: int, c: int, n: int, groups: int) -> list[ResBlock]:
    return [ResBlock(c_in if i == 0 else c, c, groups, EPS) for i in range(n)]


def _through(layers: Iterable[Module], x: Tensor) -> Tensor:
    """x through one layer after the other: without gradients each result is let go of as soon as the next is there.

    And where a layer changes the size, so that what it leaves behind fits nothing to come, back to the system.
    """
    for layer in layers:
        before = x.shape
        x = layer(x)
        if x.shape != before and not recording([x]):
            release_memory()
    return x


class Encoder(Module):
    """Images to the posterior's moments, before the quant_conv."""

    def __init__(self, config: VAEConfig):
        widths, groups = config.channels, config.norm_groups
        above = (widths[0], *widths)
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.down_blocks = [
            DownBlock(above[i], c, config.blocks, groups, last=i == len(widths) - 1) for i, c in enumerate(widths)
        ]
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS, silu=True)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)
        self.conv_in.weight.hidden = False

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, in_channels) -> (B, H / stride, W / stride, 2 latent_channels)."""
        return _through(self.layers(), images)

    def layers(self) -> Iterator[Module]:
        """In the order of their use."""
        yield self.conv_in
        for block in self.down_blocks:
            yield from block.layers()
        yield from self.mid_block.layers()
        yield from (self.conv_norm_out, self.conv_out)


class Decoder(Module):
    """z, after the post_quant_conv, to images."""

    def __init__(self, config: VAEConfig):
        widths, groups = config.channels[::-1], config.norm_groups
        below = (widths[0], *widths)
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = [
            UpBlock(below[i], c, config.blocks + 1, groups, last=i == len(widths) - 1) for i, c in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS, silu=True)
        self.conv_out = Conv2d(widths[-1], config.out_channels)
        self.conv_out.weight.hidden = False

    def forward(self, z: Tensor) -> Tensor:
        """(B, h, w, latent_channels) -> (B, stride h, stride w, out_channels)."""
        return _through(self.layers(), z)

    def layers(self) -> Iterator[Module]:
        """In the order of their use."""
        yield self.conv_in
        yield from self.mid_block.layers()
        for block in self.up_blocks:
            yield from block.layers()
        yield from (self.conv_norm_out, self.conv_out)


class VAE(Module):
    """Images (B, H, W, 3) in [-1, 1] to latents (B, H/8, W/8, 4) and back; H and W divisible by the config's stride.

    `encode` and `decode` alone know of the scaling factor. Both are recorded as every op is: use them within
    `no_grad()` unless you train. Decoding 64x64 latents of Stable Diffusion in float32 then has at most 640 MiB of
    features alive, in the first residual block at full size. `vae(images, noise)` is for training: the images decoded
    from a sample, and the posterior.

    seed: initialises the parameters; None leaves them empty for `load`.
    """

    def __init__(self, config: VAEConfig, seed: int | None = 0):
        c = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * c, 2 * c, kernel=1, padding=0)
        self.post_quant_conv = Conv2d(c, c, kernel=1, padding=0)
        if seed is not None:
            self.initialise(seed)

    def encode(self, images: Tensor | Array, noise: Array | None = None) -> Tensor:
        """Images (B, H, W, in_channels) -> latents (B, h, w, latent_channels), a sample of the posterior by the noise.

        noise: from N(0, 1), shaped like the latents; without it the latents are the posterior's mean.
        """
        posterior = self.posterior(images)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return z * self.config.scaling_factor

    def decode(self, latents: Tensor | Array) -> Tensor:
        """Latents (B, h, w, latent_channels) -> images (B, H, W, out_channels), not held within [-1, 1]."""
        return self._images(as_tensor(latents) / self.config.scaling_factor)

    def forward(self, images: Tensor | Array, noise: Array) -> tuple[Tensor, Posterior]:
        """Images and noise as `encode` takes them -> the images as they come back, and the posterior."""
        posterior = self.posterior(images)
        return self._images(posterior.sample(noise)), posterior

    def posterior(self, images: Tensor | Array) -> Posterior:
        """q(z | image) of images (B, H, W, in_channels), not scaled."""
        x, stride = as_tensor(images), self.config.stride
        if x.ndim != 4 or x.shape[3] != self.config.in_channels or x.shape[1] % stride or x.shape[2] % stride:
            raise ValueError(
                f"VAE: wanted images (B, H, W, {self.config.in_channels}), H and W divisible by {stride}; got {x.shape}"
            )
        return Posterior(self.quant_conv(self.encoder(x)))

    def _images(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[3] != self.config.latent_channels:
            raise ValueError(f"VAE: wanted latents (B, h, w, {self.config.latent_channels}), got {z.shape}")
        return self.decoder(self.post_quant_conv(z))
