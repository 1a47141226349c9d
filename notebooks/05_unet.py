# %% [markdown]
# # 5. The U-Net
#
# The network of a diffusion model gets a noisy image and must answer with an image of the same size: the noise that
# is in it. To answer well it needs two things that are at odds. It must see the whole picture at once, to know *what*
# is there, and it must answer for every single pixel, so it must know *where*. The U-Net does both: it goes down to
# small images with many channels and comes up again, and what the way down would lose is handed across to the way up.
#
# **What you will learn**
#
# - the shapes of the features at every level, read off a run of the real network;
# - what halving loses and what it wins, and what the skips bring back, measured by training with and without them;
# - how the network is told the time $t$, and where the text comes in;
# - where its parameters are.
#
# You need notebook 3 (convolution) and notebook 4 (GroupNorm, SiLU, attention). That noisy images come from $x_t$ and
# $t$ is notebook 1.

# %%
from course import begin, close, figure, photograph, source, table

begin(5, "kernels")

# %%
import numpy as np

from drawing_05 import WithoutSkips, feature_maps, heat_map, trace, u_shape
from minidiff import Tensor, no_grad, ops, plotting
from minidiff.models.unet import UNet, UNetConfig, parameter_count

rng = np.random.default_rng(0)

# %% [markdown]
# ## The whole of it
#
# A `UNetConfig` names the sizes. This one has three **levels**, with 16, 32 and 48 channels, one **residual
# block** for each level on the way down (and one more on the way up; its parts are taken apart below), and
# attention to the text at the lowest level only:

# %%
config = UNetConfig(
    channels=(16, 32, 48),
    blocks=1,
    attention=("none", "none", "cross"),
    mid_attention="cross",
    text_width=24,
    norm_groups=8,
)
unet = UNet(config, seed=0)
print(f"{parameter_count(unet):,} parameters")

# %% [markdown]
# The network is a function $\varepsilon_\theta(x_t, t, \text{text})$: of the noisy image $x_t$ (B, H, W, 3), the time
# $t$, and the words of the caption as vectors (B, L, D). $\theta$ (theta) stands for all its parameters. Here is all
# that it does:

# %%
source(UNet.forward)

# %% [markdown]
# Read it from the middle: `skips` is a list. The way down (`down`) appends its results to it (where attention
# follows a residual block, only the attention's); the way up (`up`) takes them off its end again, so the last
# result of the way down meets the first block of the way up. (`run` and `_once_a_condition` save memory and work
# in special cases; here they pass on what they get.)
#
# To see the shapes, we run it on a photograph and note every block that is called. Nothing in this drawing is written
# down by hand:

# %%
photo = photograph(48)[None]  # (B, H, W, 3)
words = rng.standard_normal((1, 5, 24)).astype(np.float32)  # five words, as vectors of width 24
everyone = np.ones((1, 5), bool)  # the mask: no padding
with no_grad():
    calls = trace(unet, photo, 500, (words, everyone))
figure(
    u_shape(calls),
    "Each box is a block, the bold number its channels, the left edge tells height and width. "
    "res: residual block; attn: attention; down: half the size; up: twice the size; conv: "
    "first and last convolution. Dashed: skips. Below a box: what it is told besides the "
    "features. Lowest row: the middle block, at the size of the lowest level.",
)

# %% [markdown]
# Follow one way: 48 × 48 with 16 channels, 24 × 24 with 32, 12 × 12 with 48, and back. The lower levels have fewer
# positions and more channels: fewer places, and more to say about each.
#
# The table lists, for the blocks that a skip enters, how many channels come in. A skip lies *beside* the
# features, as further channels. (Blocks are numbered in the order of the run: `down_blocks.0` is the finest
# level, `up_blocks.0` the lowest.)

# %%
table(
    ["block", "channels in", "of these from the skip", "the skip comes from", "channels out"],
    [
        [f"`{c.path}`", c.wide, skip.features.shape[-1], f"`{skip.path}`", c.features.shape[-1]]
        for c in calls
        if c.skip_from is not None
        for skip in [calls[c.skip_from]]
    ],
)

# %% [markdown]
# ## Down: what, losing where
#
# Why go down at all? First look at what halving does to a picture. The library's convolution with stride 2 and a
# kernel that averages makes four pixels one; `upsample_nearest` makes one pixel four. Halve, double again, and
# compare:

# %%
average = np.zeros((2, 2, 3, 3), np.float32)  # (kh, kw, C_in, C_out): each colour by itself
average[:, :, range(3), range(3)] = 1 / 4
halved, doubled, lost = [photo], [photo], [0 * photo]
for _ in range(3):
    halved.append(ops.conv2d(halved[-1], average, stride=2).data)
    doubled.append(ops.upsample_nearest(halved[-1], factor=2 ** (len(halved) - 1)).data)
    lost.append(photo - doubled[-1])
sizes = [f"{len(h[0])} × {len(h[0])}" for h in halved]
figure(
    plotting.image_grid(
        np.concatenate([*doubled, *lost]),
        [
            *(f"seen at {s}" for s in sizes),
            "nothing is lost",
            *(f"lost at {s}" for s in sizes[1:]),
        ],
        columns=4,
    ),
    "Above: the photograph halved up to three times and doubled again. Below: the photograph "
    "minus that (grey is 0). The lower the level, the more is lost, and what is lost first "
    "are the edges: the exact *where*.",
)

# %% [markdown]
# Blocks of 8 × 8 pixels still tell that something skin-coloured is in the middle, above something dark, but not
# where an eye ends. What the lower row shows is what skips are for: they hand it to the way up, past the small
# levels.
#
# In the network halving and doubling are convolutions too, with learned weights:

# %%
from minidiff.models.unet import Downsample, Upsample

source(Downsample, Upsample)

# %% [markdown]
# The traced run holds the features of every block. Its weights were never trained, so these are random filters; but
# one sees the sizes, and how the picture comes back on the way up, where the skips join:

# %%
shown = [
    c
    for before, c in zip([None, *calls], calls[:-1], strict=False)
    if c.kind in ("conv", "down", "up") or before.kind == "up"
]
figure(
    feature_maps(
        [c.features[0, :, :, 0] for c in shown],
        [f"{c.kind}, {c.features.shape[1]} × {c.features.shape[2]}" for c in shown],
        columns=7,
    ),
    "The first channel of some blocks, in the order of the run, all drawn at one size. Down "
    "to 12 × 12 the photograph coarsens; each “up” is blurred, and the “res” after it, which "
    "gets a skip, is sharper.",
)

# %% [markdown]
# ### The receptive field
#
# What halving wins: after it, neighbours in the feature map are two pixels of the image apart, so a 3 × 3 kernel
# spans more of it. The part of the image that can influence one number of a feature map is its **receptive field**.
# We need no theory to find it: autograd tells which pixels a number depends on. So take only the convolutions of our
# U-Net's way down (all weights 1/9), and ask for the gradient of the middle number:


# %%
def seen_by_the_middle(strides):
    """|d(middle number) / d(pixel)| after 3 x 3 convolutions with these strides, (96, 96)."""
    kernel = np.full((3, 3, 1, 1), 1 / 9)
    image = Tensor(np.zeros((1, 96, 96, 1)), requires_grad=True)
    x = image
    for stride in strides:
        x = ops.conv2d(x, kernel, stride=stride, padding=1)
    middle = np.zeros(x.shape)
    middle[0, x.shape[1] // 2, x.shape[2] // 2, 0] = 1
    x.backward(middle)
    return np.abs(image.grad[0, :, :, 0])


parts = {  # name: strides of the convolutions that it adds
    "first convolution": [1],
    "residual block, level 0": [1, 1],
    "halving": [2],
    "residual block, level 1": [1, 1],
    "halving again": [2],
    "residual block, level 2": [1, 1],
}
strides, rows, fields = [], [], []
for name, added in parts.items():
    strides = strides + added
    fields.append(seen_by_the_middle(strides))
    plain = seen_by_the_middle([1] * len(strides))
    sides = [np.count_nonzero(field.any(axis=0)) for field in (fields[-1], plain)]
    rows.append([name, len(strides), *sides])
table(["after", "convolutions", "receptive field, its side", "without halving"], rows)

# %%
figure(
    feature_maps(
        [field[24:72, 24:72] for field in (*fields[1::2], plain)],
        ["end of level 0", "end of level 1", "end of level 2", "as many, without halving"],
        columns=4,
    ),
    "The pixels that one number in the middle depends on (white: strongly), in a picture of "
    "48 × 48. Two halvings make the field nearly twice as wide, and the lower convolutions "
    "run on a quarter and a sixteenth of the positions.",
)

# %% [markdown]
# This counts the convolutions alone. Attention looks at all positions at once, and GroupNorm's mean is taken over all
# of them.
#
# ## Telling the time
#
# The same $x_t$ calls for another answer at $t = 50$, where a speck is noise on a finished picture, than at $t =
# 900$, where nearly everything is noise. So the network must know $t$. One number from 1 to 1000 would be a poor
# input: for a layer that multiplies and adds, 500 is ten times as much as 50, and 500 and 501 are nearly the same.
# Instead, $t$ becomes a vector of waves, as positions in a text do ([Vaswani et al.
# 2017](https://arxiv.org/abs/1706.03762), 3.5):
#
# $$\operatorname{emb}(t) = \big(\cos(t f_0), \dots, \cos(t f_{D/2-1}),\ \sin(t f_0), \dots, \sin(t f_{D/2-1})\big)
#   \qquad f_i = 10000^{-i/(D/2)}$$
#
# - $D$ is the vector's length, $i$ counts its waves, and $f_i$ is the frequency of wave $i$;
# - $f_0 = 1$: this wave turns once in $2\pi \approx 6.3$ steps; the larger $i$, the slower the wave.

# %%
source(ops.timestep_embedding)

# %%
times = np.arange(1000)
waves = ops.timestep_embedding(times, 32)  # (1000, 32)
figure(
    heat_map(
        waves.T,
        "time t",
        "number in the vector",
        "The 32 numbers of the embedding against t: waves, from fast to nearly constant, "
        "twice over.",
    ),
    "The embedding of every t from 0 to 999, a column each. Upper half: cosines, lower half: "
    "sines, both from fast (top) to slow. Like the hands of a clock: the fast ones tell "
    "neighbours apart, the slow ones early from late.",
)

# %% [markdown]
# Are near times near? The dot product of the embeddings of two times $t$ and $t'$ tells how alike they are. Because
# $\cos a \cos b + \sin a \sin b = \cos(a-b)$, it is $\sum_i \cos\big((t - t') f_i\big)$: it depends on the distance
# of the two times only, and is $D/2$ for equal times.

# %%
figure(
    plotting.line_plot(
        {f"with t = {t}": (times, waves @ waves[t] / 16) for t in (250, 750)},
        "time t",
        "dot product / (D/2)",
    ),
    "Each time is most like itself. Up to a distance of about 500 the likeness falls, steeply at "
    "first, then slowly; beyond that it rises again, because waves of middle speed have come "
    "round. The quick ripples are the fast waves.",
)

# %% [markdown]
# Two linear layers with a SiLU between turn the waves into what the blocks need; this happens once for the whole
# network:

# %%
from minidiff.models.unet import TimeEmbedding

source(TimeEmbedding.forward)

# %% [markdown]
# (The network embeds $t - 1$, so that the times 1 to 1000 become 0 to 999, as in the figures. `sin_first` and `shift`
# are for the weights of other libraries.)
#
# ## The residual block
#
# Most of the U-Net is made of one part. With $e$ for the time's vector (after a SiLU), $W_e$ for the block's own
# matrix (`time_emb_proj`), and $x$ for the features:
#
# $$h = \operatorname{conv}_1\!\big(\operatorname{silu}(\operatorname{norm}_1 x)\big) + W_e\, e
#   \qquad y = x + \operatorname{conv}_2\!\big(\operatorname{silu}(\operatorname{norm}_2 h)\big)$$
#
# - $W_e\,e$ is one number a channel, added at every position. So the time can turn each channel up or down before the
#   next SiLU lets it through or not. Every residual block has its own $W_e$: the time is injected everywhere.
# - The input is added to the output (*residual*), so the block has to learn only what to change. If the number of
#   channels differs, $x$ goes through a 1 × 1 convolution first (`conv_shortcut`).
# - A skip, where there is one, lies beside $x$ (`beside`): the same as putting both one after the other, without the
#   copy.

# %%
from minidiff.models.unet import ResBlock

source(ResBlock.forward)

# %% [markdown]
# (With `scale_shift` the time multiplies as well as adds, [Dhariwal and Nichol
# 2021](https://arxiv.org/abs/2105.05233).) We check the equation against the block, with random numbers in place of
# its last convolution's zeros:

# %%
block = unet.mid_block.resnets[0]
x = rng.standard_normal((1, 12, 12, 48)).astype(np.float32)


def time_vector(t):
    return ops.silu(unet.time_embedding(np.array([t])))


with no_grad():
    assert close(block(Tensor(x), time_vector(500)).data, x)  # as it begins: the identity
    zeros = block.conv2.weight.data
    block.conv2.weight.data = 0.1 * rng.standard_normal(zeros.shape).astype(np.float32)
    shift = block.time_emb_proj(time_vector(500)).data  # W_e e, (1, C)
    # norm1 and norm2 hold their SiLU
    h = block.conv1(block.norm1(Tensor(x))).data + shift[:, None, None]
    y = x + block.conv2(block.norm2(Tensor(h))).data
    assert close(block(Tensor(x), time_vector(500)).data, y, 1e-5)
    now, later = (block(Tensor(x), time_vector(t)).data for t in (500, 900))
    block.conv2.weight.data = zeros
print(f"what the block adds, mean size:           {np.abs(now - x).mean():.3f}")
print(f"the same features at t = 900: changed by  {np.abs(later - now).mean():.3f}")

# %% [markdown]
# The first `assert` shows how the block begins: its last convolution starts at zero, so $y = x$. A deep network of
# such blocks is easier to train: at first, gradients pass through them unchanged.
#
# ## Where the text comes in
#
# By cross-attention (notebook 4), in the blocks marked *text* in the drawing. Each is a small transformer: the $H
# \cdot W$ positions become tokens; they look at each other, then at the words, and then think about what they saw
# (two linear layers). Each of the three is added to its input.

# %%
from minidiff.models.unet import TransformerBlock

source(TransformerBlock.forward)

# %% [markdown]
# It stands at the lower levels for two reasons. Scores are a matrix of positions by positions, so at 12 × 12 they are
# 256 times fewer than at 48 × 48. And words speak of objects and their places, which is what the lower levels deal
# in.
#
# A U-Net is not the only choice: newer models often cut the image into patches and use a transformer for all of it
# (DiT, [Peebles and Xie 2022](https://arxiv.org/abs/2212.09748)). The rest of the course would stay as it is.
#
# ## Where the parameters are
#
# Three networks: the one above, the one that `make demo` trains (it works on patches of 4 × 4 pixels, so 48 channels
# enter), and the default configuration.

# %%
from dataclasses import replace

from minidiff.config import load_config

demo = load_config("shapes")
demo_unet = replace(demo.unet, in_channels=48, out_channels=48, text_width=demo.text.width)


def part_of(path):
    """Which part of the network a parameter belongs to."""
    if "attentions" in path:
        return "attention"
    if "time_" in path:
        return "time"
    way = path.split("_")[0]  # conv, down, mid or up
    return {"conv": "first and last"}.get(way, f"convolutions, {way}")


shares, rows = {}, []
for name, each in {
    "this one": config,
    "the demo's": demo_unet,
    "default": UNetConfig(),
}.items():
    network = UNet(each, seed=None)  # no numbers: the shapes are enough
    total = parameter_count(network)
    shares[name] = {}
    for path, p in network.named_parameters():
        part = part_of(path)
        shares[name][part] = shares[name].get(part, 0) + 100 * np.prod(p.wanted_shape) / total
    rows.append([name, each.channels, f"{total:,}"])
table(["network", "channels of its levels", "parameters"], rows)
figure(
    plotting.stacked_shares(shares, "share of the parameters (%)"),
    "The convolutions of the way up have more than twice as many as those of the way down: "
    "there is one more block a level, and they are wider, because skips lie beside their "
    "features. Attention has 30 to 40 percent, though it is at the lower levels only.",
)

# %% [markdown]
# ## Up: recovering where
#
# The way up puts the detail back in its place, guided by what the bottom has found out. How much of that is due to
# the skips? An experiment: two U-Nets with four levels (32 × 32 down to 4 × 4) and the same initial weights learn to
# clean pictures of shapes: they get $x_t$ at one fixed time ($t = 200$ of 1000 on the cosine schedule, little noise),
# and the loss is the squared distance of their answer from $x_0$. In one of them the skips are replaced by zeros.
# Everything it knows about the picture must pass through the bottom, $4 \cdot 4$ positions of 48 channels: 768
# numbers for a picture of $32 \cdot 32 \cdot 3 = 3072$. This puts zeros in place of an up block's skips:

# %%
source(WithoutSkips)

# %% [markdown]
# (`AdamW` moves the weights against the gradient; notebook 6 is about training.)

# %%
from minidiff import schedule
from minidiff.data import shapes
from minidiff.diffusion import q_sample
from minidiff.optim import AdamW, learning_rate

four_levels = UNetConfig(
    channels=(16, 24, 32, 48),
    blocks=1,
    attention=("none",) * 4,
    mid_attention="none",
    heads=(1,) * 4,
    transformer_layers=(1,) * 4,
    norm_groups=8,
)
cosine, t = schedule.cosine(), 200


def noisy(x0, rng):
    return q_sample(x0, t, rng.standard_normal(x0.shape, np.float32), cosine).astype(np.float32)


def train_cleaner(network, steps=200):
    """Train the network to give x_0 from x_t; returns the losses."""
    optimizer = AdamW(dict(network.named_parameters()))
    pictures, losses = np.random.default_rng(1), []
    for step in range(1, steps + 1):
        x0, _ = shapes.batch(8, pictures)
        loss = ops.mse(network(noisy(x0, pictures), t), x0)
        loss.backward()
        grads = {}
        for name, p in optimizer.parameters.items():
            grads[name], p.grad = np.zeros_like(p.data) if p.grad is None else p.grad, None
        optimizer.step(learning_rate(step, steps, peak=4e-3, warmup=20), grads)
        losses.append(loss.item())
    return losses


with_skips, without_skips = UNet(four_levels, seed=0), UNet(four_levels, seed=0)
without_skips.up_blocks = [WithoutSkips(up) for up in without_skips.up_blocks]
losses = {
    name: train_cleaner(network)
    for name, network in {"with skips": with_skips, "without skips": without_skips}.items()
}
figure(
    plotting.loss_curve(
        {
            name: [{"step": i + 1, "loss": loss} for i, loss in enumerate(values)]
            for name, values in losses.items()
        }
    ),
    "The training losses, on a logarithmic axis: of each step (points), and their running median "
    "(lines). Both learn; the network without skips stays far behind.",
)

# %%
fresh = np.random.default_rng(2)
x0, _ = shapes.batch(64, fresh)
x_t = noisy(x0, fresh)
with no_grad():
    cleaned = {
        "with skips": with_skips(x_t, t).data,
        "without skips": without_skips(x_t, t).data,
    }
six = np.concatenate([np.clip(x_t, -1, 1)[:6], x0[:6], *(y[:6] for y in cleaned.values())])
figure(
    plotting.image_grid(
        six,
        [name for name in ("x_t", "x_0", *cleaned) for _ in range(6)],
        columns=6,
    ),
    "Pictures that neither has seen (x_t is cut off at ±1 to be shown). Without skips there is something dark about where each "
    "shape stands: what there is, roughly, comes through the bottom. Outlines and colours do "
    "not, in so short a training.",
)

# %% [markdown]
# In numbers, and apart for the pixels near an edge (one of the four neighbours has another colour) and all others:

# %%
edge = np.zeros(x0.shape[:3], bool)
for axis in (1, 2):
    for shift in (-1, 1):
        edge |= np.abs(x0 - np.roll(x0, shift, axis)).max(axis=-1) > 0.05
table(
    ["network", "mean squared error", "near edges", "elsewhere"],
    [
        [
            name,
            *(f"{((y - x0) ** 2)[where].mean():.4f}" for where in (..., edge, ~edge)),
        ]
        for name, y in cleaned.items()
    ],
)

# %%
near, far = (
    ((cleaned["without skips"] - x0) ** 2)[w].mean()
    - ((cleaned["with skips"] - x0) ** 2)[w].mean()
    for w in (edge, ~edge)
)
print(f"without skips the error is larger by {near:.2f} near edges, by {far:.2f} elsewhere")

# %% [markdown]
# What does not come through the bottom is mostly at the edges. Last, take the skips away from the *finished*
# network, those of one level at a time. It was trained with them, so this shows what it had come to expect from
# each:


# %%
def cleaned_without(level):
    """What the trained network answers when the skips of one level are zero."""
    ups = with_skips.up_blocks  # from the lowest level to level 0
    with_skips.up_blocks = [WithoutSkips(u) if 3 - i == level else u for i, u in enumerate(ups)]
    with no_grad():
        y = with_skips(x_t, t).data
    with_skips.up_blocks = ups
    return y


sizes = [f"{32 >> level} × {32 >> level}" for level in range(4)]
cut = [cleaned_without(level) for level in range(4)]
figure(
    plotting.image_grid(
        np.stack(cut, axis=1)[3:5].reshape(-1, 32, 32, 3),
        [f"without those at {size}" for size in sizes] * 2,
        columns=4,
    ),
    "Two of the pictures above (the fourth and the fifth), cleaned with the skips of one "
    "level cut.",
)
names = ["all there", *(f"without those at {size}" for size in sizes)]
answers = [cleaned["with skips"], *cut]
errors = [f"{((y - x0) ** 2).mean():.4f}" for y in answers]
table(["skips", "mean squared error"], list(zip(names, errors, strict=True)))

# %% [markdown]
# At this low noise nearly all of the answer stands in the noisy picture itself, and the finest skips carry it:
# without them the network is lost. The lower their level, the less the skips matter here; those at the bottom are
# hardly missed.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n05_unet.py`.
#
# **5.1** What shape (H, W, C) do the features have at a level (0 is the finest), for an image of height `H` and width
# `W` and a network with these `channels`?

# %%
from exercises import n05_unet as check


def features_at(H, W, channels, level):
    return ...


check.level_shapes(features_at)

# %% [markdown]
# **5.2** With one residual block a level on the way down there are two on the way up. How many channels go into each
# of the two, at a given level? The first gets what comes up from below (the middle block has as many channels as the
# lowest level), and the last skip of this level beside it. The second gets the first one's result, and the skip that
# came *first* at this level: the one that the level above sent down (at level 0, which has none above it, the
# result of the first convolution, with as many channels as level 0). (The drawing and the table above show an
# example.)


# %%
def inputs_of_up(channels, level):
    return ...  # two numbers


check.up_widths(inputs_of_up)

# %% [markdown]
# **5.3** The embedding of one time: the vector of `dim` numbers, cosines first, with frequencies from `period` (10000
# above).


# %%
def embed(t, dim, period):
    return ...


check.embedding(embed)

# %% [markdown]
# ## Where to go on
#
# The U-Net is `minidiff/models/unet.py`, its layers are `minidiff/nn.py`, the time's waves
# `minidiff/ops/timestep_embedding.py`. Next: [6. The training objective](06_training.ipynb): what exactly the network
# is asked, and why that works.
