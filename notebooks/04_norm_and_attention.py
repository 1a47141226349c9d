# %% [markdown]
# # 4. GroupNorm and attention
#
# A convolution sees a small window of the image, and its weights are the same everywhere. Two further parts make a
# U-Net out of convolutions: a *norm*, which keeps the numbers at one size however deep the network is, and
# *attention*, which lets every place of the image look at every other place, and at the words of the caption.
#
# **What you will learn**
#
# - what happens to numbers in a deep network, and how GroupNorm holds them;
# - attention by hand, on three tokens, and why the scores are divided by $\sqrt d$;
# - how an image asks a text: cross-attention, and the mask for words that are not there;
# - the *online softmax*: the same attention without ever holding its large matrix.
#
# You need notebook 2 (gradients and `gradcheck`) and notebook 3 (convolution).

# %%
from course import ROOT, begin, close, figure, source, table

begin(4, "kernels")

# %%
import numpy as np

from drawing_04 import equation, medians, memory_plot, peak_bytes, shared_statistics
from minidiff import backend, kernels, ops, plotting
from minidiff.gradcheck import gradcheck
from minidiff.nn import Conv2d

rng = np.random.default_rng(0)

# %% [markdown]
# ## Why normalise
#
# Every layer multiplies. If each makes its numbers three times smaller, ten of them make them 60,000 times
# smaller; if each makes them larger, they explode. Here are twelve convolutions, each followed by an activation
# (SiLU, from notebook 2): with weights as the library draws them, with weights four times as large, and both
# again with a norm before each activation.

# %%
layers = [Conv2d(32, 32).initialise(seed) for seed in range(12)]
image = rng.standard_normal((1, 16, 16, 32))  # (B, H, W, C)
one, zero = np.ones(32), np.zeros(32)  # gain and offset of the norm, as they begin


def deviations(factor, normalised):
    """The standard deviation of the features after every layer."""
    x, found = image, [image.std()]
    for layer in layers:
        x = ops.conv2d(x, factor * layer.weight, padding=1)
        x = ops.group_norm(x, one, zero, groups=8, silu=True) if normalised else ops.silu(x)
        found.append(x.data.std())
    return np.arange(len(found)), np.log10(found)


figure(
    plotting.line_plot(
        {
            "weights x 4": deviations(4, normalised=False),
            "weights x 1": deviations(1, normalised=False),
            "weights x 4, GroupNorm": deviations(4, normalised=True),
            "weights x 1, GroupNorm": deviations(1, normalised=True),
        },
        "layer",
        "standard deviation, power of ten",
        marker="o",
    ),
    "The size of the features, layer by layer, as a power of ten. Without a norm it runs "
    "away, up or down, by about the same factor each layer. With one it stays, and the size "
    "of the weights makes no difference: the two lines lie on each other. (They lie below 0, at a "
    "deviation under 1, because the SiLU comes after the norm.)",
)

# %% [markdown]
# Gradients take the same way back and are multiplied by such factors too. Without a norm the first layers would learn
# not at all, or in jumps.
#
# ## GroupNorm
#
# The remedy: take the mean off and divide by the standard deviation. The question is only, of which numbers. Features
# have an image $b$, a position $n = 1 \dots N$ (with $N = H \cdot W$), and a channel $c = 1 \dots C$:

# %%
figure(
    shared_statistics(),
    "Cells with the same number share one mean and one deviation. BatchNorm mixes the images "
    "of a batch; LayerNorm keeps to one position; GroupNorm takes all positions of a few "
    "channels of one image.",
)

# %% [markdown]
# **GroupNorm** ([Wu and He 2018](https://arxiv.org/abs/1803.08494)) splits the $C$ channels into $G$ groups of $C/G$
# neighbours. Write $S_{b,g}$ for the numbers of image $b$ in group $g$, at all positions; there are $N\,C/G$ of them.
# Then
#
# $$\mu_{b,g} = \frac{G}{N C}\sum_{S_{b,g}} x_{b,n,c} \qquad
#   \sigma^2_{b,g} = \frac{G}{N C}\sum_{S_{b,g}} \left(x_{b,n,c}-\mu_{b,g}\right)^2$$
#
# $$\hat x_{b,n,c} = \frac{x_{b,n,c}-\mu_{b,g}}{\sqrt{\sigma^2_{b,g}+\delta}}
#   \qquad y_{b,n,c} = \gamma_c\,\hat x_{b,n,c} + \beta_c$$
#
# - $\mu$ (mu) and $\sigma^2$ (sigma squared) are the group's mean and variance, $\hat x$ (x hat) the normalised
#   number;
# - $\delta$ (delta) is a small number, $10^{-5}$, against division by zero; the code calls it `eps`;
# - $\gamma_c$ (gamma) and $\beta_c$ (beta) are learned, one of each for every channel, so that the network may
#   choose another size and place where that serves it. This $\beta_c$ has nothing to do with the schedule's
#   $\beta_t$; the code calls the two `gain` and `offset`.
#
# The library's function takes the positions in one axis, (B, N, C); `wide` computes half-precision numbers
# (floats of two bytes) in single precision; `rstd` is $1/\sqrt{\sigma^2+\delta}$; `x2`, more channels, belongs to
# notebook 5.

# %%
from minidiff.ops.groupnorm import group_norm_backward, group_norm_forward

source(group_norm_forward)

# %% [markdown]
# Measure it: eight channels of very different size and place, in four groups.

# %%
sizes = np.array([0.1, 0.2, 5, 3, 1, 1, 20, 0.5])
places = np.array([0, 1, -3, 4, 0, 0, 50, 0])
x = rng.standard_normal((2, 16, 16, 8)) * sizes + places
y = ops.group_norm(x, np.ones(8), np.zeros(8), groups=4).data

rows = []
for g in range(4):
    before, after = x[0, ..., 2 * g : 2 * g + 2], y[0, ..., 2 * g : 2 * g + 2]
    numbers = np.round([before.mean(), before.std(), after.mean(), after.std()], 3) + 0.0
    rows.append([f"{2 * g + 1}, {2 * g + 2}", *numbers])
table(["channels", "mean before", "deviation before", "mean after", "deviation after"], rows)

# %% [markdown]
# Every group has mean 0 and deviation 1. *Inside* a group the channels keep their proportions: of two channels that
# share a group, the stronger one is still the stronger one. This is the middle way: one group for all channels
# would keep all proportions, one group for every channel would forget them all.
#
# ### Why not over the batch
#
# BatchNorm takes the statistics of all images together, so an image's result depends on its neighbours. In diffusion
# the neighbours are images at *other noise levels*, and when we sample, there may be one image only. A naive
# BatchNorm shows it: how much does image 1 change when image 2 becomes ten times stronger?


# %%
def naive_batch_norm(x):
    return (x - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))


def group_norm_4(x):
    return ops.group_norm(x, np.ones(8), np.zeros(8), groups=4).data


other = x.copy()
other[1] *= 10
table(
    ["norm", "largest change of image 1"],
    [
        [name, f"{np.abs(norm(x)[0] - norm(other)[0]).max():.3f}"]
        for name, norm in {"BatchNorm": naive_batch_norm, "GroupNorm": group_norm_4}.items()
    ],
)

# %% [markdown]
# ### Its gradient in one line
#
# Adding one and the same number to a whole group, or multiplying the whole group by one and the same positive
# number, does not change $\hat x$ (but for the tiny $\delta$). So the gradient must have nothing in these two
# directions. That is what its one line says: take the gradient of $\hat x$, called $g = \gamma\, dy$ (from here
# on $g$ is no longer the number of a group); take off its mean over the group, and its part along $\hat x$;
# divide by the deviation:
#
# $$dx = \frac{1}{\sqrt{\sigma^2+\delta}}
#   \Big(g - \operatorname{mean}(g) - \hat x\, \operatorname{mean}(g\,\hat x)\Big)$$

# %%
source(group_norm_backward)

# %% [markdown]
# Notebook 2's `gradcheck` compares it with what the function does when its inputs move a little; then we look whether
# the two directions are really gone.

# %%
from minidiff.tensor import Tensor

small = rng.standard_normal((2, 3, 3, 6))
gain, offset = rng.standard_normal((2, 6))
error = gradcheck(lambda x, a, b: ops.group_norm(x, a, b, groups=3), small, gain, offset)

leaf = Tensor(small, requires_grad=True)
ops.group_norm(leaf, gain, offset, groups=3).backward(rng.standard_normal(small.shape))
group = np.s_[0, ..., 0:2]  # the first image's first group
dx, inside = leaf.grad[group], small[group] - small[group].mean()
print(f"gradcheck: error {error:.0e}")
print(f"largest entry of dx     {np.abs(dx).max():9.6f}")
print(f"sum of dx               {dx.sum():9.6f}")
print(f"sum of dx (x - mean)    {(dx * inside).sum():9.6f}   (not exactly 0, because of delta)")

# %% [markdown]
# ### SiLU behind it
#
# A convolution only adds and scales, and a norm does little more. The bend comes from an activation. Diffusion
# networks use **SiLU** ([Elfwing et al. 2017](https://arxiv.org/abs/1702.03118)): $\operatorname{silu}(x) =
# x\,\sigma(x)$, where $\sigma(x) = 1/(1+e^{-x})$ (here $\sigma$ is the sigmoid) rises from 0 to 1. Far to the
# right it is nearly $x$, far to the left nearly 0, and in between smooth.

# %%
from minidiff.ops.silu import silu_forward

source(silu_forward)
line = np.linspace(-6, 4, 200)
figure(
    plotting.line_plot(
        {"silu(x)": (line, silu_forward(line)), "max(x, 0)": (line, np.maximum(line, 0))},
        "x",
        "y",
    ),
    "SiLU beside the older rectifier max(x, 0). SiLU dips below zero and has no corner.",
)

# %% [markdown]
# In the residual blocks of the U-Net (notebook 5) every norm is followed by a SiLU. The compiled kernel does both
# in one pass, because the numbers it has just normalised are still in the processor's cache; `silu=True` asks for
# that. The result is the same, the trip to memory is saved:

# %%
features = rng.standard_normal((8, 64, 64, 64)).astype(np.float32)
ones, zeros = np.ones(64, np.float32), np.zeros(64, np.float32)


def fused():
    return ops.group_norm(features, ones, zeros, groups=8, silu=True).data


def one_after_the_other():
    return ops.silu(ops.group_norm(features, ones, zeros, groups=8)).data


assert close(fused(), one_after_the_other(), 1e-5)
if "cpu" in backend.MODULES:
    times = medians({"norm, then SiLU": one_after_the_other, "both in one": fused})
    table(
        ["compiled kernels", "ms (median)"],
        [[name, f"{1e3 * s:.2f}"] for name, s in times.items()],
    )

# %% [markdown]
# ## Attention by hand
#
# A convolution mixes each place with its neighbours, by weights that depend on *where* they lie. **Attention** mixes
# each place with all others, by weights that depend on *what* is there. Both are weighted sums; one is local with
# fixed weights, the other global with weights computed from the content.
#
# Everything that attention handles is a list of vectors, called **tokens**: a word is a token, and so is each
# position of a feature map. Every token makes three vectors out of itself, each by a learned matrix:
#
# - a **query** $q$: what am I looking for?
# - a **key** $k$: what do I have to offer?
# - a **value** $v$: what do I tell whoever is interested?
#
# Query $i$ is compared with every key $j$ by their dot product. Softmax turns these scores into weights that are
# positive and add up to 1. The answer is the average of the values, with these weights ([Vaswani et al.
# 2017](https://arxiv.org/abs/1706.03762), equation 1):
#
# $$\operatorname{attention}(Q,K,V) = \operatorname{softmax}\!\left(\frac{Q K^\top}{\sqrt d}\right) V
#   \qquad \operatorname{softmax}(s)_j = \frac{e^{s_j}}{\sum_{j'} e^{s_{j'}}}$$
#
# - $Q$ has one row for each query, $L_q$ rows of $d$ numbers; $K$ and $V$ have one row for each key, $L_k$ of
#   them;
# - $Q K^\top$ ($L_q \times L_k$) holds all dot products; $d$ is the width of a query and of a key. Why its root,
#   we will see; $s$ is one row of scores, those of one query, and $j'$ runs over all keys.
#
# Three tokens, two numbers each:

# %%
from minidiff.ops.attention import attention_forward, attention_scores, join_heads, split_heads
from minidiff.ops.softmax import softmax_backward, softmax_forward

Q = np.array([[2.0, 0], [0, 2], [1, 1]])
K = np.array([[1.0, 0], [0, 1], [1, 1]])
V = np.array([[10.0, 0], [0, 10], [5, 5]])

scores = attention_scores(
    Q[None], K[None], heads=1, scale=1 / np.sqrt(2), bias=None, causal=False
)
scores = scores[0, 0]  # one image, one head
weights = softmax_forward(scores)
result = weights @ V
assert close(result, ops.attention(Q[None], K[None], V[None]).data[0])

queries, keys = ["query 1", "query 2", "query 3"], ["key 1", "key 2", "key 3"]
figure(
    equation(
        [("Q", Q, queries, []), "·", ("K transposed", K.T, [], keys), "/ √2  =",
         ("scores", scores, queries, keys)],
        "Q times K transposed over root 2 gives a 3 by 3 matrix of scores, with numbers.",
    ),
    "Each score is a row of Q times a column of K transposed, over 1.41: for query 1 and key "
    "3, (2 · 1 + 0 · 1) / 1.41 = 1.41. The darker a cell, the larger its number within its matrix.",
)  # fmt: skip
figure(
    equation(
        [("weights = softmax of each row", weights, queries, keys), "·", ("V", V, [], []), "=",
         ("result", result, queries, [])],
        "The softmax of the scores times V gives a 3 by 2 matrix of results, with numbers.",
    ),
    "Query 1 matches keys 1 and 3 equally well, so its result lies half-way between their "
    "values (10, 0) and (5, 5), drawn a little towards (0, 10): every weight is larger than "
    "0.",
)  # fmt: skip

# %% [markdown]
# The numbers of the first row, by hand: $e^{1.41} = 4.11$ and $e^0 = 1$, so the weights are $4.11 / (4.11 + 1 + 4.11)
# = 0.446$, $0.108$ and $0.446$. The library's reference does these three steps for all images and heads at once:

# %%
source(attention_scores, attention_forward)

# %% [markdown]
# `top` is the row's maximum, taken off before the exponential (exercise 4.1 is about that). `lse` is kept for the
# backward pass: with it the weights can be computed again in place of being stored. `bias` is added to the scores
# (the mask below uses it), `causal` hides the tokens that come later (for text, notebook 8), and heads follow
# below.
#
# One thing attention does *not* know is the order of the keys. Shuffle keys and values alike, and nothing changes:

# %%
shuffled = rng.permutation(3)
assert close(ops.attention(Q[None], K[None][:, shuffled], V[None][:, shuffled]).data[0], result)

# %% [markdown]
# For the places of an image that does little harm: the convolutions before and after keep neighbours together. For
# words it matters ("red circle above blue square" is not "blue circle above red square"); the text encoder, the
# network that makes vectors of words (notebook 8), therefore adds a vector for the place to every word.
#
# ### Why the root of d
#
# Take a query and a key of $d$ independent numbers of mean 0 and variance 1. Their dot product is a sum of $d$
# products, each of variance 1, so its variance is $d$. Wide vectors make large scores, large scores make a
# softmax that gives nearly everything to one key, and such a softmax cannot learn: its gradient is nearly 0.
# Dividing by $\sqrt d$ brings the variance back to 1.

# %%
rows = []
for d in (4, 16, 64, 256, 1024):
    q, k = rng.standard_normal((400, 1, d)), rng.standard_normal((400, 16, d))
    dots = (q * k).sum(axis=-1)  # 400 queries, each with 16 keys of its own
    scaled = dots / np.sqrt(d)
    dp = rng.standard_normal(dots.shape)
    row = [d, f"{dots.var():.1f}", f"{scaled.var():.2f}"]
    for s in (dots, scaled):
        p = softmax_forward(s)
        row += [f"{p.max(axis=-1).mean():.2f}", f"{np.abs(softmax_backward(dp, p)).mean():.4f}"]
    rows.append(row)
table(
    ["d", "variance of q·k", "of q·k / √d", "largest weight of 16", "gradient",
     "with √d: largest weight", "with √d: gradient"],
    rows,
)  # fmt: skip

# %% [markdown]
# The variance is $d$, as computed. Without the root the largest of 16 weights creeps towards 1 as $d$ grows, and the
# gradient that gets through the softmax dies away (its mean size, for a random gradient coming from above). With the
# root both stay where they are.

# %%
q, k = rng.standard_normal(256), rng.standard_normal((8, 256))
figure(
    plotting.bars(
        [f"key {i + 1}" for i in range(8)],
        {
            "softmax(q·k)": softmax_forward(k @ q).round(3),
            "softmax(q·k / √d)": softmax_forward(k @ q / 16).round(3),
        },
        "weight",
    ),
    "The same query and eight keys at d = 256. Without the root one key gets everything, to "
    "three digits; with it, the query listens to all and prefers some.",
)

# %% [markdown]
# ### Heads
#
# One query gives one set of weights. But a place may need to look at two things at once: at the object it belongs to,
# and at the word that tells its colour. So the $D$ channels are cut into **heads** of $d = D / \text{heads}$
# channels; every head attends by itself, and the results are laid side by side. It costs no more products than one
# wide head.

# %%
source(split_heads, join_heads)

# %%
q, k, v = rng.standard_normal((3, 1, 5, 8))  # (B, L, D) each
both = ops.attention(q, k, v, heads=2).data
first, second = (
    ops.attention(q[..., h], k[..., h], v[..., h]).data for h in (np.s_[:4], np.s_[4:])
)
assert close(both, np.concatenate([first, second], axis=-1))

# %% [markdown]
# ## The image asks the text: cross-attention
#
# Where queries, keys and values come from the same tokens, it is **self-attention**: places of the image look at each
# other. In **cross-attention** the queries come from the image, keys and values from the words of the caption:
#
# $$\operatorname{softmax}\!\left(\frac{Q_{\text{image}}\,K_{\text{text}}^\top}{\sqrt d}\right) V_{\text{text}}$$
#
# Every place of the noisy image asks: which of these words concern me, and what do they say I should look like? This
# is the only way by which the text enters the network. It is not an instruction to draw; it narrows down which
# image can lie beneath the noise at this place.
#
# Here is the whole layer of the U-Net, self and cross in one; `tokens` are the words' vectors. `to_q`, `to_k` and
# `to_v` are the three learned matrices, `to_out[0]` a fourth, which mixes the heads; `residual` is added to the
# result; the `mask` comes in a moment. (A `Text` remembers its keys and values: the words stay the same over all
# steps of drawing a picture.)

# %%
from minidiff.models.unet import Attention

source(Attention.forward, Attention.keys_and_values)

# %% [markdown]
# ### A small example
#
# We build one that can be followed. The image is a *grey* picture of a circle above a square: the places know their
# form, not their colour. The caption is "a red circle above a blue square".
#
# A trained network learns its queries, keys and values; here we set them by hand. Every place gets three features:
# how much it belongs to something round, to something with corners, or to neither. They are its query.

# %%
from minidiff.data.shapes import Object, Scene, render

BACK, CORNERS, ROUND = np.eye(3)  # the three features
circle = Object("red", "circle", "large", x=14, y=9, radius=5)
square = Object("blue", "square", "large", x=19, y=22, radius=5)


def covered(thing):
    """How much of each pixel the object covers, (32, 32), from 0 to 1."""
    empty, drawn = render([Scene(()), Scene((thing,))]).astype(float)
    away = np.abs(drawn - empty).max(axis=-1)
    return away / away.max()


inside_circle, inside_square = covered(circle), covered(square)
outside = 1 - inside_circle - inside_square
grey = np.repeat((0.84 * outside - 0.1 * (1 - outside))[..., None], 3, axis=-1)
asked = (
    inside_circle[..., None] * ROUND
    + inside_square[..., None] * CORNERS
    + outside[..., None] * BACK
)  # (32, 32, 3)
sharpness = 9  # how decided the answers will be
pixels = sharpness * asked.reshape(1, 32 * 32, 3)  # (B, Lq, d): a query for every pixel

# %% [markdown]
# A word's key says which of the three features it speaks of, its value what it tells: a colour. In a real text
# encoder "circle" has looked at the words before it, so its own vector already knows that it is red; we do the same
# and give it that colour.

# %%
RED, BLUE, PALE = np.array([0.8, -0.7, -0.7]), np.array([-0.7, -0.7, 0.75]), np.full(3, 0.84)
caption = [  # a word, its key, its value
    ("<start>", BACK, PALE),
    ("a", 0 * BACK, 0 * PALE),
    ("red", 0.7 * ROUND, RED),
    ("circle", ROUND, RED),
    ("above", 0 * BACK, 0 * PALE),
    ("a", 0 * BACK, 0 * PALE),
    ("blue", 0.7 * CORNERS, BLUE),
    ("square", CORNERS, BLUE),
]
words = [word for word, _, _ in caption]
word_keys = np.stack([key for _, key, _ in caption])[None]  # (B, Lk, d)
word_values = np.stack([value for _, _, value in caption])[None]

# %% [markdown]
# Now 1024 pixels ask eight words:

# %%
told = ops.attention(pixels, word_keys, word_values).data.reshape(32, 32, 3)
scores = attention_scores(pixels, word_keys, 1, 1 / np.sqrt(3), bias=None, causal=False)
weights = softmax_forward(scores)[0, 0].reshape(32, 32, len(words))
assert close(told, weights @ word_values[0])

maps = 2 * weights.transpose(2, 0, 1)[..., None].repeat(3, axis=-1) - 1
figure(
    plotting.image_grid(
        np.concatenate([grey[None], maps, told[None]]),
        ["the image", *(f"weight of “{word}”" for word in words), "what each pixel is told"],
        columns=5,
    ),
    "The weights that the pixels give to each word: white is 1, black is 0. The circle's "
    "pixels listen to “circle” and “red”, the square's to “square” and “blue”, the rest to "
    "the start token. Last: the weighted mean of the values.",
)  # fmt: skip

# %% [markdown]
# Exchange the two colours among the values, and the same image is told something else. The queries do not change,
# nor do the weights:

# %%
swapped = word_values.copy()
swapped[0, [2, 3]], swapped[0, [6, 7]] = BLUE, RED
figure(
    plotting.image_grid(
        np.stack([told, ops.attention(pixels, word_keys, swapped).data.reshape(32, 32, 3)]),
        ["a red circle above a blue square", "a blue circle above a red square"],
    ),
    "One image, two captions. The forms come from the queries, the colours from the values.",
)

# %% [markdown]
# ### The mask for words that are not there
#
# Captions differ in length, but a batch needs one length, so short captions are filled up with padding. Padding must
# not be heard. A score of 0 does not achieve that: $e^0 = 1$ is a weight like any other. The score must be $-\infty$,
# since $e^{-\infty} = 0$. The library's `attention` takes a `mask` of booleans, False for padding, and adds $-\infty$
# to those scores. Fill our eight words up to 16, 32 and 64 and see what the middle of the circle is told about red:

# %%
middle = np.s_[9, 14]
rows = []
for length in (8, 16, 32, 64):
    more = ((0, 0), (0, length - len(words)), (0, 0))
    padded = np.pad(word_keys, more), np.pad(word_values, more)
    seen = np.arange(length)[None] < len(words)  # (B, Lk)
    unmasked = ops.attention(pixels, *padded).data.reshape(32, 32, 3)
    masked = ops.attention(pixels, *padded, mask=seen).data.reshape(32, 32, 3)
    assert close(masked, told)
    rows.append([length, f"{unmasked[middle][0]:.3f}", f"{masked[middle][0]:.3f}"])
table(["length with padding", "red, without the mask", "red, with the mask"], rows)

# %% [markdown]
# Without the mask the answer pales as the padding grows: the picture would depend on how long the *other* captions of
# the batch are. With it, nothing changes at all.
#
# ## The online softmax
#
# The scores are a matrix of $L_q \times L_k$ numbers. A feature map of $64 \times 64$ positions has 4096 tokens, and
# its scores are 16.8 million numbers, in every head of every image: far more than the queries, keys and values
# themselves. Must they all be there at once?
#
# The softmax seems to say so: to divide by the sum of a row's exponentials, one must have seen the whole row. And one
# must know the row's maximum first, or the exponentials overflow. The way out ([Milakov and Gimelshein
# 2018](https://arxiv.org/abs/1805.02867)) is to keep two running numbers and one running vector for every query,
# and to correct them when a new block of keys arrives. With $s_j$ the scores of the new keys, $v_j$ their values,
# and a prime for what is kept afterwards:
#
# $$m' = \max\!\big(m,\ \max_j s_j\big) \qquad
#   l' = l\,e^{m-m'} + \sum_j e^{s_j-m'} \qquad
#   o' = o\,e^{m-m'} + \sum_j e^{s_j-m'}\,v_j$$
#
# - $m$ is the largest score seen so far; it begins at $-\infty$;
# - $l$ is the sum of $e^{s-m}$ over all keys seen so far;
# - $o$, a vector, is the same sum with the values: the result, before it is divided.
#
# If a new key has a higher score, $m$ rises, and the factor $e^{m-m'} < 1$ corrects what was summed with the old
# maximum. At the end the result is $o / l$. Watch it on one query, six keys, two at a time, with values that are
# single numbers:

# %%
row = np.array([1.0, 3.0, 2.0, 5.0, 0.0, 4.0])  # the scores
values = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
m, total, o = -np.inf, 0.0, 0.0  # total is the l of the equations
rows = [["(start)", "", m, total, o, ""]]
for j in range(0, 6, 2):
    s, v = row[j : j + 2], values[j : j + 2]
    higher = max(m, s.max())
    shrink, p = np.exp(m - higher), np.exp(s - higher)
    m, total, o = higher, total * shrink + p.sum(), o * shrink + p @ v
    numbers = [shrink, m, total, o, o / total]
    rows.append([f"{s[0]:.0f}, {s[1]:.0f}", *(f"{number:.3f}" for number in numbers)])
table(["scores of the block", "factor for the old", "m", "l", "o", "o / l"], rows)
print(f"all at once: {softmax_forward(row) @ values:.3f}")

# %% [markdown]
# At the first block the factor is $e^{-\infty} = 0$: nothing had been summed yet. At the last the maximum stayed
# 5, so the factor is 1.
#
# Now for all queries, on matrices; this is a teaching version for one head:


# %%
def blockwise_attention(q, k, v, block=64):
    """softmax(q k^T / sqrt(d)) v for q (Lq, d), k (Lk, d), v (Lk, d), over blocks of keys."""
    m = np.full((len(q), 1), -np.inf, q.dtype)
    total = np.zeros((len(q), 1), q.dtype)
    o = np.zeros((len(q), v.shape[1]), q.dtype)
    q = q * q.dtype.type(1 / np.sqrt(q.shape[1]))
    for j in range(0, len(k), block):
        s = q @ k[j : j + block].T  # (Lq, block): all that is ever held of the scores
        higher = np.maximum(m, s.max(axis=1, keepdims=True))
        shrink, p = np.exp(m - higher), np.exp(s - higher)
        m, total, o = (
            higher,
            total * shrink + p.sum(axis=1, keepdims=True),
            o * shrink + p @ v[j : j + block],
        )
    return o / total


q, k, v = rng.standard_normal((3, 300, 32))
assert close(blockwise_attention(q, k, v), ops.attention(q[None], k[None], v[None]).data[0])

# %% [markdown]
# Not an approximation: the results agree to rounding, also where the last block is not full (300 is not a multiple of
# 64).
#
# ### What it saves
#
# Measure the memory: Python's `tracemalloc` counts the bytes of all arrays that NumPy makes during a call.


# %%
def tokens(L):
    return rng.standard_normal((3, L, 32)).astype(np.float32)


def whole(q, k, v):
    with kernels("reference"):
        return ops.attention(q[None], k[None], v[None]).data[0]


lengths = [256, 512, 1024, 2048, 4096]
memory = {"whole matrix": [], "blocks of 64 keys": []}
for L in lengths:
    q, k, v = tokens(L)
    memory["whole matrix"].append(peak_bytes(whole, q, k, v) / 2**20)
    memory["blocks of 64 keys"].append(peak_bytes(blockwise_attention, q, k, v) / 2**20)
figure(
    memory_plot(lengths, memory),
    "The most memory that attention held at once, for L queries and L keys (1 MiB is 2^20 bytes). "
    "Each step to the right is twice as many tokens, each line across ten times the memory. "
    "From step to step the whole matrix takes four times the memory, the blocks take twice.",
)
table(
    ["L", "one matrix of scores, L × L × 4 bytes", *(f"{name}, measured" for name in memory)],
    [
        [L, f"{L * L * 4 / 2**20:.2f} MiB", *(f"{mb[i]:.2f} MiB" for mb in memory.values())]
        for i, L in enumerate(lengths)
    ],
)  # fmt: skip

# %% [markdown]
# At its peak the reference holds three such matrices: the scores, the scores with their maximum taken off, and the
# exponentials.
#
# The compiled kernel goes one step further ([Dao et al. 2022](https://arxiv.org/abs/2205.14135)): it takes the
# queries by blocks too, so that a block of scores is small enough for the processor's cache and never travels to main
# memory. That is worth time as well as memory. The head of its source states the same three updates. `S` are the
# scores and `P` their exponentials; `rows of S` is each row's maximum, `rows of P` each row's sum:

# %%
kernel_source = (ROOT / "csrc" / "cpu" / "attention.cpp").read_text().splitlines()
print("\n".join(line[2:40].rstrip() for line in kernel_source[2:8]))


# %%
def compiled(q, k, v):
    with kernels("cpu"):
        return ops.attention(q[None], k[None], v[None]).data[0]


if "cpu" in backend.MODULES:
    rows = []
    for L in (256, 1024, 4096):
        q, k, v = tokens(L)
        assert close(compiled(q, k, v), whole(q, k, v), 1e-4)
        calls = {"whole": whole, "blocks": blockwise_attention, "compiled": compiled}
        seconds = medians(calls, q, k, v, repeats=5)
        rows.append([L, *(f"{1e3 * s:.2f}" for s in seconds.values())])
    table(["L", "whole matrix, NumPy (ms, median)", "blocks, NumPy", "blocks, compiled"], rows)

# %% [markdown]
# In NumPy, blocks save memory, not time: every step still writes its small arrays out and reads them back. The
# compiled kernel saves both.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in
# `solutions/n04_norm_and_attention.py`.
#
# **4.1** Write a softmax over the last axis of `x` (any number of rows) that survives scores of 1000 and of -1000.
# (What can be taken off all scores of a row without changing their weights?)

# %%
from exercises import n04_norm_and_attention as check


def safe_softmax(x):
    return ...


check.safe(safe_softmax)

# %% [markdown]
# **4.2** Two workers share the keys of the same queries: one has seen the first half and holds $(m_a, l_a, o_a)$,
# the other the second half and holds $(m_b, l_b, o_b)$. Merge them into the $(m, l, o)$ of all keys. ($m$ and $l$
# are arrays $(L_q, 1)$, $o$ is $(L_q, d)$.)


# %%
def merge(a, b):  # a is (m_a, l_a, o_a), b is (m_b, l_b, o_b)
    return ...


check.merging(merge)

# %% [markdown]
# **4.3** Hide the padding: given `scores` $(L_q, L_k)$ and a `mask` $(L_k)$ of booleans, True for words that may be
# seen, return the scores that go into the softmax.


# %%
def hide(scores, mask):
    return ...


check.hiding(hide)

# %% [markdown]
# ## Where to go on
#
# GroupNorm is `minidiff/ops/groupnorm.py`, SiLU `minidiff/ops/silu.py`, attention `minidiff/ops/attention.py` with
# `minidiff/ops/softmax.py`; the compiled kernels are `csrc/cpu/groupnorm.cpp` and `csrc/cpu/attention.cpp`. Next: [5.
# The U-Net](05_unet.ipynb), in which convolutions, norms and attention come together.
