# %% [markdown]
# # 12. Train on real images
#
# The shapes of the last notebooks were drawn as they were needed: endless, exact, and alike. Photographs are
# different in all three. There are only so many, each is a file that somebody made in some program, and no
# formula says what is on it. This notebook goes the whole way from files to drawn pictures, and looks at what two
# hours on two CPU cores give.
#
# **What you will learn**
#
# - what has to happen to a file before a network can learn from it, and why it happens once;
# - how to walk through a finite set of pictures so that an interrupted run goes on as if nothing had happened;
# - what the settings of a recipe are for, and what they cost;
# - what our runs on real pictures gave, after minutes and after hours;
# - how to judge pictures without a formula: does another network see in them what was asked for, and are they new?
#
# You need notebooks 6 (training), 7 (drawing), 8 (captions and guidance), and a little of 3, 4 and 9 (convolution, GroupNorm
# and softmax, patches).

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
from minidiff.data import cifar10, images, pictures
from minidiff.data.decoded import decoded, stamps
from minidiff.data.pictures import Pictures, scaled
from minidiff.evaluate import evaluate_classes, nearest_pictures
from minidiff.sample import draw
from minidiff.text.words import WordTokenizer

work = TemporaryDirectory()
here = Path(work.name)

# %% [markdown]
# ## From a file to an array
#
# A network wants arrays $(H, W, 3)$ of one size. Files are larger, wide or tall, grey, made for printers (CMYK: four
# inks instead of three lights), with 16 bits a colour, with transparent parts, or with a note that the camera was held on
# its side (EXIF). Here is one photograph in six such files.

# %%
files = write_kinds(here / "kinds")
notes = []
for file in files:
    with Image.open(file) as image:
        notes.append(f"{file.name}: {image.mode}, {image.width} x {image.height}")
figure(
    plotting.image_grid(scaled(np.stack([images.read_image(f, 40) for f in files])), notes, 6),
    "Six files of one photograph, and what the loader makes of each. Below: how its pixels are stored. RGB are red, green and "
    "blue; with P each pixel is a number in a list of colours, a palette; RGBA has a fourth number, how opaque the pixel is; "
    "I;16 is grey with 16 bits. All six come out upright, square and with three numbers a pixel. (Commodore Grace Hopper, by "
    "the US Navy, public domain.)",
)

# %% [markdown]
# Reading images is a subject of its own, and we leave it to a library, Pillow. What it leaves open is decided here: take
# the largest square in the middle, shrink it with the Lanczos filter (each new pixel is a weighted mean, with
# some negative weights, of the old ones around it), put white behind what is transparent.

# %%
source(images.read_image, images._to_rgb)

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
# file beside each picture, and a list in `metadata.jsonl`; `docs/recipes.md` shows them. To use pictures of your own, write
# the name of their folder into the next cell; a relative name counts from `notebooks/`.)
#
# The settings are those of a *preset*, a file of settings for one kind of data. We take `folder`, and change some of them so
# that a minute is enough.

# %%
MY_PICTURES = ""  # for instance "~/pictures/cats"
folder = Path(MY_PICTURES).expanduser() if MY_PICTURES else here / "hopper"
if not MY_PICTURES:
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
        "train.steps": 500,
        "train.lr": 2e-3,
        "train.warmup": 50,
        "train.ema_decay": 0.98,  # a short run needs a short memory
    },
)
since = time.perf_counter()
data = train.data_of(small)
first = time.perf_counter() - since
print(data.summary())

# %%
kinds = data.classes[:8]  # none, where each picture has a caption of its own
shown = [k for c in range(len(kinds)) for k in np.flatnonzero(data.labels == c)[:4]]
shown = shown or list(range(min(16, len(data))))
figure(
    plotting.image_grid(
        scaled(data.images[data.rows[shown]]), [data.captions[k][0] for k in shown], 4
    ),
    "Some pictures of the set as the network gets them, 32 by 32 pixels, with their captions.",
)

# %% [markdown]
# ### Decoded once
#
# To decode and shrink a file takes far longer than to copy the few pixels that come out, and training visits every picture
# again and again. So all pictures are decoded when a set is opened for the first time, into one array of bytes in a file. The file
# is *memory-mapped*: it looks like an array, but its parts are read from the disk when they are touched, and sets that are
# larger than the memory work as well. (Opening reads it once, to see that it is undamaged.)

# %%
since = time.perf_counter()
data = train.data_of(small)
again = time.perf_counter() - since
table(
    ["opening the set", "milliseconds"],
    [["the first time", f"{1e3 * first:.0f}"], ["again", f"{1e3 * again:.1f}"]],
)
print(type(data.images).__name__, data.images.shape, data.images.dtype)

# %% [markdown]
# A stored result is only right as long as what it was made from stays the same. So the folder of the array is named after a
# *fingerprint*, a short number that is computed from the names, sizes and dates of all files and from the settings that
# decide the pixels (a *hash*: of other facts it is another number). If a file is changed, its date changes, so there is a new
# fingerprint, and the array is made anew.

# %%
source(stamps, decoded)

# %% [markdown]
# ### A walk through a finite set
#
# An **epoch** is one visit to every picture. Their order should be another one in every epoch, so that it is not always the
# same pictures that share a batch. And a run that was interrupted must go on where it was. One could store the
# state of the random number generator in the *checkpoint*, the file in which a run is saved. There is a simpler
# way: make the order a *function* of the seed and the epoch. Our random numbers are such functions already
# (`minidiff/random.py`): draw one for each picture, and sort the pictures by it. Then nothing needs to be stored.
# With $B$ pictures a batch, batch $s$ makes the visits $sB, \dots, sB + B - 1$. (All of these are counted from 0;
# the first step of training, number 1 in the log, has batch 0.) Of a set of $N$ pictures, visit $v$ is in
#
# $$\text{epoch} = \lfloor v / N \rfloor, \qquad \text{at the place} \quad v \bmod N $$
#
# of that epoch's order. ($\lfloor\cdot\rfloor$ rounds down, and mod is the remainder; in Python both come from `divmod`.)

# %%
source(Pictures.batch, Pictures._visits, pictures._epoch)

# %%
few = replace(data, rows=data.rows[:16], captions=data.captions[:16], flip=True)
walk = [pictures._epoch(few.seed, epoch, len(few)) for epoch in range(4)]
figure(
    visits_drawn(
        [order for order, _ in walk],
        [numbers[order, 0] < 0.5 for order, numbers in walk],
    ),
    f"{len(few)} pictures in four epochs. Every row has each number once. Orange: mirrored at this visit.",
)

# %%
alone, _ = data.batch(step=7, size=16)  # asked for directly
for step in range(8):
    walked, _ = data.batch(step, 16)  # one after the other
print("the same pictures:", (alone == walked).all())

# %% [markdown]
# **Mirroring** half of the visits doubles the set for nothing: a mirrored frog is a frog. It is no good where left and
# right mean something: for letters, for flags, for captions that say "on the left". (The preset for COCO,
# photographs that people described in whole sentences, mirrors all the same; `--data.flip false` turns it off.)
#
# ### Captions
#
# A class name says little. The preset for CIFAR-10, small photographs of ten classes, uses one of three
# templates, chosen at random at each visit. COCO has about five captions for each photograph, written by
# different people, and one is chosen. So the model sees that different words may mean one thing.

# %%
source(cifar10.captions)

# %% [markdown]
# Words become numbers by a list of the most frequent words of all captions (notebook 8). What is not in it is the word
# "unknown", whatever it was. With photographs of anything this list is long, and most of its words are rare; about a word
# that occurs only twice the model can learn little.

# %%
source(pictures.vocabulary)
print(*data.words[:40])
tokenizer = WordTokenizer(data.words)
print("not known:", tokenizer.unknown("the face of a giraffe"))

# %% [markdown]
# ## The recipe
#
# A preset is a recipe for one kind of data (`minidiff/configs/`). Here are those of the demo and of the three
# presets for real pictures, read from these files.

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
    "mirroring": lambda c: "yes" if c.data.flip else "no",
    "captions left out": lambda c: f"{c.train.drop_caption:.0%}",
    "minutes": lambda c: f"{c.train.minutes:g}",
    "guidance when drawing": lambda c: f"{c.sample.guidance:g}",
}
table(["", *presets], [[name, *map(of, presets.values())] for name, of in settings.items()])

# %% [markdown]
# What some of them are for:
#
# - **Patches** save time. 64 x 64 pixels in patches of 4 x 4 are 16 x 16 positions with 48 channels; the network works on
#   these, and the cost of a convolution grows with the number of positions. Nothing is lost, but the network has to predict 48
#   numbers at each position. A latent space has fewer numbers, and must be trained first (notebook 9).
# - **Channels and blocks** are how much the network can know. A larger network sees fewer pictures in the same time. Two hours
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
# and drew is in `benchmarks/results/`, and the next cells read it from there. `numbers a weight` is how many numbers all pictures
# together are made of, for each weight of the network. `epochs` is how often every picture was visited. `waited`
# is the share of the time in which training had to wait for the next batch, which a second thread prepares
# meanwhile. `memory` is the most that the process ever held. The commands are below the table. In them
# `--minutes` and `--marks` are what was planned: they became numbers of steps when the first steps had shown how
# long one takes, and the time that these then took is a little different. The files are named by the plan, the
# text goes by the clock.

# %%
runs = committed_runs(ROOT)  # empty, where there are none
table(
    ["run", "pictures", "weights", "numbers a weight", "images a second", "images seen", "epochs", "waited", "memory"],
    [
        [
            name,
            f"{r['pictures']:,}",
            f"{r['parameters'] / 1e6:.1f} million",
            f"{3 * r['pictures'] * r['config']['data']['size'] ** 2 / r['parameters']:.2g}",
            f"{r['images_per_second']['median']:.0f}",
            f"{r['marks'][-1]['images']:,}",
            f"{r['marks'][-1]['images'] / r['pictures']:,.1f}",
            f"{r['share_of_time_waited_for_data']:.2%}",
            f"{r['memory_gb']:.1f} GB",
        ]
        for name, (r, _) in runs.items()
    ],
)  # fmt: skip
for name, (r, _) in runs.items():
    print(f"{name}, on {r['device']['cores']} cores of {r['device']['cpu']}: {r['command']}")

# %%
if runs:
    curves = {
        name: ([p["minutes"] for p in r["loss"]], [p["loss"] for p in r["loss"]])
        for name, (r, _) in runs.items()
    }
    figure(
        plotting.line_plot(curves, "minutes", "loss (logarithmic)", log="y"),
        "The training loss of these runs: medians over spans of steps. Losses of different sets "
        "cannot be compared: they depend on how predictable the pictures are.",
    )

# %% [markdown]
# The loss of a run on photographs falls fast, and then slowly, while the drawn pictures still change. Part of the loss is what
# *cannot* be known (notebook 6), and does not fall at all. A set of few pictures can be learned by heart; then
# the loss falls far lower. So look at what is drawn.
#
# The learning rate falls to 0 over the whole run, and the pictures gain by that. So do not take what these runs drew after ten
# minutes for what a run of ten minutes gives: its learning rate would be 0 by then.
#
# ### CIFAR-10
#
# Ten classes of photographs, 32 by 32 pixels, 50,000 of them. Every column is a class.


# %%
def show(name):
    """How the pictures of a committed run became better."""
    if name not in runs:
        return print(f"There is no run of {name} in benchmarks/results.")
    record, base = runs[name]
    figure(
        Committed(Path(f"{base}.progress.png")),
        f"What the model of {name} draws in the course of its training, always from the same noise. No picking: these are the "
        "first ones of each grid.",
    )
    for mark in record["marks"]:
        epochs = mark["images"] / record["pictures"]
        seen = f"{mark['images']:,} images, {epochs:,.{0 if epochs > 100 else 2}f} epochs"
        file = Path(f"{base}.{mark['mark']:g}-minutes.png")
        print(
            f"all that it drew after {mark['minutes']:.0f} minutes ({seen}): benchmarks/results/{file.name}"
        )
    if (sources := Path(f"{base}.sources.md")).exists():
        print(f"whose photographs it learned from: benchmarks/results/{sources.name}")


show("cifar10")

# %% [markdown]
# ### COCO's captions
#
# COCO's photographs show everyday scenes with many things in them, and people said in whole sentences what they saw. That
# asks for far more than ten classes do. Its 118,000 photographs are 18 GB, and most of them may not be used freely. A run whose
# drawings may be shown has only those whose licence allows it (`benchmarks/free_coco.py`). Of such there were 26 at hand,
# with 130 captions of 390 words, 209 of which occur once. That is very little, and it is good to have seen what happens then.
#
# In each row, the captions on the left were trained on. Those on the right belong to other photographs, which the model never
# saw; a word that it never saw is read as "unknown".

# %%
show("coco")

# %% [markdown]
# In the end nearly every picture is one of the 26 photographs, almost pixel by pixel (*Is it new, or a copy?*
# below has the distances). So it is for captions that the model never saw: it draws a photograph that some of
# their words belong to. "Two equestrians" become the horses on a hill, a plane that floats on a lake the airport.
# Words have become labels of whole pictures. This is called **memorisation**. There are far more weights than
# numbers in the pictures (the table above), and nothing in the loss asks for anything new. (Mirroring shows, too:
# the horses look to either side, and in the last of the files above a street sign is drawn in mirror writing, and
# another picture as a photograph and its mirror image at once.)
#
# ### A folder
#
# A folder of your own could be anything. For an example there is one of 1,360 small drawings, the emoji of a free font, with
# their names in Unicode as captions (`benchmarks/emoji_pictures.py`). Every picture has one caption, and 987 of the 1,409
# words occur in one caption only.

# %%
show("folder")

# %% [markdown]
# What is frequent comes first. "Face" is in 165 captions and "no" in 11, and after an hour the one draws a yellow face, the
# other the red sign, whatever is below it. "Curry" and "bulb" have one picture each, and get little more than its colours. Here
# are captions that are not in the set, though all their words are:

# %%
if "folder" in runs and (unseen := Path(f"{runs['folder'][1]}.unseen.png")).exists():
    figure(
        Committed(unseen),
        "Captions that no picture has, drawn by the last model of folder, one picture each. No picking.",
    )

# %% [markdown]
# "No" forbids a dog and an octopus as well as a bicycle, and a cat's face stays one. But the apples became black, not blue and
# purple, and "octopus", of which there is one picture, means little next to "red". A word becomes something by itself when it
# occurs with many others. Compare `shapes`: there every colour was seen with every shape, and new pairs of objects
# come out right (notebook 8).
#
# ## Does it draw what was asked for?
#
# The pictures of `shapes` are judged by a program that knows what a triangle is. Nobody knows how to write such a program
# for a frog. But a network can learn to tell frogs from ships by looking at real photographs. Ours is five convolutions with
# GroupNorm and SiLU (notebooks 3 and 4), the mean over all positions, and a linear layer with one output for each class, its
# *logit* $z_k$. The softmax (notebook 4) makes probabilities of the logits. The loss is $-\log$ of the probability of the
# true class $c$, the **cross-entropy**:
#
# $$-\log \frac{e^{z_c}}{\sum_k e^{z_k}} = \log \sum_k e^{z_k} - z_c$$
#
# It is 0 where the true class gets the probability 1, and grows without limit as that probability goes to 0. (The code
# first subtracts the largest logit from all, which changes nothing, but keeps the exponentials from overflowing.)

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
# A model that ignores the caption gets $A = 1/10$ on average, if each of ten classes is asked for equally often. The classifier
# makes mistakes on real pictures too: the last line of the table below says how many unseen real pictures it names rightly.
# That is a comparison, not a limit.
#
# And $n$ pictures are a sample. With other noise they would be others, and $A$ would come out a little different; the
# standard deviation of that, its **standard error**, is about
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
        f"Agreement by class. Each is a share of {n // len(classes)} pictures, so its standard error is up to "
        f"{50 / np.sqrt(n // len(classes)):.0f} percentage points.",
    )  # fmt: skip
else:
    print("There is no run of cifar10 in benchmarks/results.")

# %% [markdown]
# Compare that with the pictures further up. To the eye they change little in the second hour, and hardly an
# animal can be made out, while a ship or a truck can; the classifier goes by small differences of colour and
# shape. So an agreement of three in four does not mean that three in four look right to us. What else does it
# *not* say? A model that draws one and the same perfect horse whenever a horse is asked for would have $A = 1$.
# (Too much guidance goes that way: the pictures of one caption become alike, as notebook 8 showed.) So would one
# that adds just what the classifier looks for. One number never says how good pictures are; look at them as well.
#
# ## Is it new, or a copy?
#
# A model could also learn its pictures by heart; with few pictures and many epochs that is to be expected. To
# find out, take for each drawn picture $x$ the training picture that is nearest to it, by the root of the
# mean squared difference of their pixels:
#
# $$d(x) = \min_j \sqrt{\tfrac{1}{HWC} \textstyle\sum (x - x_j)^2}$$
#
# The sum is over all $HWC$ numbers of a picture, and $x_j$ are the pictures of the set. (If training mirrors pictures, their
# mirror images are compared, too.) A small $d$ alone means little: a grey sky is near to many grey skies. So compare: how far
# are the set's own pictures from *their* nearest neighbours? A model that draws new pictures has about the same distances.
# One that copies has much smaller ones. Blurred pictures come out nearer, too, so look at the pairs.

# %%
source(nearest_pictures)

# %%
rows = []
for name, (r, _) in runs.items():
    for m in r["marks"]:
        drawn_after = {what: d for what, d in m["nearest"].items() if what != "pictures"}
        rows += [
            [name, f"{what}, after {m['minutes']:.0f} minutes", d]
            for what, d in drawn_after.items()
        ]
    rows.append([name, "the pictures themselves", r["marks"][-1]["nearest"]["pictures"]])
table(
    ["run", "from", "to the nearest picture: median", "least"],
    [[name, what, f"{d['median']:.3f}", f"{d['least']:.3f}"] for name, what, d in rows],
)

# %% [markdown]
# (So many samples, and as many of the set's own pictures, as a grid has.) A single near one can be a copy, or a plain or
# blurred picture. That can only be seen in the pair: a run writes its nearest ones, each beside its neighbour in the set,
# to `nearest.png` in its folder.
#
# ## Your own folder, live
#
# Now the crops of the photograph. Everything is as above, only smaller: few pictures, a small network, a minute or so with the
# compiled kernels. What would you expect of pictures that are all cut from one?

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
asked = [caption for caption in data.prompts[:8] for _ in range(4)]
sampling = replace(small.sample, steps=25, guidance=1.5)
with train.averaged_weights(state) as model:
    drawn = draw(model, asked, sampling)
figure(plotting.image_grid(drawn, asked, 4), "What it draws, four pictures for each caption.")

# %% [markdown]
# A classifier of these classes is small, and quickly trained. One picture in ten is kept from it, to see how it
# does on what it has not seen. (Here that is an easy test: the crops overlap, so it knows most of the pixels
# already.)

# %%
if len(data.classes) > 1:
    classifier, accuracy, judged, real = open_classifier(small.data)
    with train.averaged_weights(state) as model:
        result = evaluate_classes(model, sampling, classifier, accuracy, judged, real, n=40)
    print(result.headline)
else:
    print("These pictures are not sorted into classes: there is nothing to judge them by.")

# %%
nearest, far = nearest_pictures(drawn, data)
others = pictures.some_of(len(data), 240)
_, apart = nearest_pictures(scaled(data.images[data.rows[others]]), data, but=others)
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
# The crops overlap, so each of them has near neighbours, and a new crop would be about as near to one. Copies
# would be much nearer. (Look at what a pair shows, too: most of every crop of the ribbons is the same dark cloth,
# so these are nearer to each other than to anything else.) If the drawn pictures are as far from the set as its
# own pictures are from each other, or farther, because not all is drawn well, then the model has put them
# together itself.

# %% [markdown]
# ## Going on
#
# A run is saved every 500 steps, and when it is stopped with Ctrl-C, with everything that the next step depends on: the
# weights, their averages, the optimizer's memory, the number of the step. `minidiff train --resume RUN` reads it. Since
# pictures, noise and times are functions of the seed and the step, an interrupted run has the very same weights in the
# end, bit by bit (on the same machine, with the same number of threads). Try it: twelve steps in one go, and six and six.

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
# **12.1** A run was stopped, and goes on with batch $s$. Its batches have $B$ pictures, the set has $N$. In which epoch is the
# visit to picture $i$ of this batch, and at which place of it? Return the two numbers. (All are counted from 0.)

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
# mean squared difference, in units where colours go from -1 to 1. If the mirror image of the second picture (left and right
# exchanged) is nearer, return the distance to that. (Beware of what NumPy does with `uint8`.)


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
