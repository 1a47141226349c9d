# %% [markdown]
# # 6. The training objective
#
# The forward process hides an image in noise. The network is shown the result and asked one question: *which noise was
# added?* This notebook shows why that question is enough, what the best possible answer to it is, and how a network
# learns to give it. At its end a small model is trained before your eyes.
#
# **What you will learn**
#
# - the loss of a diffusion model, and the few lines that compute it;
# - what a network that cannot know the answer does: it gives the *average* of all answers that are possible;
# - why noise, image and a mixture of the two, called $v$, are three ways to ask the same question, and how they differ;
# - why a blurry prediction can be the right one;
# - how the loss depends on the noise level, and how AdamW and a moving average of the weights turn it into a model.
#
# You need notebook 1 (noise, $\bar\alpha_t$), notebook 2 (`backward`) and notebook 5 (the network
# $\varepsilon_\theta$).

# %%
from course import begin, close, figure, source, table

begin(6, "kernels", "model")

# %%
import numpy as np

from drawing_06 import fitted, panels, score_arrows
from minidiff import diffusion, nn, optim, plotting, schedule
from minidiff.data import shapes
from minidiff.diffusion import eps_from_x0, eps_loss, predict_x0, q_sample
from minidiff.tensor import no_grad
from minidiff.train import load_model

rng = np.random.default_rng(0)
# the trained model that comes with the library: "the model in the box"
model, config = load_model()
T, alpha_bar = model.schedule.T, model.schedule.alpha_bar

# %% [markdown]
# ## The loss
#
# Take a clean image $x_0$ from the training set. Draw a time $t$, every $t$ from 1 to $T$ with the same probability.
# Draw noise $\varepsilon$. Mix them to $x_t$ with the jump of notebook 1, and let the network guess the noise:
#
# $$L = \mathbb{E}_{t,\,x_0,\,\varepsilon}\left[\ \left\| \varepsilon -
# \varepsilon_\theta\big(\underbrace{\sqrt{\bar\alpha_t}\,x_0 +
# \sqrt{1-\bar\alpha_t}\,\varepsilon}_{x_t},\ t\big) \right\|^2\ \right]$$
#
# - $\varepsilon_\theta$ (epsilon theta) is the network; $\theta$ stands for its weights. It sees $x_t$ and $t$, and for
#   text to image the caption too, which we write as a third argument `cond`.
# - $\|\cdot\|^2$ is the sum of the squares of all numbers. The code takes their mean instead: the same up to a
#   constant factor.
# - $\mathbb{E}$ is the expectation, that is the average over all times, images and noises. Training takes the average
#   over a small batch, a new one at every step.
#
# This is the simplified objective of [DDPM](https://arxiv.org/abs/2006.11239), equation 14:

# %%
source(eps_loss)

# %% [markdown]
# Here is one question and the trained model's answer. The model works on patches of 4 x 4 pixels as channels; `encode`
# and `decode` go there and back, and nothing else happens in them.

# %%
caption = "a red circle above a blue square"


def as_cond(captions):
    """The captions as the network takes them (notebook 8 shows how they are made)."""
    with no_grad():
        tokens, mask = model.condition(captions)
    return tokens.data, mask


circle = shapes.Object("red", "circle", "large", x=13.5, y=8.5, radius=4.9)
square = shapes.Object("blue", "square", "large", x=15.5, y=22, radius=4.8)
picture = shapes.render([shapes.Scene((circle, square))])  # (1, 32, 32, 3)

x0 = model.encode(picture)
eps = rng.standard_normal(x0.shape, dtype=np.float32)
t = np.array([400])
x_t = q_sample(x0, t, eps, model.schedule)
answer = model(x_t, t, as_cond([caption]))
seen = [x0, eps, x_t, answer, eps - answer]
figure(
    plotting.image_grid(
        fitted(np.concatenate([model.decode(x) for x in seen])),
        ["the image x_0", "the noise eps", "x_t: all the network sees", "its answer eps_theta",
         "what is wrong with it"],
        columns=5,
    ),
    "One question at t = 400. Where numbers go beyond ±1, the picture is scaled down to be "
    "shown. The answer is nearly the noise; its errors lie along the edges of the objects.",
)  # fmt: skip

# %%
loss = eps_loss(model, x0, t, eps, as_cond([caption]), model.schedule)
print(
    f"loss of this answer: {loss.item():.4f}.  "
    f"Of the answer 'there is no noise': {np.mean(eps**2):.4f}"
)
assert close(loss.item(), np.mean((eps - answer) ** 2), 1e-5)

# %% [markdown]
# ## The best possible answer
#
# The network cannot *know* the noise: the same $x_t$ may come from one image with one noise, or from another image with
# another. So what does the loss drive it to say? Suppose that, once this $x_t$ is seen, the noise can be
# $\varepsilon^{(1)}$, $\varepsilon^{(2)}$, ..., with probabilities $p_1, p_2, \dots$, and the network answers
# $c$. Its expected loss is
#
# $$\sum_k p_k\,(\varepsilon^{(k)} - c)^2
# = (c - \bar\varepsilon)^2 + \sum_k p_k\,(\varepsilon^{(k)} - \bar\varepsilon)^2
# \qquad\text{with}\quad \bar\varepsilon = \sum_k p_k\,\varepsilon^{(k)}$$
#
# (multiply out both sides: the mixed terms cancel, because $\bar\varepsilon$ is the mean). The second part does not
# depend on the answer. The first is smallest, 0, for $c = \bar\varepsilon$. So the best answer is the mean of all
# noises that could have led here:
#
# $$\varepsilon^*(x_t, t) = \mathbb{E}[\,\varepsilon \mid x_t\,]$$
#
# And the loss does not go to 0. What is left is how much the possible noises differ among each other.
#
# ### A world with three images
#
# We can compute that mean where the world is small. Let an image have one pixel, and let there be only three images,
# equally common: $-0.8$, $0.1$ and $0.9$. From image $x^{(k)}$ the forward process reaches $x_t$ with the density
# $\mathcal{N}(x_t;\ \sqrt{\bar\alpha_t}\,x^{(k)},\ 1-\bar\alpha_t)$. Divided by their sum (Bayes' rule) these are the
# probabilities of the three images, once $x_t$ is seen. Their average is the best guess of $x_0$.

# %%
points = np.array([-0.8, 0.1, 0.9])
toy = schedule.cosine(T=1000)


def probabilities(x_t, t):
    """Of each image, when x_t (n,) is seen: (n, 3)."""
    a = toy.alpha_bar[t]
    exponent = -((x_t[:, None] - np.sqrt(a) * points) ** 2) / (2 * (1 - a))
    p = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def best_x0(x_t, t):
    return probabilities(x_t, t) @ points


xs = np.linspace(-2, 2, 401)
names = [f"from {p:+g}" for p in points]
charts = {
    f"t = {t}": {
        **{n: (xs, p) for n, p in zip(names, probabilities(xs, t).T, strict=True)},
        "best guess of x_0": (xs, best_x0(xs, t)),
    }
    for t in (100, 500, 900)
}
figure(
    panels(
        charts, "x_t, what is seen", "probability; value of x_0", "Three images at three times",
        ylim=(-1.05, 1.05),
    ),
    "How probable each of the three images is when x_t is seen (lines from 0 to 1), and their "
    "average, the best guess of x_0. At little noise the guess is a staircase: one image is "
    "certain. At much noise all three stay possible, and the guess is near their mean "
    "whatever is seen.",
)  # fmt: skip

# %% [markdown]
# From an image and $x_t$ follows the noise: $\varepsilon = (x_t - \sqrt{\bar\alpha_t}\,x_0)/\sqrt{1-\bar\alpha_t}$.
# This is a straight line in $x_0$, and the average of a straight line's values is its value at the average. So the best
# noise is the noise that belongs to the best image: `eps_from_x0(x_t, t, best_x0(x_t, t), toy)`.
#
# Now let a tiny network learn it. It knows nothing of the three images; it is only asked for noise. Three linear
# layers, the time as waves (`timestep_embedding`, as in the U-Net), and the very loss that is shown above.
# (`AdamW` and its `ema_decay` are explained at the end of this notebook.)

# %%
from minidiff.ops import timestep_embedding
from minidiff.tensor import Tensor


class TinyNet(nn.Module):
    def __init__(self, width=64):
        self.layers = [nn.Linear(1 + 32, width), nn.Linear(width, width), nn.Linear(width, 1)]

    def forward(self, x_t, t, cond):
        waves = timestep_embedding(np.asarray(t), 32)
        h = Tensor(np.concatenate([x_t, waves], axis=1))
        for layer in self.layers[:-1]:
            h = layer(h, activation="silu")
        return self.layers[-1](h)


def taught(steps, batch, rate):
    """A tiny network after each of `steps` steps; rate(step) is the learning rate."""
    net = TinyNet().initialise(0)
    optimizer = optim.AdamW(dict(net.named_parameters()), ema_decay=0.99)
    for step in range(1, steps + 1):
        images = rng.choice(points, (batch, 1)).astype(np.float32)
        times = rng.integers(1, toy.T + 1, batch)
        noise = rng.standard_normal((batch, 1), dtype=np.float32)
        loss = eps_loss(net, images, times, noise, None, toy)
        loss.backward()
        optimizer.step(rate(step), {name: p.grad for name, p in net.named_parameters()})
        for p in net.parameters():
            p.grad = None
        yield net, optimizer


*_, (tiny, _) = taught(2000, 512, lambda step: optim.learning_rate(step, 2000, 1e-2, 50))

# %%
charts = {}
for t in (150, 500, 850):
    a = toy.alpha_bar[t]
    reach = np.sqrt(a) * 0.9 + 2 * np.sqrt(1 - a)
    xs = np.linspace(-reach, reach, 301)
    column = xs[:, None].astype(np.float32)
    with no_grad():
        learned = tiny(column, np.full(len(xs), t), None).data[:, 0]
    charts[f"t = {t}"] = {
        "best noise, computed": (xs, eps_from_x0(xs, t, best_x0(xs, t), toy)),
        "the tiny network's": (xs, learned),
    }
figure(
    panels(charts, "x_t", "noise", "Computed and learned noise at three times"),
    "The noise that the loss asks for, computed from the three images, and what the network "
    "learned without knowing them.",
)

# %%
rows = []
for t in (50, 200, 400, 600, 800, 950):
    images = rng.choice(points, (20_000, 1)).astype(np.float32)
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    x_t = q_sample(images, t, noise, toy)
    best = eps_from_x0(x_t[:, 0], t, best_x0(x_t[:, 0], t), toy)
    with no_grad():
        of_tiny = eps_loss(tiny, images, np.full(len(images), t), noise, None, toy).item()
    rows.append([t, f"{np.mean((noise[:, 0] - best) ** 2):.3f}", f"{of_tiny:.3f}"])
table(["t", "least possible loss", "the tiny network's"], rows)

# %% [markdown]
# The network comes close to the least possible loss and cannot go below. In this world that is small at both ends. At
# little noise the image is certain, and with it the noise (the tiny network does not get all of this: the staircase is
# too steep for it). At much noise $x_t$ nearly *is* the noise. In between, the images are confused.
#
# ### The score
#
# There is another way to say what the network learns. Let $q(x_t)$ be the density of all noisy images at time $t$,
# whatever image they come from. Its **score** is the gradient of its logarithm, $\nabla \log q(x_t)$: an arrow that
# points to where noisy images are more common. The best noise is that arrow, turned round and scaled:
#
# $$\varepsilon^*(x_t, t) = -\sqrt{1-\bar\alpha_t}\ \nabla_{x_t} \log q(x_t)$$
#
# So removing predicted noise is walking uphill towards likely images. (For one image, the logarithm of the normal
# density has the slope $-(x_t-\sqrt{\bar\alpha_t}\,x_0)/(1-\bar\alpha_t) = -\varepsilon/\sqrt{1-\bar\alpha_t}$; with
# several images the probabilities above are exactly the weights with which the slopes are averaged.) Measured on the
# three images:

# %%
t = 220
a = toy.alpha_bar[t]
xs = np.linspace(-1.7, 1.7, 4001)
bells = np.exp(-((xs[:, None] - np.sqrt(a) * points) ** 2) / (2 * (1 - a)))
density = bells.mean(axis=1) / np.sqrt(2 * np.pi * (1 - a))
score = np.gradient(np.log(density), xs)  # numerically, from neighbouring points
best = eps_from_x0(xs, t, best_x0(xs, t), toy)
assert close(-np.sqrt(1 - a) * score[1:-1], best[1:-1], 1e-5)
at = np.arange(200, 4000, 200)
figure(
    score_arrows(xs, density, xs[at], score[at], "The density of noisy images and its score"),
    "The density of x_t at t = 220, and its score as arrows from the dots. They point to where "
    "noisy images are common: uphill, to the nearest of the three bumps. They are long where the "
    "density rises steeply for its height; where it is nearly flat, only the head is left.",
)

# %% [markdown]
# ## Three ways to ask
#
# The equation $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$ ties three things together. Who
# knows $x_t$ and one of the others has the third:

# %%
source(predict_x0, eps_from_x0)

# %% [markdown]
# So a network may as well be asked for the image. And there is a third target in use, $v$ ([Salimans and Ho
# 2022](https://arxiv.org/abs/2202.00512)):
#
# $$v = \sqrt{\bar\alpha_t}\,\varepsilon - \sqrt{1-\bar\alpha_t}\,x_0$$
#
# Think of $x_0$ and $\varepsilon$ as the two axes of a plane. The factors are $\cos\varphi = \sqrt{\bar\alpha_t}$ and
# $\sin\varphi = \sqrt{1-\bar\alpha_t}$, because their squares add up to 1. Then $x_t$ is the first axis turned by the
# angle $\varphi$, and $v$ the second. At $t = 0$, $v$ is the noise; at $t = T$ it is the image with its sign turned.

# %%
source(diffusion.training_target, diffusion.eps_from_prediction)

# %%
images, captions = shapes.batch(64, np.random.default_rng(1), "val")
x0 = model.encode(images).astype(np.float64)
eps = rng.standard_normal(x0.shape)
for t in (1, 100, 500, 900):
    x_t = q_sample(x0, t, eps, model.schedule)
    for asked_for in diffusion.PREDICTIONS:
        target = diffusion.training_target(x0, t, eps, model.schedule, asked_for)
        back = diffusion.eps_from_prediction(target, x_t, t, model.schedule, asked_for)
        assert close(back, eps, 1e-9)
print("From each of", ", ".join(diffusion.PREDICTIONS), "the noise comes back.")

# %% [markdown]
# Does it matter, then, which one is asked for? The best answers say the same. But no network is perfect, and an error
# is passed on with a factor. If $\varepsilon_\theta$ is wrong by $d$, the image that follows from it is wrong by
# $\sqrt{1-\bar\alpha_t}/\sqrt{\bar\alpha_t}\cdot d$. And the other way round, by one over that:

# %%
table(
    ["t", "error of x_0 for each error of eps", "error of eps for each error of x_0"],
    [
        [t, f"{np.sqrt((1 - a) / a):.3g}", f"{np.sqrt(a / (1 - a)):.3g}"]
        for t in (10, 100, 300, 500, 700, 900, 990)
        for a in [alpha_bar[t]]
    ],
)

# %% [markdown]
# At much noise a small error of $\varepsilon$ is a huge error of the image. At little noise a small error of the image
# is a large error of the noise. $v$ lies between. Our model is asked for $x_0$; called as `model(x_t, t, cond)` it
# answers $\varepsilon_\theta$ all the same, through `eps_from_prediction`.
#
# ## Why a blurry prediction is right
#
# The best guess of $x_0$ is an average too. At much noise many images are possible, and the average of many images is
# blurry. Here is one picture at eight noise levels, and what the model thinks it is.

# %%
times = [1000, 950, 900, 800, 700, 500, 300, 100]
x0 = model.encode(picture)
eps = rng.standard_normal(x0.shape, dtype=np.float32)
x_ts = [q_sample(x0, t, eps, model.schedule) for t in times]
told = [predict_x0(x, t, model(x, np.array([t]), as_cond([caption])), model.schedule)
        for x, t in zip(x_ts, times, strict=True)]  # fmt: skip
untold = [predict_x0(x, t, model(x, np.array([t]), as_cond([""])), model.schedule)
          for x, t in zip(x_ts, times, strict=True)]  # fmt: skip
rows = [np.concatenate([model.decode(x) for x in row]) for row in (x_ts, told, untold)]
labels = [f"t = {t}" for t in times] + ["caption"] * len(times) + ["no caption"] * len(times)
figure(
    plotting.image_grid(
        np.concatenate([fitted(rows[0]), *rows[1:]]), labels, columns=len(times)
    ),
    "Above: x_t (scaled to be shown). Middle: the image that the model predicts from it with "
    "the caption, below: without. The less it can know, the more possibilities are mixed.",
)

# %% [markdown]
# At $t = 1000$ the model sees pure noise. Without a caption the best guess is then the average of *all* training
# pictures, and we can compute that:

# %%
pictures, _ = shapes.batch(4000, np.random.default_rng(2))
average = pictures.mean(axis=0, keepdims=True)
guess = model.decode(untold[0])
typical = np.sqrt(np.mean((pictures - average) ** 2))
print(f"from the average picture: the guess {np.sqrt(np.mean((guess - average) ** 2)):.3f}, "
      f"a training picture {typical:.3f} (root of the mean square)")  # fmt: skip
figure(
    plotting.image_grid(
        np.concatenate([average, guess, pictures[:2]]),
        ["average of 4000 pictures", "the model's guess from noise", "a training picture",
         "another"],
        columns=4,
    ),
    "What training pictures are like on average, what the model predicts from nothing but noise, "
    "and two training pictures.",
)  # fmt: skip

# %% [markdown]
# A sharp picture would be a worse answer: it would put edges where there mostly are none. Sampling, the next notebook's
# subject, makes a sharp picture out of blurry guesses by guessing again and again, with less noise each time.
#
# ## The loss at every noise level
#
# Now the model in the box on 64 pictures whose pairs of objects it was never trained on, in three units: how
# wrong its noise is, how wrong the image is that follows from it, and how wrong the $v$ of the two.

# %%
x0 = model.encode(images)  # the 64 pictures from above, with their captions
eps = rng.standard_normal(x0.shape, dtype=np.float32)
cond = as_cond(captions)
times = [5, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 990]
of_eps, of_x0, of_v = [], [], []
for t in times:
    x_t = q_sample(x0, t, eps, model.schedule)
    answer = model(x_t, np.full(len(x0), t), cond)
    guess = predict_x0(x_t, t, answer, model.schedule)
    v, v_guess = (diffusion.training_target(x, t, e, model.schedule, "v")
                  for x, e in ((x0, eps), (guess, answer)))  # fmt: skip
    of_eps.append(np.mean((eps - answer) ** 2))
    of_x0.append(np.mean((x0 - guess) ** 2))
    of_v.append(np.mean((v - v_guess) ** 2))
figure(
    panels(
        {"": {"of eps": (times, of_eps), "of x_0": (times, of_x0), "of v": (times, of_v)}},
        "t", "mean squared error", "Error by time in three units", logy=True,
    ),
    "The same answers of one model, measured as noise, as image and as v. The axis is "
    "logarithmic. At the left the curve of v lies on that of eps, at the right on that of x_0.",
)  # fmt: skip

# %% [markdown]
# Look at $x_0$ first. The more noise, the worse the guess; at the right end it is a blur. The other two curves are the
# same answers in other units: $\|\varepsilon - \varepsilon_\theta\|^2 = \mathrm{SNR}_t\,\|x_0 - x_{0,\theta}\|^2$,
# where $\mathrm{SNR}_t = \bar\alpha_t/(1-\bar\alpha_t)$ is the signal-to-noise ratio of notebook 1 and $x_{0,\theta}$
# the predicted image. In units of the noise, the easy and the hard end change places: faint noise is hard to tell from
# fine detail. At the very left the answer is worse than "there is no noise", which costs 1. No harm is done there: the
# image is all but finished.
#
# This is why the choice of the target matters for training after all: it decides how much each noise level *counts*. A
# loss on $x_0$ with the weight $1 + \mathrm{SNR}_t$ is a loss on $v$. Our model is trained so, with a limit on the
# weight: its loss is $\min(1+\mathrm{SNR}_t,\ 10)\cdot\|x_0 - x_{0,\theta}\|^2$.

# %%
source(diffusion.x0_loss_weight)

# %%
tt = np.array(times)
unlimited = diffusion.x0_loss_weight(tt, model.schedule, limit=1e12)
assert close(unlimited * np.array(of_x0), of_v, 1e-3)  # (1 + SNR) times the one is the other
limited = diffusion.x0_loss_weight(tt, model.schedule, model.diffusion.weight_limit)
figure(
    panels(
        {
            "": {
                "1: loss on x_0": (tt, np.ones(len(tt))),
                "SNR: loss on eps": (tt, unlimited - 1),
                "1 + SNR: loss on v": (tt, unlimited),
                "min(1 + SNR, 10): ours": (tt, limited),
            }
        },
        "t", "weight", "How much an error of the image counts at each time", logy=True,
    ),
    "How much an error of the predicted image counts at each time (logarithmic). Ours is 10 at "
    "the left; from where it bends it lies on 1 + SNR. A loss on eps hardly asks for the image at "
    "large t, where the next notebook will find that the composition is decided.",
)  # fmt: skip

# %% [markdown]
# ## Training, live
#
# All parts are there. A training step draws a batch, computes the loss and its gradient (notebook 2), and moves the
# weights a little downhill. Here is where the random things of a step come from, one step, and the loop around
# it. All that matters is in `step`: `loss_and_gradients`, `clip_factor` and `optimizer.step`; it also stops when
# a number is not finite. The loop calls it as `take_step`, with the rate from `learning_rate`; its other lines
# prepare the next batch in a second thread and keep time.

# %%
from minidiff import train as training

source(training.draw_batch, training.draw_timesteps, training.step, training.train)

# %% [markdown]
# We train a smaller network on an easier task: pictures of *one* object. The settings are those of the preset
# `shapes` (a file of settings for one kind of data), but for a few. Two of these need a word. The times are drawn
# more often from the middle than from the two ends (`draw_timesteps`): near $t = T$ the best answer is a blur
# anyway, and near $t = 0$ little is left to find out. And no caption is dropped; the preset replaces one in ten
# by the empty one, for a purpose that notebook 8 explains.

# %%
from dataclasses import asdict
from types import SimpleNamespace

from minidiff.config import SampleConfig, load_config
from minidiff.sample import draw
from minidiff.train import averaged_weights, new_state

one_object = SimpleNamespace(  # a dataset is these three names
    words=shapes.VOCABULARY,
    image_shape=(32, 32, 3),
    batch=lambda step, size: shapes.batch(size, np.random.default_rng((6, step)), objects=1),
)
small = load_config(
    "shapes",
    {
        "unet.channels": [32, 32],  # the preset has 48 and 64
        "text.layers": 1,
        "train.steps": 800,
        "train.lr": 1.5e-3,
        "train.warmup": 50,
        "train.ema_decay": 0.98,  # a short run needs a short memory
        "train.timesteps": "logit_normal",
        "train.drop_caption": 0.0,
    },
)
state = new_state(small)
print(f"{sum(p.data.size for p in state.model.parameters()):,} weights")

# %% [markdown]
# To see what it has learned we let it draw. `draw` is the reverse process, which notebook 7 explains, here in 25 steps;
# `guidance=1.0` turns off what notebook 8 adds; `averaged_weights` is explained at the end of this notebook. For now it
# is enough that noise and a caption go in and a picture comes out.

# %%
asked = ["a large red circle", "a small blue square", "a large green triangle",
         "a small purple circle", "a large yellow square", "a small cyan triangle"]  # fmt: skip
settings = SampleConfig(steps=25, guidance=1.0)


def snapshot():
    """The step, and what the model draws."""
    with averaged_weights(state) as averaged:
        return state.step, draw(averaged, asked, settings)


snapshots, log = [snapshot()], []
for record in training.train(state, one_object):
    log.append(asdict(record))
    if record.step in (30, 100, 300, 800):
        snapshots.append(snapshot())
print(f"{record.images:,} pictures in {60 * record.minutes:.0f} seconds")

# %%
figure(
    plotting.loss_curve({"small model": log}),
    "The loss of each training step (points) and its running median, on a logarithmic axis. The points scatter "
    "because every batch draws other pictures, other noise and other times.",
)

# %%
figure(
    plotting.image_grid(
        np.concatenate([drawn for _, drawn in snapshots]),
        [f"step {step}: {c}" for step, _ in snapshots for c in asked],
        columns=len(asked),
    ),
    "What the model draws after so many training steps, one row each, always from the same "
    "noise.",
)

# %% [markdown]
# How many are right? `shapes.judge`, a program without learning, finds the objects in a picture by their colour and
# outline, and compares them with the caption:

# %%
fresh, wanted = shapes.batch(100, np.random.default_rng(8), objects=1)
with averaged_weights(state) as averaged:
    drawn = draw(averaged, wanted, settings)
result = shapes.score(shapes.judge(drawn, wanted))
table(
    ["of 100 captions of one object", "right"],
    [[name.replace("_", " "), f"{100 * share:.0f}%"] for name, share in result.items()
     if name != "relation"],
)  # fmt: skip

# %% [markdown]
# Before training the last layer is all zeros, so the network predicts grey. Then the background comes, then spots, then
# their colours and sizes; the shape, which is a matter of edges, comes last and is often still wrong after so short a
# run. (“All right” asks for all of these together, for clear outlines and for a clean background.) The same code
# with a larger network, on two objects and for some hours made the model in the box.
#
# ## AdamW
#
# `optimizer.step` hides the last piece. The gradient $g$ of one batch is noisy, and some weights have far larger
# gradients than others. AdamW ([Loshchilov and Hutter 2017](https://arxiv.org/abs/1711.05101)) keeps two running
# averages for every single weight $p$:
#
# - $m \leftarrow \beta_1 m + (1-\beta_1)\,g$, the average gradient: steps that contradict each other cancel;
# - $v \leftarrow \beta_2 v + (1-\beta_2)\,g^2$, the average *squared* gradient (no relation to the $v$ above):
#   the step is $m$ divided by the root of $v$, so a weight moves by about the learning rate or less, whatever the
#   size of its gradient; the small `eps` (not the noise) keeps from dividing by 0;
# - $\beta_1$ and $\beta_2$ (no relation to the schedule's $\beta_t$) are the share of the old average that is
#   kept. Both averages begin at 0 and are too small at first, which dividing by $1 - \beta_1^{\text{step}}$ and
#   $1 - \beta_2^{\text{step}}$ repairs;
# - the weight decay pulls matrices and kernels (not biases and the gains of norms) a little towards 0.
#   (`g_factor` is the clipping, see below.)
#
# What differs from step to step, such as the learning rate and those two repairs, is gathered in one small array:

# %%
source(optim.step_numbers, optim.adamw_update)

# %% [markdown]
# Before that, gradients whose common length is more than `clip` are shortened to it, so that one odd batch cannot throw
# the weights far off. And the learning rate rises over the first steps and then falls along half a cosine. (The preset,
# and so the run above, uses a newer rule, Muon, for the matrices and kernels in the middle of the network, and AdamW
# for the rest; `docs/recipe.md` tells why. The averages of the weights are the same in both.)
#
# ## The moving average of the weights
#
# The last line of `adamw_update` keeps a copy of every weight that follows it slowly (EMA, exponential moving average):
#
# $$\text{ema} \leftarrow \text{ema} + (1-d)\,(p - \text{ema})$$
#
# With the decay $d = 0.99$ it remembers about the last $1/(1-d) = 100$ steps. A weight near its best value jitters
# around it, because every batch pulls it elsewhere; its average does so less, and the less, the longer it
# remembers. Here is one weight whose loss is $\tfrac12(p-1)^2$, with gradients that are noisy:

# %%
noise = rng.standard_normal((800, 1))
paths = {}
for d in (0.9, 0.99):
    p, m, v, ema = (np.zeros(1) for _ in range(4))
    both = []
    for step, z in enumerate(noise, 1):
        numbers = optim.step_numbers(1.0, 0.02, 0.9, 0.99, 1e-8, step, d)
        optim.adamw_update([p], [p - 1 + z], [m], [v], [ema], [0.0], numbers)
        both.append([p[0], ema[0]])
    paths["the weight"], paths[f"average, d = {d}"] = np.transpose(both)
every = np.arange(800)
figure(
    plotting.line_plot(
        {n: (every, y) for n, y in paths.items()}, "step", "value (the best is 1)"
    ),
    "One weight with noisy gradients, and two moving averages of it. The slower the average, "
    "the smoother, and the later.",
)

# %% [markdown]
# Does it help a network? Train the tiny one again, with small batches and a learning rate that stays high, and measure
# its loss with the weights as they are and with their averages, several times in the last steps, at times $t$
# from 100 on. (The optimizer holds the averages as `ema`.)

# %%
images = rng.choice(points, (20_000, 1)).astype(np.float32)
times = rng.integers(100, toy.T + 1, len(images))
noise = rng.standard_normal(images.shape, dtype=np.float32)


def loss_of(net):
    with no_grad():
        return f"{eps_loss(net, images, times, noise, None, toy).item():.4f}"


rows = []
for step, (restless, optimizer) in enumerate(taught(2000, 64, lambda step: 1e-2), 1):
    if step > 1500 and step % 100 == 0:
        weights = restless.state()
        row = [step, loss_of(restless)]
        restless.load(optimizer.ema)
        rows.append([*row, loss_of(restless)])
        restless.load(weights)
table(["step", "loss, the weights", "loss, their averages"], rows)
print("the network from above, whose learning rate fell to 0:", loss_of(tiny))

# %% [markdown]
# The averages are better at each of these steps. A learning rate that falls to 0 calms the weights too; the model in
# the box had both.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n06_training.py`.
#
# **6.1** From $x_t$ and its noise $\varepsilon$ back to $x_0$. Solve the equation of the jump for it.

# %%
from exercises import n06_training as check


def clean(x_t, eps, alpha_bar):
    return ...


check.image_from_noise(clean)

# %% [markdown]
# **6.2** The target $v$ from $x_0$ and $\varepsilon$. (Do it from the two turned axes under “Three ways to ask”:
# at $\bar\alpha_t = 1$ it is $\varepsilon$, at $\bar\alpha_t = 0$ it is $-x_0$.)


# %%
def target(x0, eps, alpha_bar):
    return ...


check.v_target(target)

# %% [markdown]
# **6.3** A world with two images, $-1$ and $1$, equally common. You see $x_t$ (an array of several). What is the best
# answer to "which noise was added"? Go as above: how probable is each image, what is the average image, which noise
# belongs to it?


# %%
def best(x_t, alpha_bar):
    return ...


check.best_noise(best)

# %% [markdown]
# ## Where to go on
#
# The loss and the conversions are in `minidiff/diffusion.py`, the loop in `minidiff/train.py`, AdamW and the average in
# `minidiff/optim.py`. Next: [7. The reverse process](07_reverse_process.ipynb), which turns a network that only knows
# noise into pictures.
