# %% [markdown]
# # 7. The reverse process
#
# We have a network that sees a noisy image and tells its noise. How does a picture come out of that? By going back from
# noise to image in small steps. At each step the network is asked again, a part of the noise it names is taken away,
# and a little fresh noise is added. This notebook derives that step, takes it apart, and watches a picture appear.
#
# **What you will learn**
#
# - where $x_{t-1}$ can have been, if $x_t$ and $x_0$ are known: a product of two bell curves;
# - how the formula of one reverse step follows, and what each of its factors is for;
# - the seven parts of a step, each as numbers and as a picture;
# - what early, middle and late steps do, measured;
# - two samplers: DDPM, which adds noise at every step, and DDIM, which does not.
#
# You need notebook 1 (the forward process) and notebook 6 (what the network predicts, and how the image follows from
# it).

# %%
from course import begin, built, close, figure, source, table

begin(7, "widgets", "model")

# %%
from importlib.util import find_spec
from itertools import pairwise

import numpy as np

from drawing_07 import bells, by_band, normal_density, panels, seven_parts, spread, step_button
from minidiff import plotting, samplers
from minidiff.config import SampleConfig
from minidiff.data import shapes
from minidiff.diffusion import (
    DenoiseStep,
    denoise_step,
    mu_theta,
    posterior,
    predict_x0,
    q_sample,
    sigma,
)
from minidiff.sample import denoise, draw
from minidiff.schedule import Schedule
from minidiff.tensor import no_grad
from minidiff.train import load_model

rng = np.random.default_rng(0)
model, config = load_model()
sched = model.schedule  # the cosine schedule, T = 1000
alpha_bar = sched.alpha_bar


def as_cond(captions):
    """The captions as the network takes them (notebook 8 shows how they are made)."""
    with no_grad():
        tokens, mask = model.condition(captions)
    return tokens.data, mask


# %% [markdown]
# ## Backwards
#
# The forward process draws $x_t$ from $q(x_t \mid x_{t-1})$. We want the opposite: from $x_t$ draw an $x_{t-1}$ that
# may have led to it. The reverse process, called $p_\theta$ because it has the network's weights $\theta$ in it, does
# this with a normal distribution:
#
# $$p_\theta(x_{t-1} \mid x_t) = \mathcal{N}\big(x_{t-1};\ \mu_\theta(x_t, t),\ \Sigma_\theta(x_t, t)\big)$$
#
# - $\mu_\theta$ (mu) is its mean: our best idea of $x_{t-1}$;
# - $\Sigma_\theta$ (capital sigma) its variance. As in [DDPM](https://arxiv.org/abs/2006.11239) we take $\Sigma_\theta
#   = \sigma_t^2 I$: one number for each time, the same for all pixels, and not learned.
#
# Is a normal distribution right? Take the world of notebook 6 again: one pixel, three possible images, $-0.8$, $0.1$
# and $0.9$. We are at $t = 500$ and see $x_t = 0.2$. If the image were $x_0$, the previous $x$ would have a normal
# distribution (next section). As there are three possible images it is a mixture of three, weighted by how probable
# each is. A short step and a long one:

# %%
points, t, seen = np.array([-0.8, 0.1, 0.9]), 500, 0.2
a = alpha_bar[t]
weights = np.exp(-((seen - np.sqrt(a) * points) ** 2) / (2 * (1 - a)))
weights /= weights.sum()
charts = {}
for t_prev in (480, 100):
    means, variance = posterior(points, np.full(3, seen), t, sched, t_prev)
    middle = weights @ means
    total = variance + weights @ (means - middle) ** 2
    xs = np.linspace(middle - 3.5 * np.sqrt(total), middle + 3.5 * np.sqrt(total), 400)
    charts[f"from 500 to {t_prev}"] = {
        "the truth": (xs, normal_density(xs[:, None], means, variance) @ weights),
        "normal, same mean and variance": (xs, normal_density(xs, middle, total)),
    }
figure(
    panels(charts, "x at the earlier time", "density", "True and normal distribution of x"),
    "Where x can have been, seen from t = 500. For a short step the truth is a bell curve; "
    "for a long one it is not.",
)

# %% [markdown]
# That is why sampling takes steps. One leap from noise to image would need a distribution with a peak for every
# possible image. For a short step a bell curve is right, whatever the images are.
#
# ## If the image were known
#
# Let us pretend that we know $x_0$. Then we know two things about $x_{t-1}$:
#
# - it comes from $x_0$ by a jump: $q(x_{t-1} \mid x_0) = \mathcal{N}(\sqrt{\bar\alpha_{t-1}}\,x_0,\
#   1-\bar\alpha_{t-1})$;
# - one step leads from it to the $x_t$ we see: $q(x_t \mid x_{t-1}) = \mathcal{N}(\sqrt{\alpha_t}\,x_{t-1},\ \beta_t)$.
#   Read as a statement about $x_{t-1}$, it is a bell curve around $x_t/\sqrt{\alpha_t}$ with the variance
#   $\beta_t/\alpha_t$.
#
# Both must hold, so (Bayes' rule) the densities are multiplied:
#
# $$q(x_{t-1} \mid x_t, x_0) \;\propto\; q(x_t \mid x_{t-1})\; q(x_{t-1} \mid x_0)$$
#
# ($\propto$, proportional to: equal up to a factor that does not depend on $x_{t-1}$.) A product of two bell
# curves is a bell curve again: in the exponents stand parabolas, and the sum of two parabolas is a parabola. With
# means $m_1, m_2$ and variances $v_1, v_2$ it has
#
# $$\frac1v = \frac1{v_1} + \frac1{v_2}, \qquad m = v\left(\frac{m_1}{v_1} + \frac{m_2}{v_2}\right)$$
#
# so the mean lies between, nearer to the narrower curve. With numbers, for one pixel, $x_0 = 0.6$ and $x_t = -0.3$. To
# have something to see we take a longer step, from $t = 500$ to $t_\text{prev} = 350$. Nothing changes but the
# step's own numbers, $\alpha$ and $\beta$ (exercise 7.3 asks where they come from):

# %%
source(Schedule.between)

# %%
t, t_prev, known_x0, known_x_t = 500, 350, 0.6, -0.3
beta, alpha, a, a_prev = sched.between(t, t_prev)
m1, v1 = np.sqrt(a_prev) * known_x0, 1 - a_prev  # from x_0
m2, v2 = known_x_t / np.sqrt(alpha), beta / alpha  # from x_t
v = 1 / (1 / v1 + 1 / v2)
m = v * (m1 / v1 + m2 / v2)
table(
    ["", "mean", "variance"],
    [["from x_0", f"{m1:.3f}", f"{v1:.3f}"], ["from x_t", f"{m2:.3f}", f"{v2:.3f}"],
     ["product", f"{m:.3f}", f"{v:.3f}"]],
)  # fmt: skip
figure(
    bells({"from x_0": (m1, v1), "from x_t": (m2, v2), "product": (m, v)}, "x at t = 350",
          "Two bell curves and their product"),
    "What x_0 says about x at t = 350, what x_t says, and both together: in between, and "
    "narrower.",
)  # fmt: skip

# %% [markdown]
# Put the symbols in. The variance, using $\beta_t + \alpha_t(1-\bar\alpha_{t-1}) = 1 - \bar\alpha_t$:
#
# $$\frac1v = \frac{1}{1-\bar\alpha_{t-1}} + \frac{\alpha_t}{\beta_t}
# = \frac{1-\bar\alpha_t}{(1-\bar\alpha_{t-1})\,\beta_t}
# \qquad\Rightarrow\qquad v = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t$$
#
# And the mean:
#
# $$m = v\left(\frac{\sqrt{\bar\alpha_{t-1}}\,x_0}{1-\bar\alpha_{t-1}} + \frac{\sqrt{\alpha_t}\,x_t}{\beta_t}\right)
# = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t\;x_0 + \sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})\;x_t}{1-\bar\alpha_t}$$
#
# This distribution is called the **posterior**: what is known about $x_{t-1}$ after both ends have been seen.

# %%
source(posterior)

# %%
mean, variance = posterior(np.array([known_x0]), np.array([known_x_t]), t, sched, t_prev)
assert close(mean, [m]) and close(variance, v)
print(f"the library's: mean {mean[0]:.3f}, variance {variance:.3f}")

# %% [markdown]
# ## The image is not known, but predicted
#
# We do not know $x_0$. But we have a network that tells the noise, and from $x_t$ and the noise follows the image: $x_0
# = (x_t - \sqrt{1-\bar\alpha_t}\,\varepsilon_\theta)/\sqrt{\bar\alpha_t}$. Put this into the posterior's mean. Two
# terms with $x_t$:
#
# $$\frac{x_t}{1-\bar\alpha_t}\left(\frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{\sqrt{\bar\alpha_t}} +
# \sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})\right) = \frac{x_t}{1-\bar\alpha_t}\cdot
# \frac{\beta_t + \alpha_t - \bar\alpha_t}{\sqrt{\alpha_t}} = \frac{x_t}{\sqrt{\alpha_t}}$$
#
# (because $\sqrt{\bar\alpha_{t-1}}/\sqrt{\bar\alpha_t} = 1/\sqrt{\alpha_t}$, and $\beta_t + \alpha_t = 1$). One term
# with the noise:
#
# $$-\frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\cdot\frac{\sqrt{1-\bar\alpha_t}}{\sqrt{\bar\alpha_t}}
# \;\varepsilon_\theta = -\frac{\beta_t}{\sqrt{\alpha_t}\,\sqrt{1-\bar\alpha_t}}\;\varepsilon_\theta$$
#
# Together, the formula of the reverse process:
#
# $$\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}}\left(x_t -
# \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\varepsilon_\theta(x_t, t)\right)$$
#
# Read it as two moves: take away a part of the predicted noise, then undo the shrinking of the forward step. The part
# is small: all the noise in $x_t$ is $\sqrt{1-\bar\alpha_t}\,\varepsilon$, and of that only the share
# $\beta_t/(1-\bar\alpha_t)$ is removed.

# %%
source(mu_theta)

# %%
images, captions = shapes.batch(16, np.random.default_rng(1), "val")
x0 = model.encode(images).astype(np.float64)
x_t = q_sample(x0, 500, rng.standard_normal(x0.shape), sched)
eps = model(x_t.astype(np.float32), np.full(16, 500), as_cond(captions)).astype(np.float64)
for t_prev in (499, 480, 0):
    by_formula = mu_theta(x_t, 500, eps, sched, t_prev)
    by_posterior, _ = posterior(predict_x0(x_t, 500, eps, sched), x_t, 500, sched, t_prev)
    assert close(by_formula, by_posterior, 1e-9)
    print(f"500 -> {t_prev}: largest difference {np.abs(by_formula - by_posterior).max():.0e}")

# %%
rows = []
for t in (1000, 900, 700, 500, 300, 100, 20):
    beta, alpha, a, _ = sched.between(t, t - 20)
    rows.append(
        [f"{t} to {t - 20}", f"{100 * beta / (1 - a):.0f}%", f"{1 / np.sqrt(alpha):.3g}"]
    )
table(["step, of 50 in all", "removed, of the noise in x_t", "then multiplied by"], rows)

# %% [markdown]
# Read it from below. The last step removes all the noise that is left. Those in the middle remove a small part and make
# the rest a little larger. The very first is special: the cosine schedule ends in nearly pure noise, $\bar\alpha_T
# \approx 0$, so $x_T$ says nothing. When its noise is removed, all that is left is a faint trace of the predicted
# image, and the large factor brings it to the size that it has at the next time. What follows comes from the
# predicted image and fresh noise.
#
# ## How much noise to add
#
# The mean is not enough: to draw from the distribution we add $\sigma_t z$, with fresh standard noise $z$. How large is
# $\sigma_t$? There are two answers, for two extreme worlds:
#
# - *small*: $\sigma_t^2 = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t$, the posterior's variance. Right if
#   $x_0$ is known, as if there were only one image;
# - *large*: $\sigma_t^2 = \beta_t$. Right if images are themselves standard noise, the most uncertain world.
#
# The truth lies between. With many short steps the two are nearly equal, except at the very end.
#
# There is also a simple account to keep. In $x_t$ the noise has the deviation $\sqrt{1-\bar\alpha_t}$. The step takes a
# part of it away and enlarges the rest. Then fresh noise must bring it to $\sqrt{1-\bar\alpha_{t-1}}$, which is what
# the network expects at the earlier time. The small $\sigma_t$ is exactly what is missing:

# %%
source(sigma)

# %%
rows = []
for t in (980, 600, 300, 100, 20):
    beta, alpha, a, a_prev = sched.between(t, t - 20)
    rest = np.sqrt(1 - a) * (1 - beta / (1 - a)) / np.sqrt(alpha)
    fresh = sigma(t, sched, "small", t - 20)
    assert close(rest**2 + fresh**2, 1 - a_prev, 1e-9)  # variances add
    rows.append([f"{t} to {t - 20}", *(f"{x:.3f}" for x in (np.sqrt(1 - a), rest, fresh,
                                                           np.sqrt(1 - a_prev)))])  # fmt: skip
table(
    [
        "step",
        "noise in x_t",
        "of it left, enlarged",
        "fresh noise",
        "together: root of the sum of squares",
    ],
    rows,
)

# %%
curves = {}
for count in (10, 50):
    pairs = list(pairwise(samplers.spaced_timesteps(sched.T, count)))
    for kind in ("small", "large"):
        values = [float(sigma(t, sched, kind, t_prev)) for t, t_prev in pairs]
        curves[f"{kind}, {count} steps"] = ([t for t, _ in pairs], values)
figure(
    panels({"": curves}, "t at the start of the step", "sigma", "Sigma by time"),
    "The deviation of the fresh noise, with few long steps and with many short ones. Only the "
    "small one falls to 0 at the end.",
)

# %% [markdown]
# ## One step, taken apart
#
# Now a step in full. It needs the model, the noisy image, the time and the caption, and does seven things:
#
# 1. take the current noisy image $x_t$;
# 2. turn the time $t$ into a vector (notebook 5), which goes into every residual block;
# 3. turn the caption into vectors, one for each word, which the network's features look at by cross-attention
#    (notebook 4; how the vectors are made is in notebook 8);
# 4. run the network: the predicted noise $\varepsilon_\theta$;
# 5. remove a scaled part of it;
# 6. add fresh noise;
# 7. the result is $x_{t-1}$: slightly less noisy, slightly more of a picture.

# %%
source(DenoiseStep, denoise_step)

# %% [markdown]
# Two arguments to pass over: `w` and `uncond` belong to guidance, which makes the picture obey the caption more and is
# notebook 8's subject; here it is off (`w = 1`). `clip` holds the predicted image within $\pm1$, where all images lie,
# and corrects the noise accordingly: it keeps errors from growing.
#
# The whole reverse process is a loop around this one function. 20 to 50 times is usual; here it is 25.


# %%
def by_hand(caption, count, seed):
    """The reverse process of one picture in `count` steps: (t, t_prev, step) for each."""
    noise = np.random.default_rng(seed)
    x = noise.standard_normal((1, *model.latent_shape), dtype=np.float32)  # x_T: pure noise
    cond = as_cond([caption])
    for t, t_prev in pairwise(samplers.spaced_timesteps(sched.T, count)):
        z = noise.standard_normal(x.shape, dtype=np.float32)
        step = denoise_step(model, x, t, cond, None, 1.0, z, sched, t_prev, clip=1.0)
        yield t, t_prev, step
        x = step.x_prev


caption = "a red circle above a blue square"
walk = list(by_hand(caption, 25, seed=3))
t, t_prev, step = next((t, p, step) for t, p, step in walk if t <= 600)
figure(
    seven_parts(step, t, t_prev, model, caption),
    f"The step from t = {t} to {t_prev}, for “{caption}”. Numbers are scaled to be seen, as "
    "noted; in 2 and 3 orange is above 0, purple below, and the time's numbers are laid out in "
    "rows. Last: the image that x_t and the predicted noise imply.",
)

# %%
rows = [
    ["1", "x_t", "the noisy image", step.x_t],
    ["2", "t_emb", "the time as a vector", step.t_emb],
    ["3", "cond", "the caption's vectors", step.cond[0]],
    ["4", "eps", "the predicted noise", step.eps],
    ["5", "removed", "the part of it that is taken away", step.removed],
    ["6", "added", "fresh noise", step.added],
    ["7", "x_prev", "the result", step.x_prev],
]
table(
    ["part", "name", "what", "shape", "root of the mean square"],
    [
        [n, f"`{name}`", what, x.shape, f"{np.sqrt(np.mean(x**2)):.3f}"]
        for n, name, what, x in rows
    ],
)
_, alpha, _, _ = sched.between(t, t_prev)
assert close(step.x_prev, (step.x_t - step.removed) / np.sqrt(alpha) + step.added, 1e-5)
assert close(step.x_prev, mu_theta(step.x_t, t, step.eps, sched, t_prev) + step.added, 1e-5)

# %% [markdown]
# The caption has the shape (1, 12, 64): one caption, room for 12 words (unused places are masked), 64 numbers each. The
# noisy image is (8, 8, 48) because each patch of 4 x 4 pixels is one position; `model.decode` makes it 32 x 32 x 3.
#
# More noise is added (6) than is removed (5), and still $x_{t-1}$ has less of it. What is removed lies along the
# noise that is there (as far as the network is right), so the two subtract in full. Fresh noise is independent of
# the rest, so only the variances add.
#
# Press the button to go step by step. It draws what the figure above shows, for each step from noise to image.

# %%
if built() or find_spec("ipywidgets") is None:
    print("The button appears in Jupyter, with ipywidgets. The loop below does the same.")
else:
    step_button(
        by_hand(caption, 25, seed=3),
        lambda taken: seven_parts(taken[2], *taken[:2], model, caption),
    )

# %%
told = {
    1000: "The first step. The image it foresees is an average; the next steps will choose.",
    40: "The last step. All noise is removed, and none is added: the result is the image.",
}
for t, t_prev, step in walk:
    if t in told:  # leave this line out to see all 25
        figure(seven_parts(step, t, t_prev, model, caption), told[t])

# %% [markdown]
# The walk on one strip:

# %%
frames = [walk[i] for i in (0, 4, 8, 13, 18)]
last = model.decode(walk[-1][2].x_prev)[0]
noisy = [model.decode(step.x_t)[0] for _, _, step in frames] + [last]
foreseen = [
    model.decode(predict_x0(step.x_t, t, step.eps, sched))[0] for t, _, step in frames
] + [last]
figure(
    plotting.filmstrip(noisy, foreseen, [t for t, *_ in frames] + [0], caption),
    "Six moments of the 25 steps from noise to image. Above what is there, below what the network thinks it "
    "will be.",
)

# %% [markdown]
# The library's `samplers.ddpm` is the same loop. Given the same noises it must give the same picture:

# %%
source(samplers.ddpm)

# %%
noise = np.random.default_rng(3)
x_T = noise.standard_normal((1, *model.latent_shape), dtype=np.float32)
fresh = [noise.standard_normal(x_T.shape, dtype=np.float32) for _ in walk]
levels = samplers.spaced_timesteps(sched.T, len(walk))
*_, end = samplers.ddpm(
    model, x_T, as_cond([caption]), None, 1.0, levels, sched, lambda i: fresh[i], clip=1.0
)
assert close(end.x_prev, walk[-1][2].x_prev, 1e-4)

# %% [markdown]
# ## Early, middle, late
#
# The network never draws. At each step it answers the same question: what here is noise, and what is picture? The
# caption says which picture to look for. Layer by layer the noise is taken away, and what is left is the picture.
#
# When is what decided? Draw 64 pictures in 50 steps and keep the image that is foreseen at each step. Two measurements:
#
# - Take these images apart into long, middle and short waves, as in notebook 1: how strong is the difference of
#   each part from the finished picture? (Strength is squared amplitude, as there.)
# - Let `shapes.judge`, the program of notebook 6 that reads pictures, look at them as if they were finished: in
#   how many are the colours, the places and the shapes those of the caption? (It reads a picture without seeing
#   the caption, then compares.)

# %%
settings = SampleConfig(sampler="ddpm", steps=50, guidance=1.0)
wanted = shapes.held_out_captions(64, seed=1)
foreseen = [model.decode(step.x0) for step in denoise(model, wanted, settings, seed=1)]
finished = foreseen[-1]
bands = {
    "long (1-2 periods across)": (1, 2),
    "middle (3-6)": (3, 6),
    "short (7 or more)": (7, 23),
}
whole = by_band(finished, bands)
left = [by_band(x - finished, bands) for x in foreseen]
number = np.arange(1, len(foreseen) + 1)
remaining = {name: [100 * d[name].mean() / whole[name].mean() for d in left] for name in bands}
readings = [shapes.score(shapes.judge(x, wanted)) for x in foreseen]
asked = {
    "colours": "colours",
    "relation": "places",
    "shapes": "shapes",
    "all_right": "all right",
}
right = {told: [100 * r[name] for r in readings] for name, told in asked.items()}
figure(
    panels(
        {
            "difference from the finished picture": {n: (number, y) for n, y in remaining.items()},
            "what the program reads": {n: (number, y) for n, y in right.items()},
        },
        "step, of 50", ["% of its strength", "% of the pictures right"],
        "What is decided at which step",
    ),
    "Left: how strong the difference of the foreseen image from the finished picture is, by waves. Right: in how "
    "many pictures the program finds what the caption asks for (the lines of colours and "
    "places lie nearly on each other). “All right” also asks for clear outlines and a clean "
    "background. Some pictures are read right on the way and not at the end.",
)  # fmt: skip

# %%
best = int(np.argmax([r["all_right"] for r in readings]))
then, now = (shapes.judge(foreseen[i], wanted) for i in (best, -1))
lost = [i for i in range(len(wanted)) if then[i].all_right and not now[i].all_right]
print(f"right at step {best + 1}, but not at the end: {len(lost)} of {len(wanted)}")
for i in lost:
    read = shapes.read_scenes(finished[[i]])[0]
    found = " and ".join(f"a {o.size} {o.colour} {o.shape}" for o in read.objects)
    print(f"  {wanted[i]}: {read.unclean or f'it reads {found}'}")

# %%
table(
    ["waves", "half is settled at step", "nine tenths at step"],
    [[name, *(int(number[np.argmax(np.array(y) < limit)]) for limit in (50, 10))]
     for name, y in remaining.items()],
)  # fmt: skip
table(
    ["what is right", "in half of the pictures at step", "in four fifths at step"],
    [[name, *(int(number[np.argmax(np.array(y) >= limit)]) for limit in (50, 80))]
     for name, y in right.items()],
)  # fmt: skip

# %%
shown = [0, 6, 12, 18, 30, 49]
right_ones = np.flatnonzero([v.all_right for v in shapes.judge(finished, wanted)])[:2]
figure(
    plotting.image_grid(
        np.stack([foreseen[i][right_ones] for i in shown], axis=1).reshape(-1, 32, 32, 3),
        [f"step {i + 1}" for i in shown] * 2,
        columns=len(shown),
    ),
    f"Foreseen images of two captions: {'; '.join(wanted[i] for i in right_ones)}.",
)

# %% [markdown]
# The first steps establish the composition: where things are, and of what colour. Close behind comes the structure:
# what shape each has. Long after both are decided, the last steps still work on the detail: sharp edges, an even
# background. It is the film of notebook 1 backwards, for the same reason: at much noise only the long waves can be seen
# at all. In a model of photographs the same order would mean: first sky above and ground below, then buildings and
# trees, at last texture and light.
#
# ## DDIM: without fresh noise
#
# Must there be fresh noise? [DDIM](https://arxiv.org/abs/2010.02502) goes another way to the same end. It reads the
# step as: split $x_t$ into predicted image and predicted noise, and mix *these two* again, in the proportions of the
# earlier time:
#
# $$x_{t-1} = \sqrt{\bar\alpha_{t-1}}\;x_0 + \sqrt{1-\bar\alpha_{t-1}-s^2}\;\varepsilon_\theta + s\,z,
# \qquad s = \eta\,\sigma_t$$
#
# - $x_0$ is here the predicted image;
# - $\eta$ (eta; no relation to the learning rate of notebook 2) from 0 to 1 says how much of the noise is
#   replaced by fresh noise $z$. At $\eta = 0$ nothing is random but the start; at $\eta = 1$ this is DDPM with
#   the small $\sigma_t$.

# %%
from minidiff.diffusion import ddim_coefficients, ddim_step

source(ddim_step, ddim_coefficients)

# %%
cond = as_cond([caption])
walks = [
    samplers.ddpm(model, x_T, cond, None, 1.0, levels, sched, lambda i: fresh[i], clip=1.0),
    samplers.ddim(
        model, x_T, cond, None, 1.0, levels, sched, lambda i: fresh[i], eta=1.0, clip=1.0
    ),
]
for one, other in zip(*walks, strict=True):
    assert close(one.x_prev, other.x_prev, 1e-3)
print("With eta = 1 and the same noises, DDIM takes DDPM's steps.")

# %% [markdown]
# ### How many steps?
#
# The same 64 captions and the same starting noise, drawn by both samplers in few and in many steps. The score is
# the share of pictures that are “all right”: everything that the caption says, with clear outlines and a clean
# background.

# %%
captions = shapes.held_out_captions(64, seed=2)
ways = {
    "DDIM": {"sampler": "ddim"},
    "DDPM, small sigma": {"sampler": "ddpm"},
    "DDPM, large sigma": {"sampler": "ddpm", "sigma": "large"},
}
counts = (3, 5, 10, 25, 50, 100)
pictures, rows = {}, []
for count in counts:
    row = [count]
    for name, way in ways.items():
        drawn = draw(model, captions, SampleConfig(steps=count, guidance=1.0, **way), seed=5)
        pictures[name, count] = drawn
        row.append(f"{100 * shapes.score(shapes.judge(drawn, captions))['all_right']:.0f}%")
    rows.append(row)
table(["steps", *ways], rows)

# %%
figure(
    plotting.image_grid(
        np.stack(
            [pictures[name, count][0] for name in list(ways)[:2] for count in counts[::2]]
        ),
        [f"{name}, {count} steps" for name in list(ways)[:2] for count in counts[::2]],
        columns=3,
    ),
    f"“{captions[0]}”, always from the same starting noise: DDIM in 3, 10 and 50 steps, and DDPM, "
    "with fresh noise in between. One picture of each tells little; the table is about 64.",
)

# %% [markdown]
# The share in 64 pictures is not the share in very many. How far it is off typically is its **standard error**,
# $\sqrt{p\,(1-p)/64}$ for a share $p$: at most $\sqrt{0.25/64} \approx 6$ percentage points. So look at the large
# differences only. In three and in five steps DDIM does best, and in three the large deviation worst: fresh noise
# needs later steps that take it away again. From ten steps on all are close, with DDPM a little ahead at every
# number of steps; each of these differences alone is less than twice its standard error. A common explanation
# ([Karras et al. 2022](https://arxiv.org/abs/2206.00364)): fresh noise covers up what earlier steps got wrong, so
# that later steps can correct it. DDIM keeps to what its start suggests. All this is without guidance; notebook 8
# turns it on.
#
# ### Same start, same picture?

# %%
ways = {"DDIM, one x_T": 0.0, "eta = 0.5, one x_T": 0.5, "eta = 1, one x_T": 1.0,
        "DDIM, four x_T": 0.0}  # fmt: skip
levels = samplers.spaced_timesteps(sched.T, 50)
results = {name: [] for name in ways}
for name, eta in ways.items():
    for seed in range(4):
        noise = np.random.default_rng((7, seed))
        fresh = noise.standard_normal((51, *x_T.shape), dtype=np.float32)
        start = fresh[50] if "four" in name else x_T
        *_, end = samplers.ddim(
            model, start, cond, None, 1.0, levels, sched, fresh.__getitem__, eta, clip=1.0
        )
        results[name].append(model.decode(end.x_prev))
figure(
    plotting.image_grid(
        np.concatenate([x for name in list(ways)[:3] for x in results[name]]),
        [f"{name}, no. {i + 1}" for name in list(ways)[:3] for i in range(4)],
        columns=4,
    ),
    f"“{caption}” four times from one x_T: by DDIM (eta = 0), which takes no fresh noise, and "
    "with eta = 0.5 and 1, with four different fresh noises.",
)
table(
    ["", "how much the four differ (deviation of a pixel)"],
    [[name, f"{spread(ends):.3f}"] for name, ends in results.items()],
)

# %% [markdown]
# With DDIM the picture is a function of its starting noise: a seed names a picture, and settings can be compared on the
# same picture. With fresh noise each step is a new throw of the dice, and the pictures differ about as much as those
# from different starts do.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n07_reverse_process.py`.
#
# **7.1** The mean of the reverse step, from its parts.

# %%
from exercises import n07_reverse_process as check


def mean_of_step(x_t, eps, alpha, beta, alpha_bar):
    return ...


check.mean_of_step(mean_of_step)

# %% [markdown]
# **7.2** Finish the step: given $\mu_\theta$, $\sigma_t$ and fresh noise $z$, where does the step from $t$ to `t_prev`
# end? Think of the last one. (With the large $\sigma_t$ it matters.)


# %%
def finish(mu, sigma_t, z, t_prev):
    return ...


check.finish(finish)

# %% [markdown]
# **7.3** A step with a stride goes from $t$ to any $t_\text{prev} < t$. What is its $\beta$? (`Schedule.between`
# has it; try to find it without looking.) `alpha_bar` is the schedule's table, indexed by $t$.


# %%
def beta_of_stride(alpha_bar, t, t_prev):
    return ...


check.beta_of_stride(beta_of_stride)

# %% [markdown]
# ## Where to go on
#
# The equations are in `minidiff/diffusion.py`, the walks in `minidiff/samplers.py`, and `minidiff/sample.py` draws
# whole batches with them. Next: [8. Text to image](08_text_to_image.ipynb), how the words get into the picture.
