# %% [markdown]
# # 2. Autograd from nothing
#
# A network is a formula with thousands or millions of adjustable numbers, its parameters. To train it, we ask of
# every one of them: if this number were a little larger, would the error grow or shrink, and how fast? The answers
# are derivatives. This notebook shows the machine that finds all of them in one pass, and that every later notebook
# trains with. It is one short file.
#
# **What you will learn**
#
# - how a `Tensor` remembers how it was made;
# - how the chain rule becomes a walk from the result back to the parameters;
# - how the backward of one operation is written, and how to check it without trusting it;
# - why gradients must be *added* where a value is used twice;
# - what broadcasting turns into on the way back, and why the memory is freed;
# - how all this trains a small network.
#
# You need the derivative and the chain rule from school, and NumPy arrays. Nothing from notebook 1 is needed.

# %%
from course import begin, close, figure, source, table

begin(2)

# %%
import weakref

import numpy as np

from drawing_02 import Matrix, graph, matrices
from minidiff import Tensor, no_grad, ops, plotting
from minidiff.gradcheck import gradcheck
from minidiff.ops.silu import sigmoid, silu_backward, silu_forward
from minidiff.tensor import Node, record, topological_order, unbroadcast

rng = np.random.default_rng(0)

# %% [markdown]
# ## A Tensor remembers
#
# A `Tensor` is an array of floats that may want a gradient. Here is a network of one neuron (its inputs times
# weights, plus a number called the bias), small enough to do by hand: an input $x$, a weight $w$, a bias $b$, and
# as the error the square of the output.
#
# $$z = w\,x \qquad s = z + b \qquad y = s^2$$


# %%
def one_neuron():
    w = Tensor(2.0, requires_grad=True)
    b = Tensor(-1.0, requires_grad=True)
    x = Tensor(3.0)  # data, not a parameter: it wants no gradient
    z = w * x
    s = z + b
    y = s**2
    return {"w": w, "x": x, "b": b, "z": z, "s": s, "y": y}


net = one_neuron()
net["y"]

# %% [markdown]
# The result knows that it was "made by power". Every operation of the library (an *op*) computes its result with
# plain NumPy and then calls `record`, which puts a `Node` behind it: the op's name, its inputs, and a function for
# the way back.

# %%
source(record, Node)

# %% [markdown]
# That is the whole memory. Nobody draws up the graph of the computation: each result points at its inputs, these
# point at theirs, and so on. People call this the **tape**. We can follow the pointers and draw what they reach:

# %%
figure(
    graph(net["y"], net),
    "What y remembers. Arrows run from inputs to results. Numbers in black discs: the order in "
    "which `backward` will visit. The constant x (dashed) has no number: it wants no "
    "gradient, so nobody needs to go there.",
)

# %% [markdown]
# Tensors that no op has made, here $w$, $b$ and $x$, are called **leaves**. The parameters of a network are leaves.
#
# ## The chain rule, one node at a time
#
# We want $\dfrac{dy}{dw}$ and $\dfrac{dy}{db}$. The chain rule says: multiply the derivatives along the way,
#
# $$\frac{dy}{dw} = \frac{dy}{ds}\cdot\frac{ds}{dz}\cdot\frac{dz}{dw} = 2s \cdot 1 \cdot x$$
#
# Read from left to right, it starts at the result and ends at the parameter. At every point of the way we hold *one*
# number: how much $y$ changes when the value at this point changes. That is the **gradient** of this value. In code the
# gradient of an op's result is called `dy`, and the op's `backward` turns it into the gradients of the op's inputs. It
# knows nothing of the rest of the graph. Here is multiplication, forward and backward:

# %%
source(ops.mul)

# %% [markdown]
# For $y = a\,b$ the derivative with respect to $a$ is $b$, so `da = dy * b`. (`unbroadcast` does nothing to single
# numbers; its turn comes below. `None` stands for a gradient that nobody wants.)
#
# Now walk by hand. We call the three backward functions that the ops have left in the nodes:

# %%
dy = np.ones(())  # dy/dy = 1
(ds,) = net["y"].node.backward(dy)  # y = s^2:   ds = dy * 2 s  = 1 * 2 * 5
dz, db = net["s"].node.backward(ds)  # s = z + b: dz = ds, db = ds
dw, dx = net["z"].node.backward(dz)  # z = w x:   dw = dz * x   = 10 * 3
print(f"ds = {ds}, dz = {dz}, db = {db}, dw = {dw}, dx = {dx}")

# %%
figure(
    graph(net["y"], net, {"y": dy, "s": ds, "z": dz, "b": db, "w": dw}),
    "The same graph with the gradients. That of y is 1; each other one is made of the gradient "
    "at the end of its arrow and the op there.",
)

# %% [markdown]
# If $w$ grows by a small amount, $y$ grows by 30 times as much. Try it: with $w = 2.001$ the error is
# $(2.001\cdot 3 - 1)^2 = 25.030009$ instead of 25. `Tensor.backward` does the same walk for any graph:

# %%
net["y"].backward()
print(f"dy/dw = {net['w'].grad}, dy/db = {net['b'].grad}")
assert close(net["w"].grad, dw) and close(net["b"].grad, db)

# %%
source(Tensor.backward)

# %% [markdown]
# The heart of it is the `while` loop. In words: take the next Tensor; if it is a leaf, keep its gradient; else
# call its node's `backward`, and hand each input its share. (`accumulate(a, b)` is $a + b$; `xp` is NumPy, or
# what takes its place on a GPU.) Two details deserve a closer look: the *order*, and the *sum*.
#
# Why backwards at all? The other direction, from one parameter forward to the result, works too, but it answers for
# *one* parameter. The walk backwards answers for all parameters at once, and its work is a small multiple of the
# computation's own.
#
# ## A value used twice
#
# Take $y = a\cdot a$. The node of this product has $a$ as its first *and* as its second input, and hands back two
# gradients for it: $a$ and $a$. The derivative is $2a$: their **sum**. In general, if a value reaches the result along
# several ways, a small change of it travels all of them, and the effects add up:
#
# $$\frac{dy}{da} = \sum_{\text{uses } u \text{ of } a} \frac{dy}{du}\cdot\frac{du}{da}$$
#
# Writing `=` where `+=` belongs is the classical mistake of anyone who writes their first autograd. Here is the walk
# with that mistake:


# %%
def backward_keeping_the_last(root):
    """The gradients by id: wrong where a value is used twice."""
    grads = {id(root): np.ones_like(root.data)}
    for tensor in reversed(topological_order(root)):
        if tensor.node is not None:
            gradients = tensor.node.backward(grads[id(tensor)])
            for x, dx in zip(tensor.node.inputs, gradients, strict=True):
                grads[id(x)] = dx  # the mistake: what was here before is lost
    return grads


examples = {
    "a * 3": (lambda a: a * 3, "3"),
    "a * a": (lambda a: a * a, "2 a = 4"),
    "a + a * 5": (lambda a: a + a * 5, "1 + 5 = 6"),
    "a * a * a": (lambda a: a * a * a, "3 a^2 = 12"),
}
rows = []
for name, (formula, calculus) in examples.items():
    a = Tensor(2.0, requires_grad=True)
    wrong = backward_keeping_the_last(formula(a))[id(a)]
    formula(a).backward()
    rows.append([f"`{name}`", calculus, f"{wrong:g}", f"{a.grad:g}"])
table(["y, at a = 2", "by calculus", "keeping the last", "Tensor.backward"], rows)

# %% [markdown]
# Where $a$ is used once, both agree. Otherwise the mistaken walk loses all uses but the last, and raises no error;
# only the numbers are wrong. The third line, $a$ plus something computed from $a$, is called a residual
# connection; the U-Net, the network of this course (notebook 5), is full of them.
#
# ## The right order
#
# A Tensor may be visited only when *all* that was made of it has handed back its share: otherwise it would pass on an
# incomplete gradient. So backward needs an order in which every result comes before its inputs. `topological_order`
# finds the reverse of one, inputs before results:

# %%
source(topological_order)

# %% [markdown]
# It looks into each Tensor twice: the first time it puts the inputs on the stack above it, the second time, when
# these are all done, it appends the Tensor itself. Here is a graph in which the order matters:

# %%
a = Tensor(2.0, requires_grad=True)
h = a**2
t = ops.silu(h)
r = h + t
figure(
    graph(r, {"a": a, "h": h, "t": t, "r": r}),
    "h is used twice, by t and by r. It may be visited only third, when both have handed "
    "back what they owe it.",
)

# %% [markdown]
# Could we not skip the order, and walk every *path* from the result to the leaves, adding up at the ends? The answer
# would be right. But count: if every step uses its input twice, as in `x = x + x`, the number of paths doubles with
# every step.


# %%
def paths(tensor):
    """How many ways lead from this Tensor back to the leaves."""
    return 1 if tensor.node is None else sum(paths(x) for x in tensor.node.inputs)


rows = []
for n in (1, 2, 5, 10, 15):
    x = Tensor(1.0, requires_grad=True)
    for _ in range(n):
        x = x + x
    rows.append([n, len(topological_order(x)), paths(x)])
table(["steps", "Tensors to visit in order", "paths"], rows)

# %% [markdown]
# ## Writing a backward: SiLU
#
# A layer of a network multiplies by a matrix of weights and adds a bias. Several such layers in a row would again
# be one matrix and one bias. So between them stands a function that is not a straight line. That of our networks
# is SiLU, with the sigmoid $\sigma$ (a smooth step from 0 to 1):
#
# $$\mathrm{silu}(x) = x\,\sigma(x), \qquad \sigma(x) = \frac{1}{1+e^{-x}},
# \qquad \sigma'(x) = \sigma(x)\,(1-\sigma(x))$$
#
# The product rule gives its derivative, $\sigma(x) + x\,\sigma(x)\,(1-\sigma(x))$, and the chain rule the factor `dy`:

# %%
source(silu_forward, silu_backward, ops.silu)

# %% [markdown]
# Three small functions: plain arrays forward, plain arrays backward, and the op that records them. (`@kernel` lets a
# compiled version take the place of the function where there is one.) The picture is made by calling them:

# %%
xs = np.linspace(-6, 6, 200)
figure(
    plotting.line_plot(
        {
            "silu": (xs, silu_forward(xs)),
            "its derivative": (xs, silu_backward(np.ones_like(xs), xs)),
        },
        "x",
        "value",
    ),
    "SiLU and its derivative. Far left both are almost 0, far right silu is almost x and "
    "its slope almost 1.",
)

# %% [markdown]
# ### Many inputs, many outputs
#
# If an op has $n$ inputs and $m$ outputs, its derivative is a matrix of $m \times n$ numbers, the Jacobian $J$: entry
# $(i, j)$ says how output $i$ moves when input $j$ does. The chain rule then reads $dx = J^\top dy$ ($\top$: rows
# and columns exchanged): input $j$ collects from every output it has moved. But **nobody ever writes $J$ down**.
# For SiLU it would be nearly all zeros, since each output depends on one input. And for a product of matrices, $Y
# = A B$, the two products below are all there is to it:
#
# $$dA = dY\,B^\top \qquad dB = A^\top\,dY$$

# %%
source(ops.matmul)

# %%
a = Tensor(rng.standard_normal((64, 256)), requires_grad=True)
b = Tensor(rng.standard_normal((256, 10)), requires_grad=True)
y = a @ b
dy = rng.standard_normal(y.shape)
y.backward(dy)  # dy is given: only a single number has the default dy = 1
print(f"da {a.grad.shape}, db {b.grad.shape}; Jacobian dy/da: {y.size * a.size:,} numbers")
assert close(a.grad, dy @ b.data.T) and close(b.grad, a.data.T @ dy)

# %% [markdown]
# You need not remember which factor is transposed. The gradient has the shape of the input, and with $A$: (64,
# 256), $B$: (256, 10), $dY$: (64, 10), as here, only one product of $dY$ and $B$ has the shape of $A$.
#
# ## Is it right? Ask the function
#
# A wrong gradient raises no error. So every op of the library is compared with what the function really does when its
# input moves a little. Moving by a small step $h$ to either side gives the **central difference**
#
# $$f'(x) \approx \frac{f(x+h) - f(x-h)}{2h}$$
#
# How small should $h$ be? If it is large, the curve bends within the step. If it is tiny, the two values agree in
# almost all their digits, and the subtraction leaves nothing but rounding. Measured on SiLU, for both kinds of
# floats:

# %%
steps = np.logspace(-11, -1, 41)
points = np.linspace(-3, 3, 200)
exact = silu_backward(np.ones_like(points), points)


def error_of_difference(h, dtype):
    """Root mean square error of the central difference, in floats of this kind."""
    x, h = points.astype(dtype), dtype(h)
    difference = (silu_forward(x + h) - silu_forward(x - h)) / (2 * h)
    return np.sqrt(np.mean((difference.astype(np.float64) - exact) ** 2))


errors = {
    kind.__name__: (steps, [error_of_difference(h, kind) for h in steps])
    for kind in (np.float32, np.float64)
}
figure(
    plotting.line_plot(errors, "step h", "error of the derivative", log="xy"),
    "Right of the lowest point the curve's bend spoils the difference, left of it "
    "rounding does. Single precision (float32) gets about five digits at best; double "
    "precision (float64) does best around h = 0.00001. Where h is so small that x + h is x, the "
    "difference is 0.",
)

# %% [markdown]
# That is why `gradcheck` works in float64, with $h = 10^{-5}$. For an op with many inputs and outputs it draws a
# random direction $v$ to move the inputs along, and a random $dy$ to weigh the outputs with, and compares two numbers
# that must be the same ($\langle\cdot,\cdot\rangle$ multiplies number by number and adds up):
#
# $$\Big\langle dy,\ \frac{f(x + h v) - f(x - h v)}{2h}\Big\rangle \;=\; \langle dx,\ v\rangle$$
#
# On the left the function is asked, on the right our `backward`. Every entry of the Jacobian has a part in both.

# %%
source(gradcheck)

# %%
checked = {
    "silu": (ops.silu, rng.standard_normal((4, 5))),
    "mul, broadcasting": (ops.mul, rng.standard_normal((4, 5)), rng.standard_normal(5)),
    "matmul": (ops.matmul, rng.standard_normal((4, 5)), rng.standard_normal((5, 3))),
    "all of our neuron": (lambda w, x, b: (w * x + b) ** 2, 2.0, 3.0, -1.0),
}
table(
    ["function", "largest relative error"],
    [[name, f"{gradcheck(*what):.1e}"] for name, what in checked.items()],
)

# %% [markdown]
# A check that has never failed proves nothing. So we plant faults: four SiLUs with the right forward and a wrong
# backward.


# %%
def silu_with(backward):
    """SiLU as the library records it, with another backward."""
    return lambda x: record(
        "silu", silu_forward(x.data), (x,), lambda dy: (backward(dy, x.data),)
    )


faults = {
    "none": silu_backward,
    "wrong sign": lambda dy, x: -silu_backward(dy, x),
    "half of the product rule": lambda dy, x: dy * sigmoid(x),
    "dy forgotten": lambda dy, x: silu_backward(np.ones_like(dy), x),
    "off by one in a thousand": lambda dy, x: 1.001 * silu_backward(dy, x),
}
rows = []
for fault, backward in faults.items():
    try:
        told = f"passes, error {gradcheck(silu_with(backward), np.linspace(-2, 2, 20)):.0e}"
    except AssertionError as e:
        told = str(e)
    rows.append([fault, told])
table(["fault planted", "gradcheck says"], rows)

# %% [markdown]
# Why a *random* $dy$? The obvious choice, all ones, asks only for the gradient of the sum of the outputs. Some
# functions have a sum that never moves: softmax, which we shall meet in notebook 4, turns numbers into shares that
# add up to 1.

# %%
x = Tensor(rng.standard_normal((1, 6)), requires_grad=True)
for dy in (np.ones((1, 6)), rng.standard_normal((1, 6))):
    x.grad = None
    ops.softmax(x).backward(dy)
    print("dx =", np.array2string(x.grad, precision=4, suppress_small=True))

# %% [markdown]
# With ones every gradient is zero, up to rounding, and a broken backward that always returns zeros would pass. With a
# random $dy$ it would not.
#
# ## Broadcasting, backwards
#
# NumPy lets us add a bias of shape (2,) to an array of shape (3, 2): it repeats the bias for each row. So the bias is
# used three times, and by the rule for values used more than once, its gradient is the sum of the three rows of $dy$.
# **Repeating forward means summing backward.**

# %%
x, bias = Tensor(np.arange(6.0).reshape(3, 2), True), Tensor(np.array([10.0, 20.0]), True)
dy = np.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
(x + bias).backward(dy)
figure(
    matrices(
        [Matrix("dy (3, 2)", dy), "→", Matrix("dx = dy", x.grad), "and"]
        + [Matrix("dbias: the sum\nof dy's rows", bias.grad)],
        "The gradient of a sum with broadcasting: dx is dy, and dbias is the sum of dy "
        "over its rows.",
    ),
    "The backward of x + bias: x was used once, number by number; each number of the bias "
    "was used in three rows.",
)

# %%
source(unbroadcast)

# %% [markdown]
# It looks for the axes that broadcasting has added in front or stretched from length 1, and sums over them. Give it a
# `dy` of ones, of shape (4, 3, 2), and it counts how often each number of an operand was used:

# %%
rows = []
for shape in [(4, 3, 2), (3, 2), (2,), (3, 1), (1, 1, 2), ()]:
    summed = unbroadcast(np.ones((4, 3, 2)), shape)
    rows.append([shape, summed.shape, f"{summed.flat[0]:g}"])
table(
    ["shape of the operand", "shape of its gradient", "how often each number was used"],
    rows,
)

# %% [markdown]
# The reverse holds as well: the backward of a *sum* repeats. Each number that went into the sum gets the same gradient.
#
# ## What it costs, and how it is freed
#
# To go back, SiLU needs the $x$ it was given, and a product needs both its factors. So the tape keeps all results in
# between alive, and for pictures these often take more memory than the parameters. Two things follow.
#
# First, `backward` frees the graph on its way: once a node has handed on its gradients, it drops its inputs and its
# function. Second, where no gradient is wanted, as when the finished network draws a picture, nothing should be
# recorded: `with no_grad():`. A weak reference tells whether a Tensor is still there without keeping it alive:


# %%
def chain(n):
    """silu of silu of ... n times: the last result, and weak references to all."""
    x, made = Tensor(rng.standard_normal(1000), requires_grad=True), []
    for _ in range(n):
        x = ops.silu(x)
        made.append(weakref.ref(x))
    return x, made


def alive(made):
    return sum(ref() is not None for ref in made)


y, made = chain(20)
recorded = alive(made)
y.backward(np.ones(1000))
freed = alive(made)
with no_grad():
    y, made = chain(20)
table(
    ["", "results still in memory, of 20"],
    [["recorded", recorded], ["after backward", freed], ["under no_grad", alive(made)]],
)

# %% [markdown]
# Of the last two, the one that is left is `y` itself, which we still hold. A second walk through a freed graph cannot
# work, and says so:

# %%
net = one_neuron()
net["y"].backward()
try:
    net["y"].backward()
except RuntimeError as e:
    print("RuntimeError:", e)

# %% [markdown]
# ## Train something
#
# Everything is here. The task: 64 noisy points on a curve; find a network whose curve follows them. It has two
# layers (matrix product, bias) with SiLU between them, and 97 parameters. The error, called the **loss**, is the
# mean squared distance, `ops.mse`. Training repeats four lines: compute the loss, go backward, move every
# parameter a small step *against* its gradient, forget the gradients.
#
# $$\theta \leftarrow \theta - \eta\,\frac{dL}{d\theta}$$
#
# Here $\theta$ stands for every parameter, $L$ for the loss, and $\eta$, the **learning rate**, says how long a step
# is.

# %%
x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]  # (64, 1): 64 points, one number each
target = np.sin(4 * x) + 0.1 * rng.standard_normal(x.shape, dtype=np.float32)

hidden = 32
w1 = 2 * rng.standard_normal((1, hidden), dtype=np.float32)
b1 = 2 * rng.uniform(-1, 1, hidden).astype(np.float32)
w2 = rng.standard_normal((hidden, 1), dtype=np.float32) / np.sqrt(np.float32(hidden))
b2 = np.zeros(1, np.float32)
parameters = [Tensor(p, requires_grad=True) for p in (w1, b1, w2, b2)]
print(f"{sum(p.size for p in parameters)} parameters")


def network(x):
    w1, b1, w2, b2 = parameters
    return ops.linear(ops.silu(ops.linear(x, w1, b1)), w2, b2)


# %%
log, curves = [], {}
for step in range(2001):
    prediction = network(x)
    loss = ops.mse(prediction, target)
    log.append(loss.item())
    if step in (0, 100, 2000):
        curves[f"step {step}"] = (x[:, 0], prediction.numpy()[:, 0])
    loss.backward()
    for p in parameters:
        p.data = p.data - 0.05 * p.grad
        p.grad = None  # or the next backward would add to it

print(f"loss: {log[0]:.3f} before, {log[100]:.3f} at step 100, {log[-1]:.4f} at the end")

# %%
losses = {"mean squared error": (range(len(log)), log)}
figure(
    plotting.line_plot(losses, "step", "loss", log="y"),
    "The loss falls, fast at first. The points carry noise of variance 0.01, so a loss of "
    "about 0.01 means that the curve beneath the noise has been found.",
)

# %%
chart = plotting.line_plot(curves, "x", "y")
chart.axes[0].plot(x[:, 0], target[:, 0], ".", color=plotting.GREY, ms=4, zorder=0)
figure(
    chart,
    "What the network computes before training, after 100 steps and at the end. Dots: the "
    "points it was given.",
)

# %% [markdown]
# Nothing in this loop knows what the network is. The U-Net of notebook 5 has many more parameters and other ops, and
# it is trained by the same walk.
#
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n02_autograd.py`.
#
# **2.1** Write the backward of the bell curve $y = e^{-x^2}$: from `dy` and `x`, both arrays of one shape, the
# gradient `dx`.

# %%
from exercises import n02_autograd as check


def bell_backward(dy, x):
    return ...


check.bell(bell_backward)

# %% [markdown]
# **2.2** Write the backward of $Y = A B^\top$, where $A$ is $(M, K)$, $B$ is $(N, K)$ and $Y$ is $(M, N)$: both
# gradients. (You will meet this product again in notebook 4.) Let the shapes guide you.


# %%
def product_backward(dy, a, b):
    da = ...
    db = ...
    return da, db


check.product(product_backward)

# %% [markdown]
# **2.3** Take $u = w^2$, $v = u\,w$, $y = v + u$ at $w = 3$. In which order must backward visit the four, and what is
# the gradient of $w$? Work it out by hand first; $u$ and $w$ are both used twice.

# %%
order = [...]  # names in quotes, beginning with "y"
gradient = ...
check.walk(order, gradient)

# %% [markdown]
# ## Where to go on
#
# The tape is `minidiff/tensor.py`, the check is `minidiff/gradcheck.py`, and `minidiff/ops/` holds the ops, forward
# and backward side by side. Next: [3. Convolution](03_convolution.ipynb), the op that the U-Net is made of.
