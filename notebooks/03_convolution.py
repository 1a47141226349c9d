# %% [markdown]
# # 3. Convolution
#
# The U-Net that will take the noise out of our images is a convolutional network: its main operation is
# the convolution. A small grid of weights slides over the image, and at each place it asks one question: does
# what lies under me look like this? This notebook takes that operation apart, forward and backward, and then makes it
# fast.
#
# **What you will learn**
#
# - what a convolution computes, and why its results are called feature maps;
# - what padding, stride and channels are;
# - how a convolution turns into one product of matrices (*im2col*);
# - how gradients flow back through it, to the weights and to the pixels;
# - why it suits images: locality, shared weights, and a view that widens with depth;
# - how the same sum can be computed thousands of times faster, and with fewer multiplications than it seems to need.
#
# You need notebook 2 (Tensors, `backward`, `gradcheck`).

# %%
from course import begin, close, figure, photograph, source, table

begin(3, "kernels")

# %%
import time

import numpy as np

from drawing_02 import Matrix, matrices
from drawing_03 import patches_as_rows, reach, sliding, windows
from minidiff import Tensor, kernels, ops, plotting
from minidiff.backend import MODULES
from minidiff.gradcheck import gradcheck
from minidiff.ops.conv2d import conv2d_backward, conv2d_forward, im2col, pad_image

rng = np.random.default_rng(0)
NONE = ((0, 0), (0, 0))  # no padding: (top, bottom), (left, right)

# %% [markdown]
# ## A kernel slides over an image
#
# Take a grey image $x$, a grid of numbers with $x_{i,j}$ in row $i$ and column $j$, and a small grid of weights $W$,
# the **kernel**, here 3 × 3. Lay the kernel on the image, multiply each weight by the pixel beneath it, and add up:
# one output. Move on by one pixel and repeat, at every place:
#
# $$y_{i,j} = \sum_{p=0}^{2}\sum_{q=0}^{2} x_{i+p,\,j+q}\;W_{p,q}$$
#
# The result $y$ is a new grid, the **feature map**: it is large where the image looks like the kernel. (Mathematicians
# call this sum a cross-correlation, and flip the kernel for a convolution. In deep learning nobody flips.)
#
# This kernel subtracts the pixels on the left from those on the right, so it answers to vertical edges. Its weights
# are those of Sobel's edge detector, divided by 8:

# %%
vertical = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
grey = photograph(48).mean(axis=-1).astype(np.float64)  # (H, W), black is -1 and white is 1
figure(
    sliding(grey, vertical, [(34, 17), (11, 23), (10, 41)]),
    "The kernel at three places. A, the collar: dark on the left, bright on the right, "
    "and the sum is large. B, the rim of the cap: an edge, but a horizontal one; "
    "products of both signs cancel. C, the background: nothing.",
)

# %% [markdown]
# Written as loops it is this, for images with several numbers in each pixel, which we shall need soon: the image
# is $(H, W, C_{in})$, its height, its width and the numbers in each pixel; the kernel $(k_h, k_w, C_{in},
# C_{out})$, its height, its width, and a weight for each number of a pixel and each of $C_{out}$ results.


# %%
def naive_convolution(x, w):
    H, W, C_in = x.shape
    kh, kw, _, C_out = w.shape
    y = np.zeros((H - kh + 1, W - kw + 1, C_out), x.dtype)
    for i in range(H - kh + 1):
        for j in range(W - kw + 1):
            for n in range(C_out):
                for p in range(kh):
                    for q in range(kw):
                        for c in range(C_in):
                            y[i, j, n] += x[i + p, j + q, c] * w[p, q, c, n]
    return y


# %% [markdown]
# That is the whole idea, in six loops. The library's `ops.conv2d` takes a batch of $B$ images, $(B, H, W, C)$,
# and gives the same numbers:

# %%
x = grey[:16, :16, None]  # (H, W, C_in = 1)
w = vertical[:, :, None, None]  # (kh, kw, C_in = 1, C_out = 1)
assert close(naive_convolution(x, w), ops.conv2d(x[None], w).data[0], 1e-12)
print("input", x.shape, "-> output", naive_convolution(x, w).shape)

# %% [markdown]
# ## Feature maps
#
# Different kernels find different things. Five made by hand:

# %%
by_hand = {
    "vertical edges": vertical,
    "horizontal edges": vertical.T,
    "slanting edges": np.array([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]]) / 8,
    "blur: the mean of 9 pixels": np.full((3, 3), 1 / 9),
    "detail: pixel minus the mean of 4 neighbours": np.array(
        [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]
    )
    / 4,
}
photo = photograph(64)
grey = photo.mean(axis=-1, keepdims=True)[None].astype(np.float64)  # (B = 1, H, W, C = 1)
w = np.stack(list(by_hand.values()), axis=-1)[:, :, None]  # (3, 3, C_in = 1, C_out = 5)
maps = ops.conv2d(grey, w, padding=1).data  # (1, H, W, 5)
assert close(maps[0, 1:-1, 1:-1], naive_convolution(grey[0], w), 1e-12)
shown = np.moveaxis(maps, -1, 0).reshape(5, 64, 64, 1).copy()
shown[[0, 1, 2, 4]] *= 2.5  # differences of neighbours are small; now the eye sees them
figure(
    plotting.image_grid(np.concatenate([grey, shown]), ["the image", *by_hand], columns=3),
    "One image and five feature maps. In the maps of edges and of detail, shown 2.5 times as "
    "strong, mid-grey is 0; black and white are strong answers of either sign. Stripes and the cap's rim answer "
    "to different kernels.",
)

# %% [markdown]
# A network has no kernels made by hand. Its weights start as random numbers and are learned, with the gradients of
# notebook 2. Let us see it happen: we hide the kernel, show only the image and the map that the kernel made, and
# train a random kernel to make the same map.

# %%
target = ops.conv2d(grey, vertical[:, :, None, None], padding=1).data
learned = Tensor(0.1 * rng.standard_normal((3, 3, 1, 1)), requires_grad=True)
begun = learned.data[:, :, 0, 0]
for _ in range(1000):
    loss = ops.mse(ops.conv2d(grey, learned, padding=1), target)
    loss.backward()
    learned.data, learned.grad = learned.data - 0.2 * learned.grad, None
assert close(learned.data[:, :, 0, 0], vertical, 0.01)

# %%
figure(
    matrices(
        [Matrix("at random", begun, number="{:.3f}"), "→"]
        + [Matrix("after training", learned.data[:, :, 0, 0], number="{:.3f}"), "≈"]
        + [Matrix("the hidden kernel", vertical, number="{:.3f}")],
        "A kernel before and after training, and the one that made the training data.",
        0.58,
    ),
    "Nobody wrote these weights: training has found them from the image and the map alone.",
)

# %% [markdown]
# ## Padding and stride
#
# The middle of a 3 × 3 kernel cannot stand on the outermost pixels, so the result is two rows and two columns
# smaller. **Padding** puts zeros around the image: with one row on each side the result is as large as the image.
# **Stride** 2 moves the kernel by two pixels at a time: the result has half the height and width. That is how the
# U-Net makes its images smaller.

# %%
figure(
    windows(6, 3, [(0, 1), (1, 1), (1, 2)]),
    "A 6 × 6 image; hatched: padding with zeros. The first window (solid frame), the "
    "second (dashed), and the middle of every window (dots): one output each.",
)

# %%
source(pad_image)

# %% [markdown]
# How large is the output? Let the kernel go straight down: each place where it stops gives one row of the output,
# so count these places. The padded image has $H + 2P$ rows, where $H$ is the image's height and $P$ the padding
# on each side. The first is at row 0, the next $s$ rows below (the stride), and the last is the last one where it
# still fits with all its $k$ rows (the kernel's height). Exercise 3.1 asks for the formula; here is what the
# library makes of a few:

# %%
rows = []
cases = [(32, 3, 0, 1), (32, 3, 1, 1), (32, 3, 1, 2), (32, 1, 0, 1), (33, 5, 2, 2)]
for H, k, padding, stride in cases:
    y = ops.conv2d(
        np.zeros((1, H, H, 1)), np.zeros((k, k, 1, 1)), stride=stride, padding=padding
    )
    rows.append([H, k, padding, stride, y.shape[1]])
table(["image's height", "kernel's height", "padding", "stride", "output's height"], rows)

# %% [markdown]
# ## Channels
#
# A colour image has three numbers in each pixel; inside a network a pixel has dozens or hundreds, called
# **channels**. A kernel then has weights for every input channel, and the sum runs over these too. And we want many
# feature maps, so there is one such kernel for each *output* channel $n$, with a bias $b_n$:
#
# $$y_{i,j,n} = b_n + \sum_{p,q}\sum_{c} x_{i+p,\,j+q,\,c}\;W_{p,q,c,n}$$
#
# So the weights are $k_h \cdot k_w \cdot C_{in} \cdot C_{out}$ numbers. A kernel of size 1 × 1 is a useful special
# case: it looks at one pixel and mixes its channels. Here are two, made by hand, on the photograph in colour:

# %%
mixing = np.array([[1, -0.5], [-0.5, -0.5], [-0.5, 1]])  # (C_in = 3, C_out = 2)
mixing = mixing[None, None]  # (1, 1, C_in, C_out): the kernel is 1 high and 1 wide
mixed = ops.conv2d(photo[None].astype(np.float64), mixing).data  # (1, 64, 64, 2)
edges = ops.conv2d(mixed[..., :1], vertical[:, :, None, None], padding=1).data
in_grey = [np.repeat(a, 3, axis=-1) for a in (mixed[..., :1], mixed[..., 1:], 2.5 * edges)]
figure(
    plotting.image_grid(
        np.concatenate([photo[None], *in_grey]),
        ["the image", "redness", "blueness", "edges of redness"],
    ),
    "Redness is red less half of green and blue, blueness the same for blue: two 1 × 1 "
    "kernels. A second convolution, on the first map alone, finds where redness begins "
    "and ends from left to right (2.5 times as strong; mid-grey is 0).",
)

# %% [markdown]
# A 1 × 1 convolution is the same matrix applied to every pixel. The library has this as `ops.linear`, too, for
# lists of vectors of any kind:

# %%
as_linear = ops.linear(photo[None].astype(np.float64), mixing[0, 0]).data
assert close(as_linear, mixed, 1e-12)

# %% [markdown]
# ## A convolution is a product of matrices
#
# And larger kernels? Write the pixels under each window into one row, and the kernel into one column: multiplying and
# adding up is now a row times a column. All windows together give a matrix. This rearrangement is called
# **im2col** (image to columns; the first programs stored each window as a column, here it is a row).

# %%
small = np.array([[1, 0, 2, 1], [3, 1, 0, 2], [0, 2, 1, 1], [1, 0, 3, 2]], float)
kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], float)
columns = im2col(small[None, :, :, None], 3, 3, stride=1)  # (B, H_out, W_out, kh kw C_in)
result = columns.reshape(-1, 9) @ kernel.reshape(9, 1)
assert close(
    result.reshape(1, 2, 2, 1),
    ops.conv2d(small[None, :, :, None], kernel[:, :, None, None]).data,
)
figure(
    patches_as_rows(small, columns.reshape(4, 9), kernel, result, marked=1),
    "A 4 × 4 image has four 3 × 3 windows. Their pixels become the four rows of a "
    "matrix; the kernel becomes a column. Shaded: one window, the row it becomes, and "
    "the output it gives.",
)

# %% [markdown]
# With $C_{in}$ channels the rows are $k_h k_w C_{in}$ long; with $C_{out}$ kernels there are $C_{out}$ columns: one
# large product of matrices, and that is what computers are best at. The library's version in plain NumPy is this.
# It is called the **reference**: compiled kernels must give its numbers.

# %%
source(im2col, conv2d_forward)

# %% [markdown]
# `im2col` makes no loop: it tells NumPy to read the same memory with other steps (`strides`), so that neighbouring
# windows overlap, and `reshape` copies them out. The further arguments (`x2`, `shift`, `residual`, `upsample`,
# `silu`) are what stands around a convolution in a U-Net; they are left out in this notebook. What im2col costs is
# memory: each pixel is copied once for each window that covers it.

# %%
x = rng.standard_normal((1, 32, 32, 64))
columns = im2col(pad_image(x, ((1, 1), (1, 1))), 3, 3, 1)
print(f"image   {x.shape}: {x.size:,} numbers")
print(f"columns {columns.shape}: {columns.size:,} numbers")

# %% [markdown]
# ## The way back
#
# From `dy`, the gradient of the output, `backward` must make the gradients of the weights and of the pixels. As a
# product $Y = X_{col}\,W$ (the columns times the weights), the first is known from notebook 2:
#
# $$dW = X_{col}^\top\; dY$$
#
# At every place each weight was multiplied by one pixel. Its gradient is the sum, over all places, of that pixel
# times the gradient of the output there. That is what *sharing* a weight means: used many times, so its gradient
# is a sum.
#
# For the pixels, think of one output. It has read nine pixels, each times a weight. So it hands its gradient back to
# these nine, each times the same weight. A pixel that several windows have read gets the sum:
#
# $$dx_{i+p,\,j+q} \mathrel{+}= dy_{i,j}\,W_{p,q}$$

# %%
source(conv2d_backward)

# %% [markdown]
# The two loops run over the nine places within the kernel. For each of them, `here` is the part of the image that
# this weight has read, for all windows at once, and gets the gradient. In pictures, with a `dy` that is zero but for
# one output:

# %%
kernel = np.arange(1.0, 10.0).reshape(3, 3)
image = np.zeros((1, 5, 5, 1))


def gradient_of_pixels(dy):
    """dx (5, 5) for dy (3, 3)."""
    dx, *_ = conv2d_backward(dy[None, :, :, None], image, kernel[:, :, None, None], 1, NONE)
    return dx[0, :, :, 0]


one = np.zeros((3, 3))
one[0, 1] = 1
two = one.copy()
two[1, 2] = 10
figure(
    matrices(
        [Matrix("the kernel", kernel), Matrix("dy", one, one != 0), "→"]
        + [Matrix("dx", gradient_of_pixels(one), gradient_of_pixels(one) != 0)],
        "One output's gradient goes back to the nine pixels that it has read, times the "
        "kernel's weights.",
    ),
    "One output, in the first row and second column, hands its gradient of 1 back: the "
    "kernel appears where it had stood.",
)

# %%
figure(
    matrices(
        [Matrix("the kernel", kernel), Matrix("dy", two, two != 0), "→"]
        + [Matrix("dx", gradient_of_pixels(two), gradient_of_pixels(two) != 0)],
        "Two outputs hand their gradients back; where their windows overlap, the "
        "gradients add up.",
    ),
    "Two outputs, with gradients 1 and 10. Where their windows overlap the shares add "
    "up: the 15 is 1 · 5 + 10 · 1.",
)

# %% [markdown]
# Seen from the pixel, with stride 1, this is again a convolution. The pixel collects from all outputs around it;
# the output to its *left* has read it with a weight to the *right* of the kernel's middle. So the kernel is
# **flipped** in both directions, and input and output channels change places. That is useful: a fast forward is
# at once a fast backward.

# %%
shapes = [(2, 7, 7, 3), (3, 3, 3, 4), (2, 7, 7, 4)]
x, w, dy = (rng.standard_normal(shape) for shape in shapes)
dx, _, dw, _ = conv2d_backward(dy, x, w, 1, ((1, 1), (1, 1)))
flipped = w[::-1, ::-1].swapaxes(2, 3)  # (kh, kw, C_out, C_in)
assert close(dx, ops.conv2d(dy, flipped, padding=1).data, 1e-12)

# %% [markdown]
# And is it right? We ask the function, as in notebook 2, with odd sizes, uneven padding and a stride:

# %%
checked = {
    "3 × 3, padding 1": (dict(padding=1), (2, 5, 4, 3), (3, 3, 3, 2)),
    "3 × 3, padding 1, stride 2": (dict(padding=1, stride=2), (2, 6, 5, 3), (3, 3, 3, 2)),
    "2 × 3, uneven padding": (dict(padding=((0, 1), (2, 0))), (1, 4, 5, 2), (2, 3, 2, 3)),
    "1 × 1": (dict(), (2, 3, 3, 4), (1, 1, 4, 2)),
}
rows = []
for name, (settings, *shapes) in checked.items():
    arrays = [rng.standard_normal(shape) for shape in (*shapes, shapes[1][-1:])]
    error = gradcheck(lambda x, w, b, s=settings: ops.conv2d(x, w, b, **s), *arrays)
    rows.append([name, f"{error:.0e}"])
table(["convolution", "largest relative error of its gradients"], rows)

# %% [markdown]
# ## Why it suits images
#
# **Nearby pixels are related.** Take two pixels of the photograph and ask how alike they are (their correlation:
# near 1, where one is bright the other is, too; near 0, the brightness of one does not help to guess that of the
# other along a straight line). It falls with the distance, so what helps to guess a pixel lies near it:

# %%
large = photograph(128).mean(axis=-1)
distances = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def alike(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


correlations = {
    "to the right": [alike(large[:, :-d], large[:, d:]) for d in distances],
    "downwards": [alike(large[:-d], large[d:]) for d in distances],
}
chart = plotting.line_plot(
    {name: (distances, values) for name, values in correlations.items()},
    "distance (pixels)",
    "correlation",
    marker="o",
)
figure(
    chart,
    "Neighbours are much alike. The further apart two pixels are, the less one tells of "
    "the other.",
)

# %% [markdown]
# **What is worth finding is worth finding everywhere.** An edge is an edge in every corner. The same weights slide
# over the whole image, so if the image moves, the feature map moves with it, and nothing has to be learned twice:

# %%
w = rng.standard_normal((3, 3, 1, 4))
moved = np.roll(grey, (5, 3), axis=(1, 2))  # 5 rows down, 3 columns to the right
before, after = ops.conv2d(grey, w).data, ops.conv2d(moved, w).data
assert close(after[:, 5:, 3:], before[:, :-5, :-3], 1e-12)

# %% [markdown]
# **It needs few parameters.** Locality and sharing save weights. A *dense* layer, which joins every input number to
# every output number, would need one weight for each such pair:

# %%
rows = []
for H, C_in, C_out in [(32, 3, 64), (32, 64, 64), (64, 64, 64)]:
    dense = (H * H * C_in) * (H * H * C_out)
    conv = 3 * 3 * C_in * C_out
    rows.append([f"{H} × {H}, {C_in} → {C_out} channels", f"{conv:,}", f"{dense:,}"])
table(["layer", "weights of a 3 × 3 convolution", "weights of a dense layer"], rows)

# %% [markdown]
# The convolution's weights do not even depend on the size of the image.
#
# **It sees further with depth.** One 3 × 3 kernel sees 3 × 3 pixels. But a second one on top of it sees 3 × 3 outputs
# of the first, and so 5 × 5 pixels. What an output can see is called its **receptive field**. We need not derive it:
# the gradient tells which pixels an output depends on. Give the middle output the gradient 1 and all others 0, and go
# backward:


# %%
def seen_by_the_middle(layers, stride=1, size=63):
    """dx of the middle output of stacked 3 x 3 convolutions whose weights are all 1/9."""
    x = Tensor(np.zeros((1, size, size, 1)), requires_grad=True)
    w, y = np.full((3, 3, 1, 1), 1 / 9), x
    for _ in range(layers):
        y = ops.conv2d(y, w, stride=stride, padding=1)
    dy = np.zeros(y.shape)
    dy[0, y.shape[1] // 2, y.shape[2] // 2] = 1
    y.backward(dy)
    return x.grad[0, :, :, 0]


stacks = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2)]
pictures = [seen_by_the_middle(layers, stride) for layers, stride in stacks]
widths = [int((p != 0).any(axis=0).sum()) for p in pictures]
figure(
    reach(
        pictures,
        [
            f"{n} layer{'s' * (n > 1)}, stride {s}:\n{width} × {width} pixels"
            for (n, s), width in zip(stacks, widths, strict=True)
        ],
    ),
    "Which of 63 × 63 pixels one output depends on, and a frame around them. The darker a "
    "pixel, the larger its gradient (drawn: the square root, in shares of each picture's "
    "largest). Each layer of stride 1 adds two pixels to the width; with stride 2 each layer "
    "doubles the reach of the next.",
)
assert widths[:4] == [1 + 2 * n for n in (1, 2, 4, 8)]

# %% [markdown]
# So deeper layers can answer to larger things: from edges to textures, to eyes and faces, to whole objects. What
# trained networks answer to has been made visible, layer by layer, and follows such a sequence ([Zeiler and Fergus
# 2013](https://arxiv.org/abs/1311.2901)).
#
# This is also why the U-Net makes its images smaller on the way down: to see *what* is in the picture it needs a wide
# view. It loses the exact *where*, and gets it back on the way up (notebook 5). Attention (notebook 4) is the other
# way to see far: there, too, each output is a weighted combination of inputs, but of *all* of them, and the weights
# are computed from the content. A convolution's weights are fixed, and look only at the neighbours.
#
# ## From six loops to a fast kernel
#
# How fast is it? Count the work: each output needs one multiplication and one addition for each weight, so
#
# $$\text{operations} = 2 \cdot B\,H_{out} W_{out} \cdot k_h k_w \cdot C_{in} C_{out}$$
#
# Divided by the time, this gives operations per second; a billion of them is a GFLOP/s. We compare four ways:
#
# 1. the six loops in Python, on a tiny image, as we do not want to wait;
# 2. loops over the kernel and the input channels only: each step is a NumPy operation on all pixels and outputs;
# 3. im2col, the library's reference, in plain NumPy: one large product of matrices;
# 4. the library's compiled kernel, where it has been built ("kernel" in the word's other sense: a fast routine).


# %%
def shifted_convolution(x, w):
    """Like naive_convolution: a shifted copy of the image for each place in the kernel."""
    H, W, C_in = x.shape
    kh, kw, _, C_out = w.shape
    h, v = H - kh + 1, W - kw + 1
    y = np.zeros((h, v, C_out), x.dtype)
    for p in range(kh):
        for q in range(kw):
            for c in range(C_in):
                y += x[p : p + h, q : q + v, c, None] * w[p, q, c]
    return y


def random_case(size, channels):
    """An image (size, size, C) and weights (3, 3, C, C), in single precision."""
    shapes = (size, size, channels), (3, 3, channels, channels)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def with_kernels(kind, x, w):
    with kernels(kind):
        return conv2d_forward(x[None], w, None, 1, NONE)[0]


tiny, whole = random_case(8, 8), random_case(66, 64)
ways = {
    "six loops (tiny image)": (lambda: naive_convolution(*tiny), tiny),
    "loops over the kernel": (lambda: shifted_convolution(*whole), whole),
    "im2col": (lambda: with_kernels("reference", *whole), whole),
}
if "cpu" in MODULES:
    ways["compiled kernel"] = (lambda: with_kernels("cpu", *whole), whole)

assert close(naive_convolution(*tiny), with_kernels("reference", *tiny), 1e-5)
for way, (run, case) in ways.items():  # all give the same numbers, up to rounding
    assert close(run(), with_kernels("reference", *case), 1e-4), way

# %% [markdown]
# The times are medians of 9 rounds (the middle one of the sorted times); in each round every way has its turn.

# %%
seconds = {way: [] for way in ways}
for _ in range(9):
    for way, (run, _) in ways.items():
        start = time.perf_counter()
        run()
        seconds[way].append(time.perf_counter() - start)

speed, rows = {}, []
for way, (run, (_, w)) in ways.items():
    took = np.median(seconds[way])
    operations = 2 * run().size * w[..., 0].size
    speed[way] = operations / took / 1e9
    times = speed[way] / speed["six loops (tiny image)"]
    rows.append(
        [
            way,
            f"{operations / 1e6:.3g} million",
            f"{1e3 * took:.2f} ms",
            f"{speed[way]:.3g}",
            f"{times:,.0f}",
        ]
    )
table(["way", "operations", "time", "GFLOP/s", "times as fast as six loops"], rows)

# %%
chart = plotting.bars(
    list(speed), {"speed": list(speed.values())}, "GFLOP/s (logarithmic)", log=True
)
figure(
    chart,
    "The same sum, four ways, on this computer. Mind the scale: every step to the right "
    "is a factor of ten.",
)

# %% [markdown]
# Operations are counted by the formula above, however a way goes about it. The second way leaves the inner loops to
# NumPy, where they run as compiled code. The third hands all the work to one product of matrices, which uses each
# number many times while it is in the processor's cache, a small, fast memory that keeps what was used last. The
# compiled kernel does not build the large matrix at all, and it has one more idea.
#
# ## Fewer multiplications: Winograd's idea
#
# Take one dimension: four inputs $d_0 \dots d_3$, a kernel of three weights $g_0, g_1, g_2$, two outputs.
#
# $$y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2 \qquad y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2$$
#
# That looks like 6 multiplications. But 4 are enough, since the two outputs share inputs:
#
# $$m_1 = (d_0 - d_2)\,g_0 \qquad m_2 = (d_1 + d_2)\,\tfrac{g_0+g_1+g_2}{2} \qquad
#   m_3 = (d_2 - d_1)\,\tfrac{g_0-g_1+g_2}{2} \qquad m_4 = (d_1 - d_3)\,g_2$$
#
# $$y_0 = m_1 + m_2 + m_3 \qquad y_1 = m_2 - m_3 - m_4$$
#
# The halves and sums of weights are computed once for the whole image, so they hardly count. By hand, with
# $d = (1, 3, 2, 5)$ and $g = (2, 4, -2)$:
#
# - directly, $y_0 = 1\cdot 2 + 3\cdot 4 - 2\cdot 2 = 10$ and $y_1 = 3\cdot 2 + 2\cdot 4 - 5\cdot 2 = 4$;
# - the weights become $2,\ \tfrac{2+4-2}{2} = 2,\ \tfrac{2-4-2}{2} = -2,\ -2$;
# - the inputs become $1-2 = -1,\ 3+2 = 5,\ 2-3 = -1,\ 3-5 = -2$;
# - four products: $m = (-2,\ 10,\ 2,\ 4)$, so $y_0 = -2 + 10 + 2 = 10$ and $y_1 = 10 - 2 - 4 = 4$.
#
# As matrices, the sums of the inputs are $B^\top d$, those of the weights $G g$, those of the products $A^\top m$
# (the names are the paper's; this $B$ is no batch):

# %%
Bt = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float)
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
At = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float)

d, g = np.array([1.0, 3, 2, 5]), np.array([2.0, 4, -2])
m = (G @ g) * (Bt @ d)  # the four multiplications
print("m =", m, " y =", At @ m)
assert close(At @ m, [10, 4])

# %% [markdown]
# In two dimensions do the same along the rows and along the columns: a 4 × 4 tile of the image and a 3 × 3 kernel
# give 2 × 2 outputs with $4 \cdot 4 = 16$ multiplications instead of $4 \cdot 9 = 36$, that is 2.25 times fewer:

# %%
d, g = rng.standard_normal((4, 4)), rng.standard_normal((3, 3))
m = (G @ g @ G.T) * (Bt @ d @ Bt.T)  # 16 multiplications
direct = ops.conv2d(d[None, :, :, None], g[:, :, None, None]).data[0, :, :, 0]
assert close(At @ m @ At.T, direct, 1e-12)
print(f"{m.size} multiplications instead of {direct.size * g.size}")

# %% [markdown]
# This is called F(2×2, 3×3) ([Lavin and Gray 2015](https://arxiv.org/abs/1509.09308)). With many channels the 16
# multiplications become 16 products of matrices, and there are larger tiles too: F(4×4, 3×3) needs 36 instead of 144
# multiplications. `csrc/cpu/conv2d.cpp` does both, and chooses by the sizes of the image and the channels.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n03_convolution.py`.
#
# **3.1** The output's height, as a whole number, for an image of height $H$, a kernel of height $k$, `padding` zeros on
# each side and a stride. (In Python `a // b` divides and rounds down.)

# %%
from exercises import n03_convolution as check


def output_height(H, k, padding, stride):
    return ...


check.height(output_height)

# %% [markdown]
# **3.2** Make a 3 × 3 kernel that answers to vertical edges, and to nothing else: not to horizontal edges, and not to
# a flat grey. But use other numbers than the kernel above: only $-1$, 0 and 1.

# %%
my_kernel = ...  # such as np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
check.vertical_edges(my_kernel)

# %% [markdown]
# **3.3** An image (H, W), a kernel `w` (k, k), no padding, stride 1. All of `dy` is zero but for the output in row
# `i`, column `j`, where it is 1. Write down `dx`, an array (H, W).


# %%
def pixels_gradient(w, i, j, H, W):
    dx = np.zeros((H, W))
    ...  # fill in the pixels that this output has read
    return dx


check.one_output(pixels_gradient)

# %% [markdown]
# ## Where to go on
#
# The convolution is `minidiff/ops/conv2d.py`; its fast twin is `csrc/cpu/conv2d.cpp`; the layer that holds the
# weights is `Conv2d` in `minidiff/nn.py`. Next: [4. GroupNorm and attention](04_norm_and_attention.ipynb).
