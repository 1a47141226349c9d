# %% [markdown]
# # 8. Text to image
#
# So far the caption was something that the network "is told". This notebook follows it all the way: from letters
# to numbers, from numbers to vectors, from vectors into the picture, and at last to the knob that says how loudly
# the caption speaks.
#
# **What you will learn**
#
# - how a caption becomes tokens, and tokens become vectors that know their place and their neighbours;
# - where in the picture each word is looked at, seen from inside the network while it draws;
# - how the same network draws with and without a caption, and why that makes *guidance* possible;
# - what guidance from 0 to 15 does to the pictures, and what it costs in diversity.
#
# You need notebooks 4 (attention), 5 (the U-Net) and 7 (the reverse process). The model is the one that comes
# with minidiff, "the model in the box": it knows one or two objects in six colours, three shapes, two sizes and
# four relations.

# %%
from course import begin, figure, source, table

begin(8, "kernels", "model")

# %%
from dataclasses import replace

import numpy as np

from drawing_08 import matrix, watched_attention, word_maps
from minidiff import no_grad, plotting
from minidiff.data import shapes
from minidiff.sample import denoise, draw
from minidiff.train import load_model

model, config = load_model()
caption = "a red circle above a blue square"
pictures = draw(model, [caption] * 6, config.sample, seed=4)
verdicts = [v.all_right for v in shapes.judge(pictures, [caption] * 6)]
figure(
    plotting.image_grid(pictures, columns=6, verdicts=verdicts),
    f"“{caption}”, drawn six times from six different noises. The caption settles what is "
    "there and how it lies, the noise settles the rest. Ticks and crosses are those of an "
    "exact checker, which reads each picture without its caption and then compares: it "
    f"finds {sum(verdicts)} of these {len(verdicts)} right.",
)

# %% [markdown]
# ## Letters to tokens
#
# A network computes with numbers. The **tokenizer** cuts a caption into **tokens** and gives each its number, its
# place in a fixed vocabulary. Here a token is a word; large models use pieces of words, so that they can spell
# any text. Two tokens more mark the start and the end, and the rest of the row is filled with padding, so that
# captions of all lengths make one array. The **mask** says which tokens are real: attention never looks at
# padding.

# %%
from minidiff.text import WordTokenizer

source(WordTokenizer.__call__)

# %%
ids, mask = model.tokenizer(
    [caption, "a green triangle", ""], model.text_encoder.config.context
)
print(len(model.tokenizer), "tokens in the vocabulary:", " ".join(model.tokenizer.ids))
print(ids)
print(mask.astype(int))

# %% [markdown]
# The last row is the **empty caption**: start, end, and nothing. Remember it; it will be half of guidance.
#
# ## Tokens to vectors
#
# Each of the $L$ tokens of a caption (the places in a row of the array, $L = 12$ here) becomes a vector of $D$
# numbers ($D = 64$). Two tables, learned with everything else, are added: one holds a vector for each word of the
# vocabulary, the other one for each place in the row. Without the second, "red above blue" and "blue above red"
# would be the same bag of words.

# %%
from minidiff.models.text import EncoderLayer, TextEncoder

source(TextEncoder.forward)

# %% [markdown]
# What has training made of the words? Compare the vectors of two words by the cosine of the angle between them: 1
# means the same direction, 0 nothing in common, -1 opposite.


# %%
def cosines(vectors):
    """The cosine of the angle between every two rows."""
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit @ unit.T


words = [
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "triangle",
    "small",
    "large",
    "above",
    "below",
]
vectors = model.text_encoder.token_embedding.weight.data
similarity = cosines(vectors[[model.tokenizer.ids[w] for w in words]])
figure(
    matrix(similarity, words, "cosine"),
    "How alike the learned word vectors are. They began as random numbers, which in 64 "
    "dimensions are all nearly at right angles (cosines of about ±0.1).",
)

# %% [markdown]
# Hardly anything: these words still point in nearly independent directions, which is all that a small vocabulary
# needs. What they *mean* is in what later layers do with them.

# %% [markdown]
# ### Words in their sentence
#
# Then come layers of **self-attention** among the tokens (notebook 4), each followed by two linear layers. They
# are *causal*: a token sees those before it, not those after it. So the vector of "circle" can learn that it is a
# *red* circle:

# %%
source(EncoderLayer.forward)

# %%
circles = ["a red circle", "a green circle", "a blue circle", "a large red circle"]
with no_grad():
    tokens, _ = model.condition(circles)
place = [
    model.tokenizer.split(c).index("circle") + 1 for c in circles
]  # the start token is at 0
encoded = tokens.data[range(len(circles)), place]
alike = cosines(encoded)
figure(
    matrix(alike, circles, "cosine", low=float(alike.min())),
    "The vector of the one word “circle” after the text encoder, in four captions. Before "
    "it, the first three were the same vector. They are still much alike, since all say "
    f"“circle” (mind the scale, which begins at {alike.min():.2f}); but no two are equal: each "
    "carries what was said before it.",
)

# %% [markdown]
# ## Vectors into the picture
#
# In the U-Net the features of the image are the **queries** $Q$, and the tokens give the **keys** $K$ and
# **values** $V$:
#
# $$\text{CrossAttention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt d}\right) V$$
#
# Every position of the image asks "what should I look like?", and gets a mixture of what the words have to say.
# The text does not tell the network what to draw; it narrows down what the noise can turn into.

# %%
from minidiff.models.unet import Attention

source(Attention.forward)

# %% [markdown]
# The weights of that mixture can be watched while the network draws. This model's cross-attention sits at its
# lower level, where the picture is 4 x 4 positions, each an 8 x 8 square of pixels; there are four such layers
# (one on the way down, one at the bottom, two on the way up). `watched_attention` (in `drawing_08.py`) notes the
# weights of every call, with the same functions that compute them in the library.

# %%
with watched_attention() as seen:
    steps = list(denoise(model, [caption], config.sample, seed=1))

# (steps, layers, positions, tokens): of the two halves of the batch the captioned one, mean over heads
weights = np.array(seen).reshape(len(steps), -1, *seen[0].shape)[:, :, 0].mean(axis=2)
names = ["start", *model.tokenizer.split(caption), "end"]
picture = model.decode(steps[-1].x_prev)[0]


def maps(some):
    """Weights (..., positions, tokens) as one 4 x 4 map for each token."""
    return (
        some.reshape(-1, 16, some.shape[-1]).mean(axis=0)[:, : len(names)].T.reshape(-1, 4, 4)
    )


weights.shape

# %%
for layer, where in enumerate(["down", "bottom", "up, first", "up, last"]):
    figure(
        word_maps(picture, maps(weights[:, layer]), names, f"layer {layer} ({where})"),
        "Weights of each token, mean over all steps, laid over the picture: bright where it is "
        f"looked at. The percentages are its share, a mean over the {config.unet.heads[-1]} heads: "
        f"{100 / config.unet.heads[-1]:.0f}% can be one head that looks at nothing else."
        if layer == 0
        else f"The same for layer {layer}.",
    )

# %% [markdown]
# Not every layer looks at the word you would expect. In some, all positions look at the same few tokens: what
# they take from them is a statement about the whole picture, such as how the objects lie, and the start token
# serves as a place to look when there is nothing to ask. In the last layer the maps are *places*: "circle" is
# looked at where the circle is, "square" where the square is. The words that come last see all words before them,
# so "circle" already carries "red", and could stand for both. This network looks at "red" as often as at "circle"
# all the same: nobody prescribed which word it should ask.
#
# While the picture is still noise, there is no circle to look from. Picture and maps find each other, step by
# step:

# %%
early, middle, late = slice(0, 5), slice(15, 25), slice(40, 50)
for span, when in ((early, "first"), (middle, "middle"), (late, "last")):
    guess = model.decode(steps[span.stop - 1].x0)[0]
    figure(
        word_maps(guess, maps(weights[span, -1]), names, f"the last layer in the {when} steps"),
        f"Maps of steps {span.start + 1} to {span.stop} of {len(steps)}, and the image "
        "predicted at their end.",
    )

# %% [markdown]
# In the first steps the maps are broad, and the words that name the objects get large shares: this is when the
# text decides what goes where. Later their shares fall, and about half of all looking goes to the start token:
# what is left to do is to sharpen edges, and the picture itself says where they are.
#
# ## With and without a caption
#
# In training, one caption in ten is replaced by the empty one. So the same network learns two things: to predict
# the noise in images that go with a caption, $\varepsilon_\text{cond}$, and in images of any kind,
# $\varepsilon_\text{uncond}$.

# %%
print("share of captions left out in training:", config.train.drop_caption)
plain = draw(model, [""] * 8, replace(config.sample, guidance=1.0), seed=2)
figure(
    plotting.image_grid(plain, columns=8),
    "The empty caption: the network draws whatever its noise suggests. That is the whole "
    "data set, not one caption of it.",
)

# %% [markdown]
# ## Classifier-free guidance
#
# Ask both, and go further in the direction in which the caption makes a difference:
#
# $$\tilde\varepsilon = \varepsilon_\text{uncond} + w\,(\varepsilon_\text{cond} - \varepsilon_\text{uncond})$$
#
# $w$ is the **guidance scale**: at 0 the caption is ignored, at 1 it is followed as learned, above 1 its
# difference is exaggerated. ([Ho and Salimans 2022](https://arxiv.org/abs/2207.12598); the paper's own $w$ is
# ours minus 1. Papers and programs differ in this; check which one you read.)

# %%
from minidiff.diffusion import classifier_free_guidance, conditioned

source(classifier_free_guidance, conditioned)

# %% [markdown]
# The price is a second prediction at every step. The network is called once, with the images once and both texts;
# what comes before the first look at the text is shared.
#
# ### From 0 to 15

# %%
scales = [0, 1, 2.5, 5, 7.5, 15]
captions = [caption, "a large green triangle left of a small yellow circle"]
swept = np.stack(
    [draw(model, captions, replace(config.sample, guidance=w), seed=5) for w in scales], axis=1
)
right = [
    [v.all_right for v in shapes.judge(row, [c] * len(row))]
    for row, c in zip(swept, captions, strict=True)
]
figure(
    plotting.guidance_sweep(swept, captions, scales, right),
    "The same noise under rising guidance, with the checker's ticks and crosses. It minds frayed "
    "edges, too, but allows for a little.",
)

# %% [markdown]
# How often is a picture right, and how much do pictures of *one* caption differ? For the first, draw 64 held-out
# captions (pairs of objects that were never trained on) at each $w$. For the second, draw "a red circle" from 64
# noises, and measure where the circle lies and how large it is.

# %%
held_out = shapes.held_out_captions(64, seed=0, split="val")
rows, scores, spread = [], [], {"place": [], "size": []}
for w in scales:
    settings = replace(config.sample, guidance=w)
    score = shapes.score(shapes.judge(draw(model, held_out, settings), held_out))
    circles = shapes.read_scenes(draw(model, ["a red circle"] * 64, settings, seed=3))
    found = [r.objects[0] for r in circles if len(r.objects) == 1]
    spread["place"].append(np.hypot(np.std([o.x for o in found]), np.std([o.y for o in found])))
    spread["size"].append(np.std([o.radius for o in found]))
    scores.append(score)
    told = [f"{100 * score[k]:.0f}%" for k in ("colours", "relation", "all_right")]
    rows.append([w, *told, f"{spread['place'][-1]:.1f}", f"{spread['size'][-1]:.2f}"])
table(
    ["w", "colours", "relation", "all right", "spread of place (pixels)", "of radius (pixels)"],
    rows,
)

# %%
share = {
    k: (scales, [100 * s[k] for s in scores]) for k in ("colours", "relation", "all_right")
}
share = {k.replace("_", " "): v for k, v in share.items()}
figure(
    plotting.line_plot(share, "guidance scale w", "pictures right (%)", marker="o"),
    "Following the caption: a little guidance helps; with too much of it the checker no "
    "longer accepts the drawing itself.",
)
figure(
    plotting.line_plot(
        {k: (scales[1:], np.array(v[1:]) / v[1]) for k, v in spread.items()},
        "guidance scale w",
        "spread, as a multiple of that at w = 1",
        marker="o",
    ),
    "Diversity: how much place and size of “a red circle” differ from picture to picture, "
    "from w = 1 on (at 0 the pictures are not of circles).",
)

# %% [markdown]
# That is the trade: **more guidance, more of the caption, less of everything that the caption leaves open.**
# Colours and relation stay right up to 15, but the pictures come to resemble each other, and their edges and
# colours suffer: the exaggerated noise prediction asks for images outside of what the network has seen. Stable
# Diffusion is usually run at 7.5, newer models often lower; this one is at its best from 2.5 to 5.
#
# ## Exercises
#
# Solutions are in `solutions/n08_text_to_image.py`.
#
# **8.1** Some programs write guidance with another number $s$:
# $\tilde\varepsilon = (1 + s)\,\varepsilon_\text{cond} - s\,\varepsilon_\text{uncond}$. Which $s$ is the same as
# our $w$?

# %%
from exercises import n08_text_to_image as check


def scale_of(w):
    return ...


check.other_convention(scale_of)

# %% [markdown]
# **8.2** From queries `q` (positions, d) and keys `k` (tokens, d), compute the map of each word: an array
# (tokens, positions) in which entry $(l, p)$ says how much position $p$ looks at token $l$.


# %%
def maps_by_word(q, k):
    return ...


check.attention_maps(maps_by_word)

# %% [markdown]
# **8.3** A picture is drawn in 50 steps for 4 captions with guidance 7.5. How many images go through the
# network's last layer in all? And with guidance 1?

# %%
check.cost(with_guidance=..., without=...)

# %% [markdown]
# ## Where to go on
#
# The tokenizer is `minidiff/text/words.py`, the text encoder `minidiff/models/text.py`, guidance
# `minidiff/diffusion.py`; `minidiff sample "a red circle above a blue square" --sample.guidance 5` draws with any
# $w$. You have now seen every part of a text-to-image diffusion model. `make demo` trains a smaller one of the
# same kind in a few minutes; [docs/box.md](../docs/box.md) tells how this one was made.
