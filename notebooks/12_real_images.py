# %% [markdown]
# # 12. Train on real images
#
# The shapes of the last notebooks were drawn as they were needed: endless, exact, and alike. Photographs are none of this.
# There are only so many, each is a file that somebody made in some program, and no formula says what is on it. This
# notebook goes the whole way from files to drawn pictures, and looks at what two hours on two CPU cores give.
#
# **What you will learn**
#
# - what has to happen to a file before a network can learn from it, and why it happens once;
# - how to walk through a finite set of pictures so that an interrupted run goes on as if nothing had been;
# - what the settings of a recipe are for, and what they cost;
# - what our runs on photographs gave, after minutes and after hours;
# - how to judge pictures without a formula: does another network see in them what was asked for, and are they new?
#
# You need notebook 6 (training), 7 (drawing) and 8 (captions and guidance).

# %%
from course import ROOT, begin, figure, source, table

begin(12, "kernels", "runs")

# %%
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from drawing_12 import Committed, committed_runs, visits_drawn, write_crops, write_kinds
from minidiff import plotting, train
from minidiff.classifier import Classifier, cross_entropy, open_classifier
from minidiff.config import load_config
from minidiff.data import cifar10, images, open_pictures, pictures
from minidiff.data.decoded import decoded
from minidiff.data.pictures import Pictures, scaled
from minidiff.evaluate import evaluate_classes, nearest_pictures
from minidiff.sample import draw
from minidiff.text.words import WordTokenizer

work = TemporaryDirectory()
here = Path(work.name)

# %% [markdown]
# ## From a file to an array
#
# A network wants arrays $(H, W, 3)$ of one size. Files are larger, wider or higher, grey, made for printers (CMYK: four
# inks instead of three lights), with 16 bits a colour, with transparent parts, or with a note that the camera was held on
# its side (EXIF). Here is one photograph in six such files.

# %%
files = write_kinds(here / "kinds")
notes = []
for file in files:
    with Image.open(file) as image:
        notes.append(f"{file.name}: {image.mode}, {image.width} x {image.height}")
figure(
    plotting.image_grid(scaled(np.stack([images.read_image(f, 128) for f in files])), notes, 6),
    "Six files of one photograph, and what the loader makes of each; below, how its pixels are stored (P is a palette, I;16 "
    "are 16 bits of grey). All six come out upright, square and in three colours. (Commodore Grace Hopper, by the US Navy, "
    "public domain.)",
)

# %% [markdown]
# Reading images is a trade of its own, and we leave it to a library, Pillow. What it leaves open is decided here: take
# the largest square in the middle, shrink it with a good filter, put white behind what is transparent.

# %%
source(images.read_image)

# %% [markdown]
# The filter matters more than one would think: taking every eighth pixel would give edges that no photograph has, and the
# network would learn them. After this, bytes 0..255 become numbers in $[-1, 1]$, because the noise that is added to them
# is symmetric about 0:

# %%
source(scaled)

# %% [markdown]
# ## A set of pictures
#
# To have a set of real pictures without a download, we cut that photograph into pieces: many crops of four of its parts, in a
# folder for each. That is the simplest way to give captions: **the folder's name is the caption**. (The others are a text
# file beside each picture, and a list in `metadata.jsonl`; `docs/recipes.md` shows them. Put the name of a folder of your
# own into the cell below, and the rest of the notebook is about your pictures.)

# %%
folder = here / "hopper"
write_crops(folder)
small = load_config(
    "folder",
    {
        "data.path": str(folder),
        "data.cache": str(here / "cache"),
        "data.size": 32,  # the preset has 64
        "data.flip": False,
        "diffusion.patch": 2,  # pixels 2 by 2 become 12 channels; the preset has 4 by 4
        "unet.channels": [32, 64],  # the preset has 96 and 192
        "unet.blocks": 1,
        "text.layers": 1,
        "train.batch": 16,
        "train.steps": 700,
        "train.lr": 2e-3,
        "train.warmup": 50,
        "train.ema_decay": 0.98,  # a short run needs a short memory
    },
)
since = time.perf_counter()
data = open_pictures(small.data, small.train.seed)
first = time.perf_counter() - since
print(data.summary(), "\nclasses:", ", ".join(data.classes))

# %%
shown = [k for c in range(len(data.classes)) for k in np.flatnonzero(data.labels == c)[:6]]
figure(
    plotting.image_grid(
        scaled(data.images[data.rows[shown]]), [data.captions[k][0] for k in shown], 6
    ),
    "Some pictures of the set as the network gets them, 32 by 32 pixels, with their captions.",
)

# %% [markdown]
# ### Decoded once
#
# To decode and shrink a file takes far longer than to copy the few pixels that come out, and training visits every picture
# again and again. So all pictures are decoded when a set is opened for the first time, into one array of bytes in a file. The file
# is *memory-mapped*: it looks like an array, but its parts are read from the disk when they are touched, and sets that are
# larger than the memory work as well.

# %%
since = time.perf_counter()
data = open_pictures(small.data, small.train.seed)
again = time.perf_counter() - since
table(
    ["opening the set", "milliseconds"],
    [["the first time", f"{1e3 * first:.0f}"], ["again", f"{1e3 * again:.1f}"]],
)
print(type(data.images).__name__, data.images.shape, data.images.dtype)

# %% [markdown]
# A stored result is only right as long as what it was made from stays the same. So the file's name holds a *fingerprint*:
# a hash of everything that decided its pixels: the names, sizes and dates of all files, and the settings. Any change
# gives another fingerprint, so another file. An old array is never taken for a new set.

# %%
source(decoded)

# %% [markdown]
# ### A walk through a finite set
#
# An **epoch** is one visit to every picture. Their order should be another one in every epoch, or the network would learn
# it. And a run that was interrupted must go on where it was. One could store the state of the random number generator
# in the checkpoint. There is a simpler way: make the order a *function* of the seed and the epoch. Then nothing needs to
# be stored. The number of the step says it all: step $s$ with $B$ pictures makes the visits $sB, \dots, sB + B - 1$; of a
# set of $N$ pictures, visit $v$ is in
#
# $$\text{epoch} = \lfloor v / N \rfloor, \qquad \text{place} = v \bmod N .$$

# %%
source(Pictures.batch, Pictures._visits, pictures._epoch)

# %%
few = replace(data, rows=data.rows[:16], captions=data.captions[:16], flip=True)
walk = [pictures._epoch(few.seed, epoch, len(few)) for epoch in range(4)]
figure(
    visits_drawn(
        [order for order, _ in walk],
        len(few),
        [numbers[order, 0] < 0.5 for order, numbers in walk],
    ),
    "Sixteen pictures in four epochs. Every row has each number once. Orange: mirrored at this visit.",
)
alone, _ = data.batch(step=7, size=16)  # asked out of the blue
for step in range(8):
    walked, _ = data.batch(step, 16)
assert (alone == walked).all()

# %% [markdown]
# **Mirroring** half of the visits doubles the set for nothing: a mirrored frog is a frog. It is no good where left and
# right mean something: for letters, for flags, for captions that say "on the left".
#
# ### Captions
#
# A class name makes a poor language. The preset `cifar10` calls a picture by one of three templates, drawn at each visit;
# COCO has five captions of each photograph, by five people, and one is drawn. The model learns that different words may
# mean one thing.

# %%
source(cifar10.captions)

# %% [markdown]
# Words become numbers by a list of the most frequent words of all captions (notebook 8). What is not in it is the word
# "unknown", whatever it was. With photographs of anything this list is long, and many of its words are rare: what the
# model saw twice it will not draw.

# %%
source(pictures.vocabulary)
print(data.words)
tokenizer = WordTokenizer(data.words)
print("not known:", tokenizer.unknown("the face of a giraffe"))

# %% [markdown]
# ## The recipe
#
# A recipe is a file of settings (`minidiff/configs/`). Here are those of the demo and of the three presets for real
# pictures, read from these files.

# %%
presets = {name: load_config(name) for name in ("shapes", "cifar10", "coco", "folder")}
settings = {
    "pixels": lambda c: f"{c.data.size} x {c.data.size}",
    "patch": lambda c: f"{c.diffusion.patch} x {c.diffusion.patch}",
    "channels, from fine to coarse": lambda c: ", ".join(map(str, c.unet.channels)),
    "blocks a level": lambda c: c.unet.blocks,
    "words of a caption that are read": lambda c: c.text.context - 2,
    "the network predicts": lambda c: c.diffusion.prediction,
    "weight limit (notebook 6)": lambda c: f"{c.diffusion.weight_limit:g}",
    "optimizer, peak learning rate": lambda c: f"{c.train.optimizer}, {c.train.lr:g}",
    "pictures a step": lambda c: c.train.batch,
    "captions left out": lambda c: f"{c.train.drop_caption:.0%}",
    "minutes": lambda c: f"{c.train.minutes:g}",
    "guidance when drawing": lambda c: f"{c.sample.guidance:g}",
}
table(["", *presets], [[name, *map(of, presets.values())] for name, of in settings.items()])

# %% [markdown]
# What each is for:
#
# - **Patches** save time. 64 x 64 pixels in patches of 4 x 4 are 16 x 16 positions with 48 channels; the network works on
#   these, and the cost of a convolution falls with the number of positions (notebook 11). What it loses are the finest
#   details. A latent space (notebook 9) does the same better, but has to be trained first.
# - **Channels and blocks** are how much the network can know. More of them see fewer pictures in the same time. Two hours
#   on two cores are soon used up, so the networks are small.
# - **Few pictures a step** means many steps in the same time: more corrections, each of them noisier. A GPU is only busy
#   with many pictures at once; two cores are busy with few.
# - **The weight limit** keeps the loss from being mostly about the last grains of noise (notebook 6).
# - **Captions left out**: one in ten is empty, so that the model also learns to draw without one, which guidance needs
#   (notebook 8).
# - **The minutes** become a number of steps once the first steps have shown how long one takes. The learning rate falls to 0
#   over all of them (notebook 6), so a run that was planned for two hours is not done when it is stopped after one.

# %% [markdown]
# ## What hours give
#
# A recipe is worth what came out of it. These runs were really made, with `benchmarks/bench_images.py`; what they logged
# and drew is in `benchmarks/results/`, and the next cells read it from there. `epochs` is how often every picture was
# visited. `waited` is the share of the time in which training had to wait for the next batch, which a second thread
# prepares meanwhile.

# %%
runs = committed_runs(ROOT)
table(
    ["run", "pictures", "weights", "measured on", "images a second", "images seen", "epochs", "waited", "memory"],
    [
        [
            name,
            f"{r['pictures']:,}",
            f"{r['parameters'] / 1e6:.1f} million",
            f"{r['device']['cores']} cores of {r['device']['cpu']}",
            f"{r['images_per_second']['median']:.0f}",
            f"{r['marks'][-1]['images']:,}",
            f"{r['marks'][-1]['images'] / r['pictures']:.1f}",
            f"{r['share_of_time_waited_for_data']:.2%}",
            f"{r['memory_gb']:.1f} GB",
        ]
        for name, (r, _) in runs.items()
    ],
)  # fmt: skip

# %%
if runs:
    figure(
        plotting.line_plot(
            {
                name: ([p["minutes"] for p in r["loss"]], [p["loss"] for p in r["loss"]])
                for name, (r, _) in runs.items()
            },
            "training time (minutes)",
            "loss (medians)",
            log="y",
        ),
        "The training loss of the committed runs. Losses of different sets cannot be compared: they depend on how "
        "predictable the pictures are.",
    )

# %% [markdown]
# A loss curve of a diffusion model is a strange thing: it falls fast, and then hardly at all, although the pictures go on
# to get better for hours. Most of the loss is what *cannot* be known (notebook 6). What the model learns late, such as
# where a horse's legs go, is a small part of it. So look at pictures.
#
# ### CIFAR-10
#
# Ten classes of photographs, 32 by 32 pixels, 50,000 of them. Every column is a class.


# %%
def show(name):
    """How the pictures of a committed run became better, and what it drew in the end."""
    if name not in runs:
        return print(f"There is no run of {name} in benchmarks/results.")
    record, base = runs[name]
    figure(
        Committed(Path(f"{base}.progress.png")),
        f"What the model of {name} draws in the course of its training, always from the same noise.",
    )
    last = record["marks"][-1]
    figure(
        Committed(Path(f"{base}.{last['mark']:g}-minutes.png")),
        f"What it draws in the end, after {last['images']:,} images, {last['images'] / record['pictures']:.1f} epochs. No "
        "picking: these are the first ones.",
    )


show("cifar10")

# %% [markdown]
# ### COCO's captions
#
# COCO's photographs show everyday scenes with many things in them, and people said in whole sentences what they saw. This
# is far harder than ten classes: hundreds of words, of which most occur a few times, and no two pictures alike. Its
# 118,000 photographs are 18 GB, and most of them may not be used freely. So the committed run has only the few that were
# at hand and whose licence lets what a model makes of them be shown (`benchmarks/free_coco.py`). The captions below are of
# other pictures, which it never saw.

# %%
show("coco")

# %% [markdown]
# ### A folder
#
# The third run stands for a folder of your own: 1,360 small drawings, the emoji of a free font, with their names in Unicode as
# captions (`benchmarks/emoji_pictures.py`).

# %%
show("folder")

# %% [markdown]
# ## Does it draw what was asked for?
#
# The pictures of `shapes` are judged by a program that knows what a triangle is. Nobody can write such a program for a
# frog. But a network can learn to tell frogs from ships by looking at real photographs. Ours is five convolutions with
# GroupNorm (notebooks 3 and 4), the mean over all positions, and a linear layer with one output for each class, its
# *logit*. The softmax (notebook 4) makes probabilities of the logits, and the loss is $-\log$ of the probability that the
# true class got, the **cross-entropy**: 0 for one who is certain and right, and without limit for one who is certain and
# wrong.

# %%
source(Classifier.forward, cross_entropy)

# %% [markdown]
# Such a **classifier** then looks at the drawn pictures, without seeing their captions, and names what it sees: the class
# with the largest logit. The **agreement** of $n$ pictures is
#
# $$A = \frac1n \sum_{i=1}^n [\, k_i = c_i \,]$$
#
# - $c_i$ is the class that was asked for, and $k_i$ the one that the classifier names;
# - $[\,\dots]$ is 1 where it is true, else 0.
#
# Drawing by chance gives $A = 1/10$ with ten classes. The other end is not 1: the classifier itself is wrong about some real
# pictures. And $n$ pictures are a sample. With other noise they would be others, and $A$ would come out a little
# different; the standard deviation of that, its **standard error**, is about
#
# $$\sqrt{A\,(1-A)/n}.$$

# %%
source(evaluate_classes)

# %%
if "cifar10" in runs:
    record, _ = runs["cifar10"]
    n = record["marks"][-1]["n"]
    table(
        ["after", "agreement", "standard error", "chance"],
        [
            [
                f"{m['minutes']:.0f} minutes",
                f"{a:.1%}",
                f"{np.sqrt(a * (1 - a) / n):.1%}",
                f"{m['chance']:.0%}",
            ]
            for m in record["marks"]
            for a in [m["agreement"]["all"]]
        ]
        + [["(unseen real pictures)", f"{record['marks'][-1]['real']:.1%}", "", ""]],
    )
    classes = [name for name in record["marks"][-1]["agreement"] if name != "all"]
    figure(
        plotting.bars(
            classes,
            {
                f"after {m['minutes']:.0f} minutes": [100 * m["agreement"][c] for c in classes]
                for m in record["marks"]
            },
            "of the drawn pictures the classifier names rightly (%)",
            ceiling=("chance", 100 / len(classes)),
        ),
        f"Agreement by class, {n // len(classes)} pictures each.",
    )  # fmt: skip

# %% [markdown]
# What does agreement *not* say? A model that draws one and the same perfect horse whenever a horse is asked for would have
# $A = 1$. (Too much guidance goes that way: the pictures of one caption become alike, as notebook 8 showed.) So would one that
# adds just what the classifier looks for. One number never says how good pictures are; look at them as well.
#
# ## Is it new, or a copy?
#
# A model could also learn its pictures by heart; with few pictures and many epochs it will. To find out, take for each drawn picture $x$ the training picture that is nearest to it, by the root of the
# mean squared difference of their pixels:
#
# $$d(x) = \min_j \sqrt{\tfrac{1}{HWC} \textstyle\sum (x - x_j)^2}$$
#
# ($x_j$ are the pictures of the set, and what is mirrored in training counts as mirrored here.) A small $d$ alone means little:
# a grey sky is near to many grey skies. So compare: how far are the set's own pictures from *their* nearest
# neighbours? A model that draws new pictures has about the same distances. One that copies has much smaller ones.

# %%
source(nearest_pictures)

# %%
table(
    ["run", "minutes", "samples to the nearest picture: median", "least", "pictures to each other: median", "least"],
    [
        [name, f"{m['minutes']:.0f}", *(f"{m['nearest'][of][which]:.3f}" for of in ("samples", "pictures") for which in ("median", "least"))]
        for name, (r, _) in runs.items()
        for m in r["marks"]
    ],
)  # fmt: skip

# %% [markdown]
# ## Your own folder, live
#
# Now the crops of the photograph. Everything is as above, only smaller: few pictures, a small network, less than a minute.
# What would you expect of a set of 240 pictures that are all cut from one?

# %%
state = train.new_state(small, data)
log = []
for record in train.train(state, data):
    log.append({"step": record.step, "loss": record.loss, "minutes": record.minutes})
print(f"{sum(p.data.size for p in state.model.parameters()):,} weights, {record.images:,} images in "
      f"{60 * record.minutes:.0f} seconds: {record.images / len(data):.0f} epochs")  # fmt: skip
figure(
    plotting.loss_curve({"crops": log}),
    "The loss of each step (points), and its running median.",
)

# %%
asked = [caption for caption in data.prompts for _ in range(6)]
sampling = replace(small.sample, steps=25, guidance=1.5)
with train.averaged_weights(state) as model:
    drawn = draw(model, asked, sampling)
figure(plotting.image_grid(drawn, asked, 6), "What it draws, six pictures for each caption.")

# %% [markdown]
# A classifier of these four classes takes some seconds to train. One picture in ten is kept from it, to see how it does on
# what it has not seen.

# %%
classifier, accuracy, judged, real = open_classifier(small.data)
with train.averaged_weights(state) as model:
    result = evaluate_classes(model, sampling, classifier, accuracy, judged, real, n=40)
print(result.headline)

# %%
nearest, far = nearest_pictures(drawn, data)
_, apart = nearest_pictures(scaled(data.images[data.rows]), data, but=np.arange(len(data)))
print(f"from a sample to the nearest picture: {np.median(far):.3f} (median); "
      f"from a picture to its nearest neighbour: {np.median(apart):.3f}")  # fmt: skip
some = np.argsort(far)[[0, 1, len(far) // 2, len(far) // 2 + 1, -2, -1]]
pairs = np.stack([drawn[some], scaled(data.images[data.rows[nearest[some]]])], axis=1)
figure(
    plotting.image_grid(
        pairs.reshape(-1, *drawn.shape[1:]),
        [text for d in far[some] for text in ("drawn", f"nearest: {d:.2f}")],
        6,
    ),
    "Samples beside the pictures nearest to them: the two nearest, two in the middle, and the two farthest.",
)

# %% [markdown]
# ## Going on
#
# A run is saved every few hundred steps and whenever it is stopped, with everything that the next step depends on: the
# weights, their averages, the optimizer's memory, the number of the step. `minidiff train --resume RUN` reads it. Since
# pictures, noise and times are functions of the seed and the step, an interrupted run has the very same weights in the
# end, bit by bit. Try it: twelve steps in one go, and six and six.

# %%
brief = replace(small, train=replace(small.train, steps=12, warmup=3))


def trained(state, until):
    """Take steps up to number `until`."""
    steps = train.train(state, data)
    while state.step < until:
        next(steps)
    steps.close()
    return state


through = trained(train.new_state(brief, data), 12)
train.save_state(trained(train.new_state(brief, data), 6), here / "half.safetensors")
resumed = trained(train.load_state(here / "half.safetensors"), 12)
weights, others = through.model.state(), resumed.model.state()
print("the same bits:", all((weights[name] == others[name]).all() for name in weights))

# %% [markdown]
# What to do with more time? First let the same recipe run longer: `--train.minutes 600`. When its pictures stop getting
# better, more channels (`--unet.channels 128,256`), which takes more time again. On a GPU the same command runs the same
# code (`--train.device cuda`); what that brings was not measured yet.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n12_real_images.py`.
#
# **12.1** A run was stopped, and goes on with step $s$ (the first step has number 0). Its batches have $B$ pictures, the
# set has $N$. Which epoch is picture $i$ of this batch in, and which place has it there? Return the two numbers.

# %%
from exercises import n12_real_images as check


def visit(s, i, B, N):
    return ...


check.epoch_and_place(visit)

# %% [markdown]
# **12.2** The classifier named the classes `named` where `asked` were asked for (two arrays of class numbers). Return the
# agreement and its standard error.


# %%
def agreement(named, asked):
    return ...


check.agreement_and_error(agreement)

# %% [markdown]
# **12.3** How far are two pictures apart? They come as the set stores them: `uint8`, $(H, W, 3)$. Return the root of the
# mean squared difference in units where colours go from -1 to 1; where the second one is nearer when it is mirrored left to
# right, that distance. (Beware of what NumPy does with `uint8`.)


# %%
def distance(a, b):
    return ...


check.picture_distance(distance)

# %% [markdown]
# ## Where to go on
#
# The loaders are in `minidiff/data/`, the classifier in `minidiff/classifier.py`, the presets in `minidiff/configs/`; how to
# get CIFAR-10 and COCO, and what to change, is in `docs/recipes.md`. Next:
# [13. Stable Diffusion with our code](13_stable_diffusion.ipynb), where somebody else has trained for longer.
