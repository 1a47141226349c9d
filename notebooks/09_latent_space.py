# %% [markdown]
# # 9. Latent space
#
# A picture has far more numbers than it has things to say. A **variational autoencoder** (VAE) learns to squeeze it
# into a small grid of numbers, its **latents**, and to make a picture of the grid again. Diffusion then works on the
# small grid. That is what makes Stable Diffusion affordable.
#
# **What you will learn**
#
# - the two halves of a VAE, and why its encoder answers with a cloud instead of a point;
# - its loss: how wrong the picture is that comes back, plus how much the latents tell;
# - what latents look like, what can be done with them, and what the weight of the second part does;
# - why latents are multiplied by a *scaling factor* before diffusion sees them;
# - what all this saves, counted, and what it costs.
#
# You need notebook 1 (the forward process), notebook 5 (residual blocks), notebook 6 (training) and notebook 7
# (the way back); for one table, notebook 8 (guidance). No trained model is needed: what we need we train here.

# %%
from course import begin, close, figure, photograph, source, table

begin(9, "kernels")

# %%
import time
from dataclasses import replace

import numpy as np

from drawing_09 import counting, hourglass, maps, panels, stages, strips
from minidiff import diffusion, ops, optim, plotting, samplers, schedule
from minidiff.data import shapes
from minidiff.models import VAE, Posterior, UNet, UNetConfig, VAEConfig, parameter_count
from minidiff.tensor import Tensor, no_grad
from minidiff.text_to_image import depth_to_space, space_to_depth

rng = np.random.default_rng(0)

# %% [markdown]
# ## What a picture has to say
#
# How well can a number of a photograph be guessed, if those around it are known? Take the simplest guess, the mean of
# the four neighbours of the same colour:

# %%
photo = photograph(512)
guess = (photo[:-2, 1:-1] + photo[2:, 1:-1] + photo[1:-1, :-2] + photo[1:-1, 2:]) / 4
explained = 1 - np.mean((photo[1:-1, 1:-1] - guess) ** 2) / photo.var()
print(
    f"{photo.size:,} numbers; four neighbours tell {100 * explained:.1f}% of the variance of a number"
)

# %% [markdown]
# So most of what is stored is a repetition. Our own pictures are an extreme case. They are drawn from a list: for each
# object its colour, its shape, where it is (two numbers), and its radius. Five entries for each object. (The
# `size` that is printed below is only the caption's word for the radius.) The picture made of them has thousands
# of numbers.

# %%
scenes = shapes.draw_scenes(4, np.random.default_rng(5), "val")
pictures = shapes.render(scenes)  # (4, 32, 32, 3)
thing = scenes[0].objects[0]
print(thing)
print(f"{5 * len(scenes[0].objects)} entries become {pictures[0].size:,} numbers")
figure(
    plotting.image_grid(pictures, [shapes.caption(scene, rng) for scene in scenes], columns=4),
    "Four pictures, each drawn from a list of ten entries.",
)

# %% [markdown]
# Here we know the list, because we wrote it. Of a photograph nobody has one. But it may be possible to *learn* a short
# description, from nothing but pictures: let one network shorten the picture and another make it long again, and ask
# that what comes back is what went in. Such a pair is an **autoencoder**.
#
# ## Encoder and decoder
#
# The library's VAE is made of what you know from the U-Net: residual blocks, convolutions that halve or double the
# size, one self-attention at the smallest size. But there are no skips. Everything that the decoder knows must pass
# through the middle. In `minidiff/models/vae.py`:

# %%
from minidiff.models.vae import Encoder

source(Encoder)

# %% [markdown]
# (*Moments* are the means and log-variances of the next section, and `quant_conv` is one more convolution of 1 x 1 that
# makes them; `_through` applies one layer after the other; `hidden` tells the optimizer which weights are in the middle
# of the network.)
#
# The decoder is the same backwards. We take a small one: 16 channels at full size, 32 at a half and at a quarter of it,
# and $z$, what is in the middle, with 4 channels. Followed through every layer that changes the shape:

# %%
vae = VAE(
    VAEConfig(channels=(16, 32, 32), blocks=1, latent_channels=4, norm_groups=8, scaling_factor=1.0)
)  # fmt: skip
found = stages(vae, pictures[:1])
sizes = dict(found)
figure(
    hourglass(found),
    "Shapes through the VAE: height × width × channels. Boxes are as high as the grid, and wider with more channels. "
    "On the left the encoder, on the right the decoder.",
)
print(f"{pictures[0].size:,} numbers become {np.prod(sizes['z'])}: "
      f"{pictures[0].size / np.prod(sizes['z']):.0f} times fewer")  # fmt: skip
print(f"{parameter_count(vae):,} weights")

# %% [markdown]
# The middle is still a grid. Each of its 8 x 8 positions has four numbers, and stands for a square of 4 x 4 pixels and
# what lies around it. Convolutions keep things in their place: what is at the top left of the picture is at the top
# left of the latents. Diffusion on latents needs just that, for its U-Net is made of convolutions too.
#
# ## Not a point but a cloud
#
# The box before $z$ holds *eight* numbers a position. For each number of $z$ the encoder gives two: a mean and (the
# logarithm of) a variance. Together they say: $z$ is somewhere around here. This distribution is called the
# **posterior**, because it is what is known of $z$ *after* the picture has been seen:
#
# $$q(z \mid x) = \mathcal{N}\big(z;\ \mu(x),\ \sigma(x)^2\big)$$
#
# - $x$ is the picture, $z$ its latents;
# - $\mu(x)$ and $\sigma(x)$ are the encoder's answers: a mean and a standard deviation for every number of $z$;
# - $q$ is a name as in $q(x_t \mid x_0)$, but of another distribution: there noise is put on a picture, here latents
#   are told from one.
#
# Why so vague? Think of a decoder that is given exact points. It may put one picture at 0.13702 and quite another at
# 0.13703, and in between anything may come out: nobody ever asked. If $z$ is drawn from a cloud, the decoder must be
# right *everywhere in the cloud*. Neighbours must then mean similar things. For diffusion that is vital: what it draws
# will never be exactly a point that the encoder gave.
#
# ### The draw, and a gradient through it
#
# There is a difficulty. How can the encoder learn, if between it and the loss stands a throw of the dice? No gradient
# passes through dice. The answer is the **reparameterisation trick** ([Kingma and Welling
# 2013](https://arxiv.org/abs/1312.6114)): throw the dice first, without looking at the picture, then shift and scale.
#
# $$z = \mu + \sigma\,\varepsilon, \qquad \varepsilon \sim \mathcal{N}(0, 1)$$
#
# $\varepsilon$ is a constant as far as the gradient is concerned, and $\mu$ and $\sigma$ enter by a sum and a product.
# The code is `sample`; `mode` is the most probable $z$, the mean; and `kl` comes next.

# %%
source(Posterior)

# %% [markdown]
# Try it on one number. Let the encoder's answer be the mean 0.3 and the variance 0.25, the throw $\varepsilon = 1.5$.
# If the mean grows by a little, $z$ grows by the same: the gradient is 1. If the log-variance $\ell$ grows: $\sigma =
# e^{\ell/2}$, so $dz/d\ell = \tfrac12\,\sigma\,\varepsilon$.

# %%
moments = Tensor(np.array([0.3, np.log(0.25)]).reshape(1, 1, 1, 2), requires_grad=True)
one_eps = np.full((1, 1, 1, 1), 1.5)
z = Posterior(moments).sample(one_eps)
z.sum().backward()
sigma = 0.25**0.5
print(f"z = {z.item():.3f}, gradients: mean {moments.grad[0, 0, 0, 0]:.3f}, "
      f"log-variance {moments.grad[0, 0, 0, 1]:.3f}")  # fmt: skip
assert close(z.item(), 0.3 + sigma * 1.5)
assert close(moments.grad.ravel(), [1, sigma * 1.5 / 2])

# %% [markdown]
# ## What keeps the clouds together
#
# Left alone, the encoder would soon outwit us: make $\sigma$ tiny, or move the clouds so far apart that they never
# touch. Either way they are points again. So a second part of the loss pulls every cloud towards one and the same,
# $p(z) = \mathcal{N}(0, 1)$, called the **prior**: what one says of $z$ *before* a picture has been seen. The pull is
# the **Kullback-Leibler divergence**, KL for short.
#
# In words: draw a $z$ from the cloud $q$. How much more probable is it under $q$ than under $p$? Take the logarithm of
# that ratio, and average over all draws.
#
# $$\mathrm{KL}(q \,\|\, p) = \mathbb{E}_{z \sim q}\big[\ln q(z) - \ln p(z)\big]$$
#
# For normal distributions the average can be taken by hand. The logarithm of a normal density is $-\tfrac12
# \ln(2\pi\sigma^2) - (z-\mu)^2/(2\sigma^2)$. The mean of $(z-\mu)^2$ is $\sigma^2$ by definition, so the mean of $\ln
# q$ is $-\tfrac12\ln(2\pi\sigma^2) - \tfrac12$. For $p$ stands 1 instead of $\sigma^2$ and 0 instead of $\mu$; the mean
# of $z^2$ is $\mu^2 + \sigma^2$; so the mean of $\ln p$ is $-\tfrac12\ln 2\pi - \tfrac12(\mu^2+\sigma^2)$. Subtract:
#
# $$\mathrm{KL} = \tfrac12\left(\mu^2 + \sigma^2 - 1 - \ln\sigma^2\right)$$
#
# for each number of $z$, summed over all of them: `kl` above. Its unit is the *nat*, which is to the natural logarithm
# what the bit is to the logarithm of base 2: one nat is $1/\ln 2 \approx 1.44$ bits. Averaged over pictures, KL is an
# upper limit for how much the latents tell about the picture.
#
# Is it right? Draw, and take the average in earnest:

# %%
mean, std = 0.8, 0.5
z = mean + std * rng.standard_normal(1_000_000)
log_q = -0.5 * np.log(2 * np.pi * std**2) - (z - mean) ** 2 / (2 * std**2)
log_p = -0.5 * np.log(2 * np.pi) - z**2 / 2
kl = Posterior(Tensor(np.array([mean, np.log(std**2)]).reshape(1, 1, 1, 2))).kl().item()
print(f"averaged over draws: {np.mean(log_q - log_p):.4f} nats, by the formula: {kl:.4f}")
assert close(np.mean(log_q - log_p), kl, 0.01)


# %%
def kl_of(means, stds):
    """KL of one number each, by the library."""
    moments = np.stack(np.broadcast_arrays(means, 2 * np.log(stds)), axis=-1)
    return Posterior(Tensor(moments.reshape(-1, 1, 1, 2))).kl().data


means, stds = np.linspace(-3, 3, 121), np.geomspace(0.02, 3, 121)
figure(
    panels(
        {
            "by the mean, at several standard deviations": {
                "deviation 0.1": (means, kl_of(means, 0.1)),
                "0.5": (means, kl_of(means, 0.5)),
                "1": (means, kl_of(means, 1.0)),
            },
            "by the standard deviation, at mean 0": {"mean 0": (stds, kl_of(0.0, stds))},
        },
        ["mean", "standard deviation"],
        "KL (nats)",
        "KL of one number to N(0, 1)",
        ylim=(-0.2, 6.5),
    ),
    "What a number of z costs. Nothing only for mean 0 and standard deviation 1, where it says nothing. Being off costs "
    "by the square. Being sure costs by the logarithm: from a deviation of 1 to 0.5 it is 0.3 nats, and once a cloud is "
    "narrow, every halving costs 0.7 more.",
)

# %% [markdown]
# ## The loss
#
# $$L = \underbrace{\frac1n \lVert x - \hat x\rVert^2}_{\text{reconstruction}} \;+\; \frac{\beta}{n}\,
# \underbrace{\mathrm{KL}\big(q(z \mid x)\,\|\,\mathcal{N}(0,1)\big)}_{\text{in nats a picture}}$$
#
# - $\hat x$ is the picture that the decoder makes of a drawn $z$, and $n$ the number of numbers in a picture;
# - $\beta$ (beta) is the weight of the second part. It has nothing to do with the $\beta_t$ of the schedule.
#
# It has a meaning, too. If the decoder says "the picture is $\hat x$, give or take $s$ for every number", the negative
# logarithm of its probability is $\lVert x-\hat x\rVert^2/(2s^2)$ and a constant. Multiply by $2s^2/n$ and this is our
# first part; then $\beta = 2s^2$. So $\beta$ tells how large an error is worth a nat. And the loss, divided by $2s^2/n$
# and with its sign turned round, is, up to a constant, a lower limit of the logarithm of the picture's probability, the
# *evidence lower bound*. That is where the idea came from.

# %%
source(VAE.forward)


# %%
def vae_loss(images, beta):
    """The loss on some images; and its two parts, the KL in nats a picture."""
    eps = rng.standard_normal((len(images), 8, 8, 4), dtype=np.float32)
    back, posterior = vae(images, eps)
    error, kl = ops.mse(back, images), posterior.kl().mean()
    return error + kl * (beta / images[0].size), error.item(), kl.item()


def learn(network, loss, steps, rate):
    """Train by a loss() that draws its own batch and begins with a Tensor; what it returns, of every step."""
    optimizer = optim.Muon(dict(network.named_parameters()), ema_decay=0.98)
    told = []
    for step in range(1, steps + 1):
        value, *parts = loss()
        value.backward()
        grads = {name: p.grad for name, p in network.named_parameters()}
        factor = float(optim.clip_factor(optim.gradient_norm(list(grads.values())), 1.0))
        optimizer.step(optim.learning_rate(step, steps, rate, 20), grads, factor)
        for p in network.parameters():
            p.grad = None
        told.append([value.item(), *parts])
    network.load(optimizer.ema)  # the moving average of the weights
    return np.array(told)


# %% [markdown]
# Every piece of `learn` is from notebook 6: clipping, the learning rate that rises and falls, the moving average.
# The optimizer is Muon, as in the preset that was used there: like AdamW it goes along an average of the
# gradients, but makes all directions of a matrix about equally strong first. Eight pictures a step:

# %%
beta, since = 3e-4, time.perf_counter()
log = learn(vae, lambda: vae_loss(shapes.batch(8, rng)[0], beta), steps=380, rate=2e-3)
print(f"{8 * len(log):,} pictures in {time.perf_counter() - since:.0f} seconds")

# %%
every = np.arange(1, len(log) + 1)
figure(
    panels(
        {"reconstruction": {"mean squared error": (every, log[:, 1])},
         "what the latents tell": {"KL": (every, log[:, 2])}},
        "training step", ["mean squared error", "KL (nats a picture)"], "The two parts of the loss",
        logy=True,
    ),
    "The two parts of the loss while the VAE learns. At first it pays to say more and more about the picture. Later the nats fall again while the error goes on falling: the network learns to say more with fewer.",
)  # fmt: skip

# %% [markdown]
# ## What comes back
#
# New pictures, with pairs of objects that it was never trained on. We encode, take the mean of each cloud, and decode.

# %%
source(VAE.encode, VAE.decode)


# %%
def there(images):
    """Latents, the posterior's mean."""
    with no_grad():
        return vae.encode(images).data


def back(latents):
    """Pictures of latents."""
    with no_grad():
        return vae.decode(latents.astype(np.float32)).data


fresh, captions = shapes.batch(128, np.random.default_rng(99), "val")
returned = back(there(fresh))
error = np.mean((returned - fresh) ** 2)
figure(
    strips(
        {
            f"the picture:\n{fresh[0].size} numbers": fresh[:6],
            f"back from\n{there(fresh[:1]).size} numbers": returned[:6],
            "what is wrong,\n4 times enlarged": 4 * (returned - fresh)[:6],
        }
    ),
    "Pictures, what the decoder makes of their latents, and the difference (grey is none).",
)
print(f"error of a number: {np.sqrt(error):.3f} (root of the mean square), "
      f"where pictures differ from their average by {np.std(fresh - fresh.mean(axis=0)):.3f}")  # fmt: skip

# %%
right = shapes.score(shapes.judge(returned, captions))
table(
    ["of 128 returned pictures, the checker finds", "right"],
    [[name.replace("_", " "), f"{100 * share:.0f}%"] for name, share in right.items()],
)

# %% [markdown]
# What goes wrong is at the edges, where a fraction of a pixel counts. The VAE is **lossy**: it keeps what it needs to
# be nearly right. What it loses is lost for good, whatever diffusion does later. In photographs that would be fine
# texture, which costs many nats and, in squared error, counts for little. So Stable Diffusion's VAE was taught with two
# more parts in its loss: one compares features that another network finds in both pictures, and in the other a
# *critic*, a network that is trained beside the VAE, tries to tell the picture that came back from the true one,
# while the VAE tries to deceive it ([Rombach et al. 2022](https://arxiv.org/abs/2112.10752), section 3.1).
#
# ## The latents as pictures
#
# Four maps of 8 x 8 numbers. And beside them what each position costs in nats: its share of the KL. (The library sums
# `kl` over a picture. To have it by position, we show it each position as a picture of its own.)

# %%
with no_grad():
    posterior = vae.posterior(fresh)
mean, log_variance = posterior.mean.data, posterior.log_variance.data
by_position = Posterior(
    Tensor(np.concatenate([mean, log_variance], axis=3).reshape(-1, 1, 1, 8))
)
paid = by_position.kl().data.reshape(-1, 8, 8)
assert close(paid.sum(axis=(1, 2)), posterior.kl().data, 1e-4)
figure(
    maps(fresh[:3], {f"channel {c + 1}": mean[:3, ..., c] for c in range(4)}, paid[:3], "nats"),
    "Three pictures, the four channels of their latents (means; left bar), and how many nats each position costs (right "
    "bar; the few above its arrow have its last colour). The objects stay where they are.",
)

# %%
background = shapes.render([shapes.Scene(())])
differs = np.abs(fresh - background).max(axis=3, keepdims=True) > 0.01
holds = space_to_depth(differs, 4).any(axis=3)  # whether a square holds a part of an object
print(f"a position costs {paid[holds].mean():.0f} nats where it holds a part of an object, "
      f"{paid[~holds].mean():.0f} elsewhere")  # fmt: skip
total = paid.sum(axis=(1, 2)).mean()
print(f"{total:.0f} nats a picture: that is at most {total / np.log(2) / 8:.0f} bytes")

# %% [markdown]
# A position says more where there is something to say. But an empty one is not free: its means lie off 0, and its
# clouds are narrow, so that the decoder can be sure that nothing is there. And no channel is "the colour" or "the
# shape": the encoder was never asked for a description that we understand, only for one that the decoder does.
#
# ## More or less KL
#
# From the trained VAE we go on for a few steps: with a weight $\beta$ that is a hundred times smaller, with the
# same, with one that is a hundred times larger, and with one that is three thousand times larger. What changes?
# And what does the decoder make of a $z$ that is drawn from the prior, $\mathcal{N}(0, 1)$, as if no picture had
# been seen?

# %%
trained = {name: array.copy() for name, array in vae.state().items()}
from_prior = rng.standard_normal((3, 8, 8, 4), dtype=np.float32)
eps = rng.standard_normal((len(fresh), 8, 8, 4), dtype=np.float32)
rows, seen = [], {}
for weight in (beta / 100, beta, 100 * beta, 3000 * beta):
    vae.load({name: array.copy() for name, array in trained.items()})
    learn(vae, lambda w=weight: vae_loss(shapes.batch(8, rng)[0], w), steps=32, rate=2e-3)
    with no_grad():
        posterior = vae.posterior(fresh)
        drawn = vae.decode(posterior.sample(eps)).data
    kl, error = posterior.kl().data.mean(), np.sqrt(np.mean((drawn - fresh) ** 2))
    width = np.exp(posterior.log_variance.data / 2).mean()
    spread = posterior.mean.data.std()
    rows.append([f"{weight:g}", f"{kl:.0f}", f"{error:.3f}", f"{spread:.2f}", f"{width:.3f}"])
    seen[f"β = {weight:g}"] = np.concatenate([drawn[:3], back(from_prior)])
vae.load(trained)  # back to the first
table(
    ["β", "KL (nats)", "error of a number", "spread of the means", "mean width σ of a cloud"],
    rows,
)
figure(
    strips(seen, above=["encoded and back", "", "", "drawn from N(0, 1)", "", ""]),
    "The three on the left: pictures encoded, drawn from their clouds and decoded, under four weights β. On the right: "
    "what the decoder makes of pure chance, the same in every row.",
)

# %% [markdown]
# A small $\beta$ makes narrow clouds, far apart. The picture comes back no worse for it, and the space between the
# clouds is left to itself. A large one makes the clouds wide, until they overlap. Then what costs more nats than the
# error that it saves is no longer said, and what comes back is a blur or something else. (Turn $\beta$ up further and
# the encoder says nothing at all. This is known as *posterior collapse*.)
#
# Pure chance does not give pictures, whatever the weight. Each number of $z$ by itself may be as the prior says, but
# the 256 of a picture belong together: where a circle begins it must go on. To know what goes with what is the task of
# the diffusion model. As it is there for that, the VAE need not be one that can be drawn from, and the weight may be
# small: Stable Diffusion's VAE was trained with about $10^{-6}$ ([Rombach et al.
# 2022](https://arxiv.org/abs/2112.10752), section G; its loss has other parts, so this is not to be compared with
# ours). We go on with the VAE from before this section.
#
# ## A walk between two pictures
#
# Take two pictures and mix them, $(1-w)$ of one and $w$ of the other: once the pixels, once the latents, which are then
# decoded.


# %%
def one(colour, shape, x=16.0, y=16.0, radius=4.9):
    """A picture of one object."""
    return shapes.render([shapes.Scene((shapes.Object(colour, shape, "large", x, y, radius),))])


pairs = {
    "shape": (one("red", "circle"), one("red", "triangle")),
    "size": (one("green", "triangle", radius=3.0), one("green", "triangle", radius=5.0)),
    "colour": (one("blue", "square"), one("yellow", "square")),
    "place": (one("red", "circle", x=11.0), one("red", "circle", x=22.0)),
}
shares = np.linspace(0, 1, 5)
walks = {}
for name, (first, last) in pairs.items():
    a, b = there(first), there(last)
    walks[name] = np.concatenate(
        [(1 - w) * first + w * last for w in shares]
        + [back((1 - w) * a + w * b) for w in shares]
    )
figure(
    strips(
        walks, above=[f"{what},\nw = {w:g}" for what in ("pixels", "latents") for w in shares]
    ),
    "From one picture to another by mixing pixels (the five on the left) and by mixing latents (the five on the right).",
)

# %% [markdown]
# Mixed pixels are a double exposure: both objects, half transparent. Mixed latents give, for shape and size, *one*
# object with a firm outline, something between a circle and a triangle. The decoder has learned what pictures look
# like, and half transparent things are not among them. Colours take a way of their own through the latents.
#
# The last pair is sobering: the circle does not travel. Latents are a grid, and each position mixes only what is at
# that position. Halfway there are two objects, as with pixels, and what the decoder makes of half a circle and half a
# background is a surprise. Nothing in the VAE knows of moving. Do not expect more order of a latent space than was
# asked of it.
#
# ## The scaling factor
#
# Diffusion mixes with noise: $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$. This silently
# assumes that $x_0$ has about the variance of $\varepsilon$, that is 1. Then $x_t$ has the variance
# $\bar\alpha_t + (1-\bar\alpha_t) = 1$ at every time, and $\bar\alpha_t$ *is* the share that is still picture. If
# $x_0$ has the variance $V$, the share is another: the true signal-to-noise ratio is
# $V\,\bar\alpha_t/(1-\bar\alpha_t)$, and the schedule that was chosen with care is no longer the schedule that is
# in force.
#
# The VAE makes no such promise. What is the variance of its latents?

# %%
many, _ = shapes.batch(1000, np.random.default_rng(12))
z = there(many)
print(f"variance of the latents: {z.var():.3f}; by channel: {z.var(axis=(0, 1, 2)).round(2)}")

# %% [markdown]
# So we divide by the standard deviation. This one number, the **scaling factor** $1/\sqrt{V}$, is part of the VAE:
# `encode` multiplies by it, `decode` divides by it (you saw both above). Until now it was 1.

# %%
before = back(z[:8])
vae.config = replace(vae.config, scaling_factor=float(1 / z.std()))
latents = there(many)
print(f"scaling factor: {vae.config.scaling_factor:.3f}")
print(f"variance of the latents now: {latents.var():.3f}")
assert close(back(latents[:8]), before, 1e-3)  # decoded, they are the same pictures
sd = VAEConfig()  # as it stands, that of Stable Diffusion 1 and 2
print(f"Stable Diffusion's: {sd.scaling_factor}, so its latents had a standard deviation of "
      f"{1 / sd.scaling_factor:.2f}")  # fmt: skip

# %%
cosine = schedule.cosine(T=1000)
times = np.arange(0, 1001, 25)
eps = rng.standard_normal(z.shape, dtype=np.float32)
sizes = {
    "as they come": z,
    "scaled": latents,
    "as large as Stable Diffusion's": latents / sd.scaling_factor,
}
variances, left = {}, {}
for name, x0 in sizes.items():
    x_ts = [diffusion.q_sample(x0, t, eps, cosine) for t in times]
    variances[name] = (times, [x_t.var() for x_t in x_ts])
    left[name] = (times, [np.corrcoef(x0.ravel(), x_t.ravel())[0, 1] ** 2 for x_t in x_ts])
left["promised: α-bar"] = (times, cosine.alpha_bar[times])
figure(
    panels(
        {
            "variance of x_t": {name: variances[name] for name in ("as they come", "scaled")},
            "share of the variance that is picture": left,
        },
        "t", ["variance", "share"], "Variance and share of the picture by time",
    ),
    "Left: the variance of our noisy latents, as the encoder gives them and scaled. Right: which share of it is still "
    "picture (the squared correlation of x_t and x_0), and what the schedule promises. Scaled latents keep the promise: "
    "the two lines lie on each other.",
)  # fmt: skip

# %% [markdown]
# As they come, our latents stay clear of the noise for longer than the schedule says, and the network would have to
# cope with numbers whose size depends on $t$. Latents as large as Stable Diffusion's would hardly be noisy until the
# very end: most of the steps, of training and of drawing, would be spent on pictures that are all but finished.
#
# ## Noise on latents, noise on pixels
#
# Now the forward process, twice: once on the pixels, once on the scaled latents, which are then decoded to be seen.

# %%
times = [0, 100, 200, 300, 450, 600, 800, 1000]
picture, eps_x = fresh[1:2], rng.standard_normal((1, 32, 32, 3), dtype=np.float32)
latent, eps_z = there(picture), rng.standard_normal((1, 8, 8, 4), dtype=np.float32)
noisy_pixels = [diffusion.q_sample(picture, t, eps_x, cosine) for t in times]
noisy_latents = [diffusion.q_sample(latent, t, eps_z, cosine) for t in times]
figure(
    strips(
        {
            "noise on\nthe pixels": np.concatenate(noisy_pixels),
            "noise on\nthe latents": np.concatenate([back(x) for x in noisy_latents]),
        },
        above=[f"t = {t}" for t in times],
    ),
    "The same schedule on pixels (clipped to ±1) and on latents. Noisy latents do not look noisy: the decoder makes "
    "something of everything.",
)

# %% [markdown]
# Noise on pixels is static. Noise on latents is *wrong content*: bumps, smears, objects that are not there. At little
# noise the decoder corrects it silently, as it was trained to do with draws from its clouds. The U-Net of a latent
# diffusion model never sees any of these pictures. It sees the grids of 8 x 8 x 4 numbers, and removes noise from them
# exactly as notebook 7 does from pixels. The decoder is called once, at the very end.
#
# ## What it saves
#
# Count. The work of a network is its multiply-adds: for a convolution, positions x kernel x channels in x channels out;
# for a linear layer the same without the kernel; for attention, positions x positions x channels, twice. `counting` (in
# `drawing_09.py`) runs a network on shapes alone: every op notes what it would compute, and computes nothing. So a
# network of any size can be counted in a moment, Stable Diffusion's too. First a small U-Net on our pictures, in three
# forms:
#
# - **pixels**: 32 x 32 x 3;
# - **latents**: 8 x 8 x 4;
# - **patches**: what the model that comes with minidiff ("the model in the box") does instead of a VAE. Each
#   square of 4 x 4 pixels becomes one position with 48 channels.

# %%
source(space_to_depth, depth_to_space)


# %%
def small_unet(channels):
    """The U-Net that we train below, for inputs of so many channels."""
    return UNet(
        UNetConfig(
            in_channels=channels, out_channels=channels, channels=(48, 64), blocks=1,
            attention=("none", "self"), mid_attention="self", heads=(4, 4), transformer_layers=(1, 1),
            norm_groups=8,
        )
    )  # fmt: skip


def seconds(network, x, repeats=5):
    """The median time of one call."""
    taken = []
    with no_grad():
        for _ in range(repeats + 1):
            since = time.perf_counter()
            network(x, np.full(len(x), 500))
            taken.append(time.perf_counter() - since)
    return float(np.median(taken[1:]))  # the first one warms up


ways = {
    "pixels": fresh[:16],
    "patches of 4 x 4": space_to_depth(fresh[:16], 4),
    "latents": there(fresh[:16]),
}
rows, work, took = [], {}, {}
for name, x in ways.items():
    unet = small_unet(x.shape[-1])
    with counting() as counts:
        unet(x[:1], np.array([500]))
    work[name], took[name] = sum(counts.values()), seconds(unet, x)
    rows.append([
        name, " × ".join(map(str, x.shape[1:])), f"{x[0].size:,}", f"{work[name] / 1e6:.1f} million",
        f"{1e3 * took[name] / len(x):.2f} ms",
    ])  # fmt: skip
table(["form", "shape", "numbers", "multiply-adds of one U-Net step", "time a picture"], rows)
print(f"pixels to latents: {work['pixels'] / work['latents']:.0f} times fewer multiply-adds, "
      f"{took['pixels'] / took['latents']:.0f} times less time")  # fmt: skip

# %% [markdown]
# (The time falls by less than the work: on small grids each call has little to do, and the calls themselves take time.)
#
# What counts for the work is the number of *positions*; the channels at the input matter in the first and the last
# layer only. So patches save almost as much as latents do! They are also exact, and nobody has to train them. For small
# pictures that is the better bargain, and it is why the model in the box does without a VAE. But patches leave as many
# numbers as there were. The network has to predict 48 at a position, every speck of fine detail among them, with the
# weights of the one U-Net; with patches of 8 x 8, as Stable Diffusion's VAE has them, it would be 192. The VAE removes
# what can be guessed, once, before diffusion starts: those who choose it buy fewer numbers with a loss.
#
# ### Stable Diffusion, counted
#
# A picture of 512 x 512 becomes latents of 64 x 64 x 4:

# %%
big = {
    "in_channels": 4, "out_channels": 4, "channels": (320, 640, 1280, 1280), "blocks": 2,
    "attention": ("cross", "cross", "cross", "none"), "mid_attention": "cross", "heads": (8,) * 4,
    "transformer_layers": (1,) * 4, "text_width": 768,
}  # fmt: skip
words = np.zeros((1, 77, 768), np.float32), None  # the caption: 77 tokens of 768 numbers
numbers = {"pixels": np.prod((512, 512, 3)), "latents": np.prod((64, 64, 4))}
print(f"{numbers['pixels']:,} numbers or {numbers['latents']:,}: "
      f"{numbers['pixels'] / numbers['latents']:.0f} times fewer")  # fmt: skip
on_latents = UNet(UNetConfig(**big), seed=None)  # no weights: they are not needed to count
on_pixels = UNet(UNetConfig(**{**big, "in_channels": 3, "out_channels": 3}), seed=None)
sd_vae = VAE(sd, seed=None)


def nothing(*shape):
    return np.broadcast_to(np.float32(0), shape)  # one zero, seen in this shape


with counting() as of_latents:
    on_latents(nothing(1, 64, 64, 4), np.array([500]), words)
with counting() as of_pixels:
    on_pixels(nothing(1, 512, 512, 3), np.array([500]), words)
with counting() as of_decoder:
    sd_vae.decode(nothing(1, 64, 64, 4))
with counting() as of_encoder:
    sd_vae.encode(nothing(1, 512, 512, 3))
kinds = list(of_latents)
table(
    ["10⁹ multiply-adds of one U-Net step", "on latents", "on pixels", "ratio"],
    [
        [kind, *(f"{c[kind] / 1e9:,.0f}" for c in (of_latents, of_pixels)),
         f"{of_pixels[kind] / of_latents[kind]:,.0f}"]
        for kind in kinds
    ],
)  # fmt: skip
figure(
    plotting.bars(
        kinds,
        {"on pixels, 512 × 512 × 3": [of_pixels[k] / 1e9 for k in kinds],
         "on latents, 64 × 64 × 4": [of_latents[k] / 1e9 for k in kinds]},
        "10⁹ multiply-adds (logarithmic)",
        title="One step of Stable Diffusion's U-Net",
        log=True,
    ),
    "Stable Diffusion 1's U-Net, on latents as it is and on pixels as nobody would run it.",
)  # fmt: skip

# %% [markdown]
# An eighth of the height and of the width is a 64th of the positions: so much is saved in convolutions and linear
# layers. Self-attention compares every position with every other, and saves the square of that, 4,096 times. (The
# table has a little less, because the attention to the 77 tokens of the caption is counted with it, and saves
# only 64. One would never put attention at full size; a U-Net on pixels would be built otherwise. But the 64 in
# the convolutions remain.)
#
# The price is the decoder, once for each picture:

# %%
step = sum(of_latents.values())
calls = 2 * 50  # 50 steps with guidance: two predictions each (notebook 8)
rows = [
    ["the U-Net, one prediction", step],
    [f"the U-Net, 50 steps with guidance ({calls} predictions)", calls * step],
    ["the decoder, once", sum(of_decoder.values())], ["the encoder, once (only to train)", sum(of_encoder.values())],
]  # fmt: skip
table(
    ["", "10⁹ multiply-adds", "in predictions of the U-Net"],
    [[name, f"{n / 1e9:,.0f}", f"{n / step:.1f}"] for name, n in rows],
)

# %% [markdown]
# ## Diffusion on our latents
#
# Now the whole of it, small: a U-Net learns to draw latents of pictures with one object, without captions, and the
# decoder makes pictures of what it draws. The same U-Net learns on pixels beside it, for about as many *seconds*: that
# is a small part of the steps, even with smaller batches. The latents are made by the encoder once, before training.
# Both networks are asked for $x_0$, and errors are weighted by time as in notebook 6.

# %%
singles, _ = shapes.batch(2000, np.random.default_rng(21), objects=1)
data = {
    "latents": np.concatenate([there(part) for part in np.split(singles, 20)]),
    "pixels": singles,
}


def x0_loss(unet, x0s, batch):
    """The loss of so many of them."""
    x0 = x0s[rng.integers(len(x0s), size=batch)]
    t = rng.integers(1, cosine.T + 1, len(x0))
    eps = rng.standard_normal(x0.shape, dtype=np.float32)
    x_t, target = diffusion.noised(x0, t, eps, cosine, "x0")
    weight = diffusion.x0_loss_weight(t, cosine, 10.0).astype(np.float32)
    return diffusion.weighted_mse(unet(x_t, t), target, weight)


unets, spent = {}, {}
for name, steps, batch in (("latents", 250, 16), ("pixels", 56, 8)):
    unets[name] = small_unet(data[name].shape[-1])
    since = time.perf_counter()
    learn(
        unets[name], lambda n=name, b=batch: [x0_loss(unets[n], data[n], b)], steps, rate=3e-3
    )
    spent[name] = [steps, time.perf_counter() - since]
table(
    ["trained on", "steps", "seconds", "milliseconds a step"],
    [[name, steps, f"{s:.0f}", f"{1e3 * s / steps:.0f}"] for name, (steps, s) in spent.items()],
)

# %%
drawn = {}
for name, count in (("latents", 64), ("pixels", 8)):
    x_T = rng.standard_normal((count, *data[name].shape[1:]), dtype=np.float32)
    levels = samplers.spaced_timesteps(cosine.T, 25)
    *_, end = samplers.ddim(unets[name], x_T, None, None, 1.0, levels, cosine, prediction="x0")
    drawn[name] = back(end.x_prev) if name == "latents" else end.x_prev
figure(
    strips(
        {
            "to learn from": singles[:8],
            "diffusion on\nlatents": drawn["latents"][:8],
            "diffusion on\npixels": drawn["pixels"],
        }
    ),
    "Pictures that were drawn after a few seconds of training, on latents and on pixels.",
)
read = shapes.read_scenes(drawn["latents"])
print(f"of {len(read)} pictures drawn on latents, {sum(len(r.objects) == 1 for r in read)} show one object, "
      f"{sum(len(r.objects) == 1 and r.unclean is None for r in read)} of them so cleanly that the checker has nothing to object")  # fmt: skip

# %% [markdown]
# Be fair to both. On latents, most pictures show one object with firm edges on an even background: the composition is
# learned. But shapes are doubtful, colours often lie between two of the six, and few pass the exact checker; for more,
# a few seconds are not enough. On pixels so few steps have taught the background, and soft spots at best. That says
# nothing against pixels, given the time. Latents make every step cheaper, and the decoder brings what it has learned
# before: how to draw an edge. For pictures of 32 x 32 one can do without (the model in the box does, with patches). For
# 512 x 512 it would be expensive.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n09_latent_space.py`.
#
# **9.1** The draw from a cloud. The encoder gives `mean` and `log_variance`; `eps` is standard noise.

# %%
from exercises import n09_latent_space as check


def drawn_from(mean, log_variance, eps):
    return ...


check.sample(drawn_from)

# %% [markdown]
# **9.2** What does each number of $z$ cost? The KL of $\mathcal{N}(\text{mean}, \text{variance})$ to
# $\mathcal{N}(0, 1)$; arrays in, an array out. (Mind that the variance comes in, not its logarithm.)


# %%
def cost(mean, variance):
    return ...


check.divergence(cost)

# %% [markdown]
# **9.3** Given latents `z` (pictures, height, width, channels) of many pictures: the scaling factor, one number.


# %%
def scaling_factor(z):
    return ...


check.factor(scaling_factor)

# %% [markdown]
# ## Where to go on
#
# The VAE is `minidiff/models/vae.py`; its structure and the names of its weights are those of Stable Diffusion's, so
# that those fit. `minidiff/pretrained/pipeline.py` puts text encoder, U-Net and VAE together. Patches are in
# `minidiff/text_to_image.py`.
