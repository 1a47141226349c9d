# %% [markdown]
# # 13. Stable Diffusion with our code
#
# Everything so far was small: one or two shapes, a few million weights, words from a list. Stable Diffusion draws what
# you ask for, with a billion weights that took a cluster weeks to train. Is it another kind of thing? No. This notebook
# loads a folder of it into the very classes of the last notebooks, and the very loop of notebook 7 draws.
#
# **What you will learn**
#
# - what is in the folder of a published model, and what each file becomes;
# - how a text of any words is spelt in pieces that a vocabulary of fixed size holds;
# - what is larger in Stable Diffusion, and what is the same;
# - why a better sampler needs fewer steps, measured;
# - the traps on the way from somebody else's file to the same numbers.
#
# You need notebooks 7 (the reverse process), 8 (text to image) and 9 (latent space). If you have a folder of Stable
# Diffusion 1 or 2 as the library [diffusers](https://github.com/huggingface/diffusers) saves it, name it in the second
# cell and all pictures are its own. Without one the notebook makes a folder of the same structure, tiny and with
# random weights: every part, file and step is there, only smaller, and what it draws is nothing.

# %%
from course import begin, figure, source, table

begin(13, "kernels", "model")

# %%
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from folder_13 import (
    CORPUS,
    MERGES,
    VERSION_1,
    VERSION_2,
    contents,
    learned_merges,
    millions,
    tiny_folder,
)
from minidiff import plotting
from minidiff.pretrained import export_folder, load_pipeline
from minidiff.train import load_model

MY_FOLDER = os.environ.get("STABLE_DIFFUSION", "")  # for instance "stable-diffusion-v1-5"

folder = Path(MY_FOLDER) if MY_FOLDER else tiny_folder()
print("weights:", folder if MY_FOLDER else "none given; a tiny model with random ones")

# %% [markdown]
# ## What is in the folder
#
# A published model is a folder with a part in each subfolder. A part has a `config.json`, which says how large each
# layer is, and its weights in a file that ends in `.safetensors`: a list of names, shapes and places, then the numbers
# one after the other. It holds nothing else. (The older `.ckpt` and `.bin` files are *pickles*: reading one runs
# whatever program somebody put in. They are refused here.)

# %%
table(["file", "size", "becomes"], contents(folder))
pipe = load_pipeline(folder)

# %% [markdown]
# That was all: `pipe` has the parts that we know.
#
# - `pipe.text_encoder` is the `TextEncoder` of notebook 8. Stable Diffusion 1 took it from CLIP, a model that had
#   learned which captions belong to which pictures ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)).
# - `pipe.unet` is the `UNet` of notebook 5, with cross-attention at three of its four levels.
# - `pipe.vae` is the `VAE` of notebook 9: in the real one it turns 512 x 512 pixels with 3 colours into 64 x 64
#   positions with 4 numbers each.
# - `pipe.tokenizer` cuts texts, in a new way (below).
#
# How large are they? The code below builds the real ones from their sizes, without any memory for the weights, and
# counts.

# %%
model, config = load_model()  # the small one that comes with minidiff
small = [
    sum(p.data.size for p in part.parameters()) / 1e6
    for part in (model.text_encoder, model.unet)
]
counts = {
    "ours, shapes": [*small, 0],
    "Stable Diffusion 1.5": millions(VERSION_1),
    "Stable Diffusion 2.1": millions(VERSION_2),
}
table(
    ["model", "text encoder", "U-Net", "VAE", "together (millions)"],
    [[name, *(f"{n:,.1f}" for n in row), f"{sum(row):,.1f}"] for name, row in counts.items()],
)
figure(
    plotting.bars(
        ["text encoder", "U-Net", "VAE"], counts, "millions of parameters", log=True,
        title="The same parts, larger",
    ),
    "Parameters of each part, on a logarithmic axis. Ours has no VAE: its pictures are small enough.",
)  # fmt: skip

# %% [markdown]
# ## From their layout to ours
#
# The numbers in the file belong to networks that were written with another library, which orders them in another way. A
# convolution's weights are stored as (out, in, height, width); ours are (height, width, in, out), because our images
# have their channels last (notebook 3). A linear layer's are stored as (out, in); ours are (in, out), so that a layer
# is `x @ w`. Everything else is alike, and each weight's name is the path to it in our own modules.

# %%
from minidiff.pretrained.weights import open_weights, our_axes

source(our_axes)
stored = open_weights(folder / "unet", "diffusion_pytorch_model")
ours = dict(pipe.unet.named_parameters())
names = [
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "mid_block.resnets.0.norm1.weight",
]
table(
    ["in the file", "ours", "name"],
    [[stored[name].shape, ours[name].data.shape, f"`{name}`"] for name in names],
)

# %% [markdown]
# `attn2.to_k` is the layer that makes keys from the words: in our layout it has as many rows as a token has
# numbers.
#
# The file is not read in one piece but *mapped*: the system shows it as if it were memory, and fetches a part of it when
# it is looked at. Each weight is turned round as it is read, so that the whole is in memory only once.
#
# ## Words in pieces
#
# Our models have a list of words: the small one refuses all others, those of notebook 12 read them as "unknown".
# CLIP's tokenizer can write *any* text with 49,408 tokens. Its idea, **byte-pair encoding**, was made to compress
# files (Gage 1994), and was taken up for language in 2016 ([Sennrich et al.](https://arxiv.org/abs/1508.07909)).
# Begin with single characters (more exactly with bytes, of which every text is made). Look in a large pile of
# text for the pair of neighbours that occurs most often, join it to a new token, and do that again, and again.
# Frequent words become one token, rare ones stay in pieces.
#
# Below it is done with a few sentences. `</w>` marks the end of a word, so that "cat" in "cat" and in "catalogue"
# can be told apart.

# %%
source(learned_merges)
print(CORPUS, "\n")
merges = learned_merges(CORPUS, MERGES)
for first in (0, 30, 90):
    print(
        f"merges {first} to {first + 7}:",
        ", ".join(a + "+" + b for a, b in merges[first : first + 8]),
    )

# %% [markdown]
# The first merges join what is frequent in any English text, the later ones whole words of this one. To cut a new word,
# the same merges are applied in the order in which they were learned:

# %%
from minidiff.text.bpe import merge_pairs

source(merge_pairs)
tokens = {i: token for token, i in pipe.tokenizer.ids.items()}
rows = []
for word in ("cat", "photograph", "photographers", "mountain", "naïve", "猫"):
    ids = pipe.tokenizer.word_ids(word)
    rows.append([word, " · ".join(f"`{tokens[i]}`" for i in ids), ids])
table(["word", "pieces", "ids"], rows)

# %% [markdown]
# What is outside of the alphabet that we know falls apart into bytes: two for ï, three for 猫. (Each of the 256
# byte values has a printable character that stands for it, and these are what the table shows.) Nothing is
# unknown.
#
# A prompt is these ids between a start and an end token, and filled up to a fixed length $L$ (77 in CLIP, 24 in
# the tiny one). Unlike ours, Stable Diffusion has no mask for the filling: it was trained with the padding in
# view, so it must be used with it.

# %%
prompt = "a painting of a cat in the mountains"
ids, _ = pipe.tokenizer([prompt], pipe.text_encoder.config.context)
print(ids)
vectors, mask = pipe.condition([prompt])
print("the tokens' vectors:", vectors.shape, "- mask:", mask)

# %% [markdown]
# ## The same loop
#
# `pipe.denoise` is a generator, like `minidiff.sample.denoise`: it yields every step. Its code is the walk of
# notebook 7, and it calls the very samplers:

# %%
from minidiff.pretrained import Pipeline

source(Pipeline.denoise)

# %% [markdown]
# One idea in it is new. A **negative prompt** is a text that stands in place of the empty caption of guidance
# (notebook 8): $\tilde\varepsilon = \varepsilon_\text{negative} + w\,(\varepsilon_\text{cond} -
# \varepsilon_\text{negative})$. With $w > 1$ the picture is pushed away from it.
#
# Where do the seconds go? The text is encoded once, the U-Net runs at every step, and the VAE decodes once, at the end:

# %%
began = time.perf_counter()
pipe.condition([prompt, ""])
times = {"text encoder, once": time.perf_counter() - began}
began, per_step = time.perf_counter(), []
for step in pipe.denoise(prompt, steps=6, guidance=7.5, negative_prompt="", seed=1):
    per_step.append(time.perf_counter() - began)
    began, last = time.perf_counter(), step.x_prev
times["U-Net, 20 steps"] = 20 * float(np.median(per_step))
began = time.perf_counter()
images = pipe.decode(last)
times["VAE, once"] = time.perf_counter() - began
print("latents", last.shape, "-> pixels", images.shape)
figure(
    plotting.bars(list(times), {"measured here": [1000 * s for s in times.values()]}, "milliseconds",
                  title="Where the time of a picture in 20 steps goes"),
    "Times with the folder that is loaded above. In the tiny model much of it is Python's; in the real one nearly all is "
    "the U-Net's convolutions and attention.",
)  # fmt: skip

# %% [markdown]
# The real one, measured beside diffusers at full size (`python benchmarks/bench_pretrained.py`, with random
# weights, on the machine named in the file). Times are medians, with the quartiles in brackets (notebook 11);
# *its best way* is the memory layout in which diffusers was faster; memory is the most that the process had held
# until then (ours reads all weights when it loads). Below are the largest differences between the two: `tokens`
# of the text encoder, `answer` of the U-Net, `latents` after some steps, `images` decoded.

# %%
from IPython.display import Markdown, display

results = sorted((Path.cwd().parent / "benchmarks" / "results").glob("pretrained-*.md"))
for file in results:
    display(Markdown(f"`{file.name}`\n\n{file.read_text()}"))
if not results:
    print("not measured yet")

# %% [markdown]
# ## A folder of our own
#
# `minidiff export` writes our model in the same layout, so that diffusers loads its parts. (There is no `vae/`:
# our U-Net predicts the pixels themselves, 4 x 4 of them as the 48 channels of a position, and `decode` only puts
# them back in place. And the tokenizer is our list of words.) And what it writes, `load_pipeline` reads: here is
# the small model of the last notebooks, by way of a folder, drawing through the same pipeline.

# %%
home = Path(tempfile.mkdtemp()) / "shapes"
export_folder(model, home)
print(*sorted(str(p.relative_to(home)) for p in home.rglob("*.*")), sep="\n")
shapes_pipe = load_pipeline(home)
caption = "a red circle above a blue square"
steps = list(shapes_pipe.denoise(caption, steps=8, guidance=3.0, seed=4, sampler="ddim"))
figure(
    plotting.filmstrip(
        [shapes_pipe.decode(s.x_t)[0] for s in steps],
        [shapes_pipe.decode(s.x0)[0] for s in steps],
        [s.t for s in steps],
        caption,
    ),
    "Eight steps of DDIM with the exported model: what a step sees, and the image that it predicts.",
)

# %% [markdown]
# ## How many steps?
#
# Stable Diffusion's U-Net takes seconds a step on a processor, so it matters how many there are. DDIM with few steps is
# wrong because it goes straight ahead where the path bends: in each step it takes the predicted noise for constant.
# Better **solvers** do something about it (the path from noise to image is the solution of a differential
# equation, and a sampler without fresh noise solves it step by step):
#
# - `heun` looks at the end of its step too, and takes the mean of both directions: two calls of the network a step
#   ([Karras et al. 2022](https://arxiv.org/abs/2206.00364));
# - `dpm++2m` remembers the image predicted one step ago, and goes on in the direction in which it is changing, at no
#   further call ([Lu et al. 2022](https://arxiv.org/abs/2211.01095));
# - `unipc` also corrects each step by what the next one sees ([Zhao et al. 2023](https://arxiv.org/abs/2302.04867)).
#
# Each is a few lines. `dpm++2m` in symbols: with $\lambda_t = \ln\sqrt{\bar\alpha_t/(1-\bar\alpha_t)}$, half the
# logarithm of the signal-to-noise ratio, a step from $t$ to $t_\text{prev}$ is $h = \lambda_{t_\text{prev}} -
# \lambda_t$ long. Where DDIM's step uses the predicted image $x_0$, this one uses $D = x_0 +
# \frac{h}{2\,h_\text{before}}\,(x_0 - x_{0,\text{before}})$:

# %%
from minidiff.samplers import dpmpp_2m

source(dpmpp_2m)

# %% [markdown]
# (`_towards(D, ...)` is DDIM's step with `D` as the image. The last step, to the image itself, has an infinite $h$, and
# takes $D = x_0$.)
#
# All of them end at the same picture if only the steps are short enough. How far from it are they with few? The
# picture with 100 steps of `heun` is taken for the truth; the error is the root of the mean squared difference of
# the pixels, and of six captions the median. Where a solver's steps lie matters too, so all get the same ends:
# noise levels $\sigma = \sqrt{(1-\bar\alpha_t)/\bar\alpha_t}$ (not the $\sigma_t$ of notebook 7) from 80 to 0.02,
# and from there to the image in one step. In between they are even in $\sigma^{1/7}$ (Karras et al., equation 5):
# so more of them lie where there is little noise than if they were even in $\sigma$.

# %%
from minidiff.samplers import SAMPLERS
from minidiff.schedule import karras_levels
from minidiff.tensor import no_grad

source(karras_levels)
captions = [
    caption,
    "a large green triangle",
    "a small yellow circle left of a red square",
    "a small purple triangle",
    "a blue circle",
    "a large yellow square below a small red circle",
]
with no_grad():
    tokens, mask = model.condition(captions)
x_T = np.random.default_rng(4).standard_normal((len(captions), *model.latent_shape), np.float32)


def walk(name, steps):
    """The end of a walk from x_T in so many steps, as pixels."""
    levels = [*model.schedule.t_at(karras_levels(80.0, 0.02, steps)), 0]
    *_, end = SAMPLERS[name](model, x_T, (tokens.data, mask), None, 1.0, levels, model.schedule)
    return model.decode(end.x_prev)


truth = walk("heun", 100)
errors, calls_a_step = {}, {"euler": 1, "heun": 2, "dpm++2m": 1, "unipc": 1}
budget = (8, 12, 16, 24, 32, 48)
for name, each in calls_a_step.items():
    off = [walk(name, calls // each) - truth for calls in budget]
    errors[name] = (
        budget,
        [float(np.median(np.sqrt(np.mean(d**2, axis=(1, 2, 3))))) for d in off],
    )
chart = plotting.line_plot(
    errors,
    "calls of the network",
    "error (RMS of pixels in -1..1)",
    "Error against work",
    marker="o",
    log="xy",
)
chart.axes[0].set_xticks(budget, budget)
chart.axes[0].minorticks_off()
figure(
    chart,
    "The distance from the exact path's end, without guidance. Both axes are logarithmic. `euler` with these steps is what "
    "`ddim` is. Where a line is twice as steep, doubling the calls divides the error by four instead of by two.",
)
table(
    ["solver", "calls a step", *(f"error with {n} calls" for n in (8, 16, 32)), "slope from 16 to 32"],
    [
        [name, calls_a_step[name], *(f"{off[budget.index(n)]:.4f}" for n in (8, 16, 32)),
         f"{np.log2(off[budget.index(16)] / off[budget.index(32)]):.1f}"]
        for name, (_, off) in errors.items()
    ],
)  # fmt: skip

# %% [markdown]
# On logarithmic axes the slope is the solver's *order*: when the steps are half as long, an error of first order halves,
# one of second order falls to a quarter, one of third order to an eighth. The order shows only where the steps are short
# enough; with a handful, all of them guess, and the one that asks twice a step guesses half as often. At the other end no
# line can be trusted below the error of the truth itself. (`tests/test_sampler_order.py` measures the orders on a problem
# whose solution is known.)
#
# ## Traps
#
# What others fell into on the way from a folder to the right picture, each a test of ours:
#
# - `attention_head_dim: 8` in a text-conditioned U-Net means *eight heads*, whatever their size; in an unconditional
#   one it means heads *of size* eight. The name is an old mistake that too many files rely on.
# - Time: diffusers counts $t$ from 0, papers and this library from 1. One off, and every step is a little wrong.
# - The last step: some samplers end at the smallest noise of the table and leave it in the picture.
# - Stable Diffusion's schedule does not end in pure noise: some of the image is left at $t = T$, but sampling starts
#   with none. So it can draw neither very dark nor very bright pictures
#   ([Lin et al. 2023](https://arxiv.org/abs/2305.08891)).

# %%
from minidiff.schedule import cosine, scaled_linear, zero_terminal_snr

theirs = scaled_linear(1000)
schedules = {
    "Stable Diffusion's": theirs.alpha_bar,
    "the same, rescaled": zero_terminal_snr(theirs).alpha_bar,
    "cosine": cosine(1000).alpha_bar,
}
source(zero_terminal_snr)
table(
    ["schedule", "signal left at T: the root of alpha_bar"],
    [[name, f"{np.sqrt(a[-1]):.2g}"] for name, a in schedules.items()],
)
figure(
    plotting.schedule_plot(schedules),
    "How much of the image is left at each time. Rescaled, the schedule ends at 0, beyond what the right panel can show.",
)

# %% [markdown]
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in
# `solutions/n13_stable_diffusion.py`.
#
# **13.1** Turn stored weights into our layout: `array` is a convolution's (out, in, height, width), a linear layer's
# (out, in), or a vector. Embedding tables, which are stored as they are used, do not come here.

# %%
from exercises import n13_stable_diffusion as check


def in_our_order(array):
    return ...


check.layout(in_our_order)

# %% [markdown]
# **13.2** How many heads has each level? `kind` is the class in the file: "UNet2DConditionModel" is conditioned
# on text, "UNet2DModel" is not. `channels` is the width of each level, and `attention_head_dim` a number, a list
# with one for each level, or None (in "UNet2DModel": one head, as wide as the level).


# %%
def heads_of(kind, channels, attention_head_dim):
    """kind: "UNet2DConditionModel" or "UNet2DModel". Returns a list with one number a level."""
    return ...


check.heads(heads_of)

# %% [markdown]
# **13.3** Spell a word: `symbols` are its characters (the last with `</w>`), `merges` the learned pairs, the first
# learned first. Join the pair that was learned first wherever it stands, until no learned pair is left.


# %%
def spell(symbols, merges):
    return ...


check.spelling(spell)

# %% [markdown]
# ## Where to go on
#
# `minidiff/pretrained/` reads and writes such folders, `docs/pretrained.md` in the repository says what is read, how
# fast it is, and what is not there. From the command line: `minidiff sample "a photo of a cat" --pretrained FOLDER`.
