# %% [markdown]
# # 1. The forward process
#
# A diffusion model learns to find an image in noise. To teach it, we first need images that are lost in noise to
# every degree: a little, half, completely. The forward process makes them. It has no parameters and learns
# nothing.
#
# **What you will learn**
#
# - how one step mixes an image with noise, and why it also shrinks the image a little;
# - why a thousand steps can be made in one jump, and how exactly the two agree;
# - what a *schedule* is, and how the three that everybody uses differ;
# - what the noise destroys first: fine detail, long before the composition.
#
# You need to know what a normal distribution is. Each notebook takes a minute or two to run.

# %%
from course import begin, close, figure, photograph, source, table

begin(1)

# %%
import numpy as np

from minidiff import plotting, schedule
from minidiff.diffusion import q_sample, q_step
from minidiff.schedule import Schedule

rng = np.random.default_rng(0)
# (H, W, C): height, width and the three colours; from -1 (black) to 1 (white)
photo = photograph(48)
x0 = photo[None]  # (B, H, W, C): every function here takes a batch of B images
x0.shape

# %% [markdown]
# ## One step
#
# Write $x_0$ for the clean image and $x_t$ for what is left of it after $t$ steps. Step $t$ takes $x_{t-1}$ and
# draws $x_t$ from a normal distribution around a slightly smaller copy of it:
#
# $$q(x_t \mid x_{t-1}) = \mathcal{N}\!\left(x_t;\ \sqrt{1-\beta_t}\;x_{t-1},\ \beta_t I\right)$$
#
# - $q$ is the name of the forward process; $q(x_t \mid x_{t-1})$ reads "how $x_t$ is distributed when $x_{t-1}$
#   is known".
# - $\mathcal{N}(x;\ \text{mean},\ \text{variance})$ is the normal distribution; $I$ says that every number of the
#   image gets noise of its own, with the same variance.
# - $\beta_t$ (beta), a small number between 0 and 1, is the variance of the noise that step $t$ adds.
#
# To draw from a normal distribution, take standard noise $\varepsilon$ (epsilon: mean 0, variance 1), scale it,
# and add the mean. With $\alpha_t = 1-\beta_t$ (alpha) that is all the function does:

# %%
source(q_step)

# %% [markdown]
# `schedule.between` looks $\beta_t$ and $\alpha_t$ up in a table (`t_prev` is for larger steps, as in exercise
# 1.3; place 0 of a table stands for the clean image); `per_sample` shapes them so that they multiply a batch.
#
# Why shrink? Adding noise of variance $\beta$ again and again would let the numbers grow without end. If
# $x_{t-1}$ has variance 1, then $\sqrt{1-\beta_t}\,x_{t-1}$ has variance $1-\beta_t$, and the noise adds
# $\beta_t$: together 1 again. The share of the image falls, the share of noise rises, and the size of the numbers
# stays what the network is used to.
#
# The table of all $\beta_t$ is called the **schedule**. This one, from the paper that made diffusion models work
# ([DDPM](https://arxiv.org/abs/2006.11239)), rises evenly from 0.0001 to 0.02 in $T = 1000$ steps:

# %%
linear = schedule.linear(T=1000)
linear.beta[1], linear.beta[500], linear.beta[1000]

# %%
one_step = q_step(x0, t=1, eps=rng.standard_normal(x0.shape), schedule=linear)
late_step = q_step(x0, t=1000, eps=rng.standard_normal(x0.shape), schedule=linear)
figure(
    plotting.image_grid(
        np.concatenate([x0, one_step, late_step]),
        [
            "the photograph",
            "after one step with beta = 0.0001",
            "after one step with beta = 0.02",
        ],
    ),
    "One step changes next to nothing: at the start of the schedule the eye cannot see it, "
    "at its end it is a little grain.",
)

# %% [markdown]
# ## Many steps
#
# Now walk: $x_0 \to x_1 \to x_2 \to \dots \to x_{1000}$, with fresh noise at every step.

# %%
x = x0
walk = {0: x0}
for t in range(1, linear.T + 1):
    x = q_step(x, t, rng.standard_normal(x.shape), linear)
    walk[t] = x

shown = [0, 50, 100, 200, 300, 500, 1000]
strip = np.concatenate([walk[t] for t in shown])
figure(
    plotting.image_grid(strip, [f"t = {t}" for t in shown], columns=len(shown)),
    "A walk of 1000 steps. Numbers beyond ±1 are shown as black or white. After 300 steps "
    "the face is hard to find, at the end nothing is left of it.",
)

# %% [markdown]
# ## The jump
#
# To train, we need $x_t$ for random $t$, millions of times. Walking there would be hopeless. But look at what two
# steps do:
#
# $$x_2 = \sqrt{\alpha_2}\,x_1 + \sqrt{1-\alpha_2}\,\varepsilon_2
#       = \sqrt{\alpha_2\alpha_1}\,x_0 + \underbrace{\sqrt{\alpha_2(1-\alpha_1)}\,\varepsilon_1 + \sqrt{1-\alpha_2}\,\varepsilon_2}_{\text{noise}}$$
#
# The noise is a sum of two independent normal variables, so it is normal, and its variances add:
# $\alpha_2(1-\alpha_1) + (1-\alpha_2) = 1-\alpha_1\alpha_2$. The same happens at every further step. With the
# running product
#
# $$\bar\alpha_t = \alpha_1\alpha_2\cdots\alpha_t \qquad\text{(alpha bar)}$$
#
# any $x_t$ is one jump away from $x_0$:
#
# $$q(x_t \mid x_0) = \mathcal{N}\!\left(x_t;\ \sqrt{\bar\alpha_t}\;x_0,\ (1-\bar\alpha_t) I\right)$$

# %%
source(q_sample, Schedule.alpha_bar)

# %% [markdown]
# So $\bar\alpha_t$ is the one number that matters: the share of the variance that is still image (for an image of
# variance 1; real ones have somewhat less). It is 1 at $t = 0$ and nearly 0 at $t = T$; $1-\bar\alpha_t$ is the
# share of the noise.

# %%
jumps = np.concatenate([q_sample(x0, t, rng.standard_normal(x0.shape), linear) for t in shown])
figure(
    plotting.image_grid(
        np.concatenate([strip, jumps]),
        [f"{how} to {t}" for how in ("walked", "jumped") for t in shown],
        columns=len(shown),
    ),
    "Walked (above) and jumped (below). The noise is different noise, but nobody could tell "
    "which is which.",
)

# %% [markdown]
# ### Do they really agree?
#
# "Nobody could tell" is not a proof; here are two measurements. First the distribution: take one number, say
# $x_0 = 0.8$, walk 20 000 copies of it to several $t$, and compare their mean and variance with
# $\sqrt{\bar\alpha_t}\,x_0$ and $1-\bar\alpha_t$.

# %%
copies = np.full((20_000, 1), 0.8)
rows = []
for t in range(1, linear.T + 1):
    copies = q_step(copies, t, rng.standard_normal(copies.shape), linear)
    if t in (1, 10, 100, 300, 1000):
        a = linear.alpha_bar[t]
        wanted = np.sqrt(a) * 0.8, 1 - a
        rows.append(
            [t, *(f"{v:.4f}" for v in (copies.mean(), wanted[0], copies.var(), wanted[1]))]
        )
table(["t", "mean, walked", "mean, formula", "variance, walked", "variance, formula"], rows)

# %% [markdown]
# With 20 000 copies a mean is known to about $1/\sqrt{20\,000} \approx 0.007$, and the numbers agree to that.
#
# Second, exactly. The walk's noises add up to *one* noise $\varepsilon$; hand that one to the jump, and it must
# land on the very same image. Starting from an image of zeros, what the walk collects is
# $\sqrt{1-\bar\alpha_t}\,\varepsilon$:

# %%
t_end = 300
noises = rng.standard_normal((t_end + 1, *x0.shape))
walked, collected = x0.astype(np.float64), np.zeros(x0.shape)
for t in range(1, t_end + 1):
    walked = q_step(walked, t, noises[t], linear)
    collected = q_step(collected, t, noises[t], linear)
eps = collected / np.sqrt(1 - linear.alpha_bar[t_end])
jumped = q_sample(x0.astype(np.float64), t_end, eps, linear)
assert close(jumped, walked, 1e-12)
print(
    f"largest difference: {np.abs(jumped - walked).max():.1e};  eps has mean "
    f"{eps.mean():.4f}, variance {eps.var():.4f}"
)

# %% [markdown]
# The difference is rounding, and the collected noise is standard noise, as the derivation says.
#
# ## Schedules side by side
#
# How fast should $\bar\alpha_t$ fall? Three answers are in use:
#
# - **linear** (DDPM): $\beta_t$ rises evenly;
# - **scaled linear** (Stable Diffusion): $\sqrt{\beta_t}$ rises evenly;
# - **cosine** ([Improved DDPM](https://arxiv.org/abs/2102.09672)): $\bar\alpha_t$ itself follows a squared cosine
#   (`s` keeps the first steps from being too small, `beta_max` the last one from being too large).

# %%
source(schedule.linear, schedule.scaled_linear, schedule.cosine)

# %%
schedules = {
    "linear": linear,
    "scaled linear": schedule.scaled_linear(),
    "cosine": schedule.cosine(),
}
figure(
    plotting.schedule_plot({name: s.alpha_bar for name, s in schedules.items()}),
    "Left: the share of the image that is left. Right: the signal-to-noise ratio SNR = "
    "alpha_bar / (1 - alpha_bar), as its natural logarithm (its unit is then called nat): "
    "above 0 the image is stronger than the noise, below 0 weaker. Both have the same lines.",
)

# %%
times = [100, 250, 500, 750, 1000]
same_noise = rng.standard_normal(x0.shape)
grid = np.concatenate(
    [q_sample(x0, t, same_noise, s) for s in schedules.values() for t in times]
)
captions = [
    f"{name}, t = {t}: {100 * s.alpha_bar[t]:.2g}%"
    for name, s in schedules.items()
    for t in times
]
figure(
    plotting.image_grid(grid, captions, columns=len(times)),
    "The same photograph and the same noise under the three schedules; the percentage is "
    "alpha_bar, the share of the image.",
)

# %% [markdown]
# For the eye, the linear schedule has destroyed the image by the middle; its later steps teach a network little.
# The cosine schedule spends its steps more evenly. And look at the end: the reverse process will *start* from
# pure noise, as if $\bar\alpha_T$ were 0. It never quite is:

# %%
table(
    ["schedule", "alpha_bar at T", "share of the image's amplitude, the root of that"],
    [
        [name, f"{a:.2g}", f"{100 * np.sqrt(a):.2g}%"]
        for name, a in ((name, s.alpha_bar[-1]) for name, s in schedules.items())
    ],
)

# %% [markdown]
# With Stable Diffusion's schedule 7% of the amplitude is still there at the last step: enough to give away how
# bright the picture is on the whole. A network trained so has never seen pure noise, and pictures it draws from
# pure noise tend to a middle brightness ([Lin et al. 2023](https://arxiv.org/abs/2305.08891)).
#
# ## What is destroyed first
#
# Noise hits every pixel equally. But an image is not made of equal parts: slow changes across the picture (light
# above, dark below, a face here) are strong, fine changes (hair, cloth, edges) are weak. Take the photograph
# apart into waves, from long to short, by a Fourier transform, and measure how strong each wavelength is. Noise
# has the same strength everywhere, $1-\bar\alpha_t$, so a wavelength is lost as soon as $\bar\alpha_t$ times its
# strength falls below that. Divide both by $\bar\alpha_t$: it is lost as soon as its strength in the photograph
# falls below $(1-\bar\alpha_t)/\bar\alpha_t$. The picture shows these two.


# %%
def strength_by_frequency(image):
    """Mean squared amplitude of waves with k periods across an image (N, N), k = 1..N / 2."""
    N = len(image)
    power = np.abs(np.fft.fft2(image) / N) ** 2  # noise of variance 1 has 1 at every frequency
    k = np.fft.fftfreq(N, 1 / N)
    radius = np.rint(np.hypot(*np.meshgrid(k, k))).astype(int)
    return np.array([power[radius == r].mean() for r in range(1, N // 2 + 1)])


def noise_beside_image(t):
    """The variance of the noise in x_t, if the image in it had its full size."""
    return (1 - linear.alpha_bar[t]) / linear.alpha_bar[t]


strength = strength_by_frequency(photograph(128).mean(axis=-1))
periods = np.arange(1, len(strength) + 1)
lines = {"photograph": (periods, strength)}
for t in (10, 50, 200, 500):
    lines[f"noise at t = {t}"] = (periods, np.full(len(periods), noise_beside_image(t)))
figure(
    plotting.line_plot(lines, "periods across the picture", "strength", log="xy"),
    "Strength of the photograph's waves (noise of variance 1 would have strength 1), and of the "
    "noise at four times, divided by alpha_bar. Where a noise line lies above the photograph's, "
    "those waves are lost.",
)

# %%
rows = []
for t in (1, 10, 50, 100, 200, 300, 500):
    weak = strength < noise_beside_image(t)
    rows.append([t, periods[np.argmax(weak)] if weak.any() else "none"])
table(["t", "fewest periods across the picture that are lost"], rows)

# %% [markdown]
# The forward process goes from fine to coarse: texture first, then outlines, then where things are, then how
# bright it is on the whole. The reverse process will run the same film backwards: **composition first, detail
# last**. That is why the first steps of a diffusion model decide what the picture shows, and the last ones only
# polish.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in
# `solutions/n01_forward_process.py`.
#
# **1.1** Write one forward step yourself, from $x_{t-1}$, $\beta_t$ and $\varepsilon$ (`np.sqrt` is all you
# need).

# %%
from exercises import n01_forward_process as check


def noisier(x_prev, beta, eps):
    return ...


check.one_step(noisier)

# %% [markdown]
# **1.2** At which $t$ is the noise stronger than the image for the first time, that is
# $\bar\alpha_t < 1 - \bar\alpha_t$? Fill in the number for each schedule. (`schedules["linear"].alpha_bar` is an
# array; index it by $t$.)

# %%
first_t = {"linear": ..., "scaled linear": ..., "cosine": ...}
check.crossing(first_t, schedules)

# %% [markdown]
# **1.3** The jump starts at 0. Write one that starts anywhere: from $x_s$ at time $s$ to $x_t$ at time $t > s$,
# given $\bar\alpha_s$ and $\bar\alpha_t$. (Which product of $\alpha$ lies between $s$ and $t$?)


# %%
def jump(x_s, alpha_bar_s, alpha_bar_t, eps):
    return ...


check.jump_between(jump)

# %% [markdown]
# ## Where to go on
#
# The forward process is `minidiff/diffusion.py`, the schedules are `minidiff/schedule.py`. Next: [2. Autograd
# from nothing](02_autograd.ipynb), the machinery that will train a network to undo all this.
