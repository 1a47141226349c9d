# %% [markdown]
# # 11. How fast is it
#
# The library computes every operation twice over: once as NumPy, in a form that can be read beside its equation, and once
# as a compiled kernel. The kernel is faster; but how fast is fast? "Five times as fast as NumPy" says nothing about how much
# is still to be had. A better question is: how long would the *machine* need, if nothing were wasted? That time can be
# computed before any clock runs, by counting. Then we measure, and see how much of the machine each kernel uses.
#
# **What you will learn**
#
# - how to count what an operation costs: its arithmetic and its bytes;
# - the two ceilings of a machine, and the *roofline* that they make;
# - what memory-bound and compute-bound mean, and why they ask for different cures;
# - how to time something honestly: check it first, warm it up, repeat it, take rivals in turns; and what happens otherwise;
# - how a convolution can be faster than its own roof;
# - why joining two operations into one saves time, and how much;
# - where the time of a whole training step goes, and how it compares with PyTorch, where we lose too.
#
# You need notebook 3 (convolution, and Winograd's idea), notebook 4 (GroupNorm and attention), notebook 5 (the
# U-Net) and notebook 6 (AdamW).
#
# All times are those of the computer on which the notebook ran, except in *The rivals*, whose tables name theirs.
# Yours will be others. The text therefore names none; the tables and pictures do.

# %%
from course import ROOT, begin, figure, source, table

begin(11, "kernels")

# %%
import json
import re
import sys
import time

import numpy as np

sys.path.insert(
    0, str(ROOT / "benchmarks")
)  # this notebook measures with the project's benchmarks

import bench_adamw
import bench_attention
import bench_conv2d
import bench_groupnorm
import bench_linear
import common
from common import in_turns, median, relative_errors, summary, timed

from drawing_11 import (
    Neighbour,
    copies,
    machine,
    rivals,
    roofline,
    seconds_by_kind,
    timings,
    two_orders,
)
from minidiff import kernels, ops, plotting
from minidiff.backend import MODULES

rng = np.random.default_rng(0)
compiled = "cpu" in MODULES
fastest = "cpu" if compiled else "reference"
table(["this machine", ""], [[key, value] for key, value in common.device().items()])

# %% [markdown]
# ## The two ceilings
#
# A processor does two things: it calculates, and it moves numbers to where it can calculate with them.

# %%
figure(
    machine(),
    "Arrays lie in the main memory. A core (a processor has several) calculates only with what is "
    "in its registers. In between lie the caches, in two or three levels. The thicker the arrow, the "
    "faster the way.",
)

# %% [markdown]
# - A **register** is a place inside the core for a few numbers. There are only some dozens of them.
# - A **cache** is a small, fast memory that keeps a copy of what was used last. What is used again soon is still there.
#   What is too large, or was used too long ago, must come from the main memory again.
#
# The first ceiling is **arithmetic**. One addition or multiplication of two numbers is a *floating-point operation*, a
# **FLOP**. A billion of them in a second is one **GFLOP/s**. Modern cores have an instruction that multiplies and adds,
# $a \cdot b + c$, two operations at once. And they have **SIMD** (single instruction, multiple data): one instruction does the
# same to a whole vector of numbers, 4, 8 or 16 at a time.
#
# So the most that a machine can do is: multiply-adds on full vectors, without a pause, on all cores. The library measures
# just that, with numbers that never leave the registers:

# %%
loop = (ROOT / "csrc" / "cpu" / "table.cpp").read_text()
print(re.search(r"// Multiply-adds.*?\n}\n", loop, re.S).group())

# %% [markdown]
# `vf` is a vector of `VL` numbers, `all(x)` one with `x` in every place; `T` is the number of threads, and
# `UNROLL` writes a loop out in full. A multiply-add takes a few ticks of the core's clock until its result is
# there, but the next can begin right behind it. One chain of them, each waiting for the one before, would leave
# the core idle most of the time; twelve chains keep it busy. (The last lines keep the compiler from leaving out a
# sum that nobody reads.)

# %%
source(common.multiply_add_ceiling)

# %% [markdown]
# The kernels are compiled once for each *instruction set*, the instructions that a kind of processor knows, from
# the same source: `avx512` and `avx2` are those of newer PC processors; `portable` takes only what every one of
# them has, and there the multiply-add is two instructions. So we can see what wide vectors, and the multiply-add,
# are worth:

# %%
best = {}
if compiled:
    from minidiff import _cpu

    chains = int(re.search(r"CHAINS = (\d+)", loop).group(1))
    rows = []
    for kind in [kind for kind in MODULES if kind.startswith("cpu")]:
        with kernels(kind):
            lanes = _cpu.peak(1) / (2 * common.THREADS * chains)
            best[kind] = max(common.multiply_add_ceiling() for _ in range(3))
        rows.append([MODULES[kind].instruction_set, f"{lanes:.0f}", f"{best[kind] / 1e9:.0f}"])
    table(["instruction set", "numbers in a vector", "GFLOP/s"], rows)
else:
    print("Without the compiled kernels there is no such loop to run.")

# %% [markdown]
# The second ceiling is **memory**: how many bytes a second get from the main memory and back, the **bandwidth**. It is
# measured by copying an array far larger than the caches, in every thread, and counting what is read and what is written:

# %%
source(common.copy_ceiling)

# %% [markdown]
# Why "far larger than the caches"? Because a copy of a small array never goes to the main memory. Here is one core copying
# arrays of growing size:

# %%
sizes = [2**k for k in range(15, 28)]
rates = []
for size in sizes:
    x = np.ones(size // 4, np.float32)
    y = np.ones_like(x)
    repeats = max(1, 2**26 // size)
    rates.append(
        2 * size / min(timed(lambda x=x, y=y: np.copyto(y, x), repeats) for _ in range(5)) / 1e9
    )
figure(
    copies(sizes, rates),
    "The same copy, of more and more bytes. Where it steps down, the two arrays no longer fit into a cache; far right "
    "is the main memory. (It may rise again for the largest: the system can copy large arrays in another way. Far left the call itself, some tenths of a microsecond, weighs on the short copies.)",
)  # fmt: skip

# %% [markdown]
# Now both ceilings. As they are ceilings, we take the best of a few tries.


# %%
def product_ceiling(n=1024):
    """Operations a second of NumPy's product of matrices: where there is no loop to run, it must do as the ceiling."""
    a = np.ones((n, n), np.float32)
    return 2 * n**3 / timed(lambda: a @ a, 3)


def arithmetic_ceiling():
    return common.multiply_add_ceiling() if compiled else product_ceiling()


P = max(arithmetic_ceiling() for _ in range(5))  # operations a second
P = max(P, best.get(fastest, 0))
B = max(common.copy_ceiling() for _ in range(5))  # bytes a second
if not compiled:
    print(
        "The arithmetic ceiling is that of NumPy's product of matrices; the true one is higher."
    )
table(
    ["ceiling", "", "in the time of one number (4 bytes) from memory"],
    [
        ["arithmetic P", f"{P / 1e9:.0f} GFLOP/s", f"{4 * P / B:.0f} operations"],
        ["memory B", f"{B / 1e9:.1f} GB/s", "1 number"],
    ],
)

# %% [markdown]
# The last column is the heart of the matter. In the time in which one number comes from memory, the cores could do that many
# operations. Whoever does fewer with each number waits for memory, however clever the arithmetic.
#
# ## Count before you measure
#
# Let an operation need $F$ floating-point operations and move $Q$ bytes. Calculating takes at least $F / P$ seconds and moving
# at least $Q / B$. The machine does both at the same time, so the longer of the two is the **floor** under its time:
#
# $$T \ \ge\ \max\!\left(\frac{F}{P},\ \frac{Q}{B}\right)$$
#
# - $T$ is the time that the operation takes, $P$ the arithmetic ceiling in operations a second, $B$ the memory
#   ceiling in bytes a second;
# - for $Q$ we count the least that can be: every input read once, every result written once.
#
# Divide $F$ by the floor, and you have the highest *speed* that the operation can reach. With its **operational intensity**
# $I = F / Q$, the operations that are done for each byte, that is ([Williams, Waterman and Patterson
# 2009](https://doi.org/10.1145/1498765.1498785)):
#
# $$\text{speed} \ \le\ \min(P,\ I \cdot B)$$
#
# Drawn against $I$ this looks like a roof: it rises while memory is the limit, and is flat where arithmetic is. Under the
# slope an operation is **memory-bound**: only fewer bytes make it faster. Under the flat part it is
# **compute-bound**: only better or less arithmetic does. The two meet at $I = P / B$. (So it is for kernels that
# are near the roof. Under the slope, too, arithmetic can be what holds a kernel up, if it is slower than $P$: $P$
# is the speed of multiply-adds, and exponentials run far below it.)
#
# By hand, for GroupNorm + SiLU on $n$ numbers: it reads $n$ and writes $n$ numbers of 4 bytes, so $Q = 8n$. For each number it
# takes off a mean, squares, adds up, scales, shifts, and computes an exponential and a quotient for the SiLU. Counting the
# exponential as six, that is about 12 operations. So $I = 12 / 8 = 1.5$ operations a byte.
#
# A 3 × 3 convolution from 64 to 64 channels does $2 \cdot 9 \cdot 64 = 1152$ operations for each number that it writes, and
# moves about 8 bytes for it: about a hundred times the intensity.
#
# The benchmarks count in this way, and we take their functions. First the convolution, then GroupNorm, AdamW, linear layers
# and attention:

# %%
source(bench_conv2d.work, bench_groupnorm.work, bench_adamw.work)
source(bench_linear.work, bench_attention.work)

# %% [markdown]
# `what` is the pass: forward alone, or forward and backward together. In the shapes, `B` is the number of images
# (not the bandwidth), `H` and `W` are the picture's height and width, `C` and `N` the channels in and out, `k` is
# the kernel's side and `s` the stride; a linear layer takes `M` rows of `K` numbers to `N`; attention has `h`
# heads of `d` channels, `L` queries and `M` keys. (A `gate` is that of GEGLU, an activation: half of a layer's
# outputs, through a nonlinearity, multiply the other half.) We look at the forward pass of five operations (the
# optimizer has only its `step`), the convolution in three shapes. A shape such as "32x 32x32, 64 -> 64" is a
# batch of 32 images of 32 × 32 positions, from 64 to 64 channels. "8192, 128 -> 128" are 8192 rows, from 128 to
# 128 numbers. "32x 256 to 16, 4 x 32" is attention from 256 positions to 16 words, in 4 heads of 32 channels.

# %%
chosen = {
    "AdamW, 10 million parameters": (bench_adamw, "conditional 10 M", "step"),
    "GroupNorm + SiLU": (bench_groupnorm, "32x 32x32, 64", "forward"),
    "attention to 16 words": (bench_attention, "32x 256 to 16, 4 x 32", "forward"),
    "convolution from 3 channels": (bench_conv2d, "32x 32x32, 3 -> 64", "forward"),
    "linear layer": (bench_linear, "8192, 128 -> 128", "forward"),
    "convolution, stride 2": (bench_conv2d, "32x 32x32, 64 -> 64, stride 2", "forward"),
    "convolution": (bench_conv2d, "32x 32x32, 64 -> 64", "forward"),
}
work = {
    name: bench.work(bench.CASES[case], what) for name, (bench, case, what) in chosen.items()
}
intensity = {name: operations / moved for name, (operations, moved) in work.items()}


def floor(name, P=P, B=B):
    """The least seconds that the operation can take."""
    operations, moved = work[name]
    return max(operations / P, moved / B)


table(
    ["operation", "shape", "million operations", "MB", "operations a byte", "floor (ms)", "bound by"],
    [
        [name, chosen[name][1], f"{operations / 1e6:,.0f}", f"{moved / 1e6:.1f}", f"{operations / moved:.1f}",
         f"{1e3 * floor(name):.3f}", "arithmetic" if operations / P > moved / B else "memory"]
        for name, (operations, moved) in work.items()
    ],
)  # fmt: skip

# %%
figure(
    roofline(P, B, intensity, {"the floor": {n: work[n][0] / floor(n) for n in work}}),
    "The roof of this machine, and our operations where they would stand if they took no longer than their floor. Both "
    "axes are logarithmic. The dashed line is where the two ceilings meet.",
)  # fmt: skip

# %% [markdown]
# Nothing has been run so far but the ceilings. We know already what to expect: the optimizer and the norm are far to the left,
# where the fastest arithmetic in the world is of no use. What helps there is to move less.
#
# ## How a number is made honest
#
# Now we measure; and before that, how *not* to.
#
# ### Check it first
#
# A wrong kernel can be very fast. Here is an attention that leaves out every second key:

# %%
REST = 0.3  # seconds; why we wait before we time something will be seen below
q, k, v = rng.standard_normal((3, 8, 512, 64))  # (B, L, D), float64
with kernels("reference"):
    exact = ops.attention(q, k, v, heads=2).data
single = [a.astype(np.float32) for a in (q, k, v)]
halved = [single[0], *(np.ascontiguousarray(a[:, ::2]) for a in single[1:])]
attentions = {
    "attention": lambda: ops.attention(*single, heads=2).data,
    "every second key left out": lambda: ops.attention(*halved, heads=2).data,
}
time.sleep(REST)
for call in attentions.values():
    call()
took = in_turns({name: lambda call=call: timed(call) for name, call in attentions.items()}, 9)
table(
    ["", "median (ms)", "error against float64"],
    [[name, f"{1e3 * took[name]['median']:.2f}", f"{relative_errors([call()], [exact]):.1e}"]
     for name, call in attentions.items()],
)  # fmt: skip

# %% [markdown]
# It raises nothing, it returns the right shape, and it is fast. Only the comparison shows that it computes something else. So
# the rule is: **no time without a check in the same run.** We compare with the reference in double precision, *float64*, whose
# rounding errors are hundreds of millions of times smaller than those of the single precision that we time. The
# error is the root of the mean square of the differences over that of the exact result:

# %%
source(relative_errors)

# %% [markdown]
# Single precision has about 7 decimal digits, so a right result is off by some $10^{-7}$, or a little more where many numbers
# were added up. The benchmarks refuse to state a time if it is off by more than this:

# %%
print(f"WORST_ERROR = {common.WORST_ERROR:g}\n")


def results(name, kind, dtype):
    """The arrays that one pass of a case returns, computed anew with this kind of kernels in this precision."""
    bench, case, what = chosen[name]
    case = bench.CASES[case]
    given = [a.astype(dtype) for a in bench.arrays(case, np.random.default_rng(0))]
    with kernels(kind):
        return list(bench.ours(case, given)[what]())


rows = []
for name in chosen:
    exact = results(name, "reference", np.float64)
    errors = [
        relative_errors(results(name, kind, np.float32), exact)
        for kind in (fastest, "reference")
    ]
    assert max(errors) < common.WORST_ERROR, name
    rows.append([name, *(f"{error:.1e}" for error in errors)])
table(["operation", f"error, kernels “{fastest}”", "error, NumPy in single precision"], rows)

# %% [markdown]
# ### Why a single timing lies
#
# Time the same call a few hundred times, and look at each timing. It is GroupNorm + SiLU, on a new array:

# %%
from minidiff.threads import release_memory

shape = bench_groupnorm.CASES["32x 32x32, 64"]
features = rng.standard_normal(shape, dtype=np.float32)
ones, zeros = np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)


def norm_silu():
    return ops.group_norm(features, ones, zeros, 32, silu=True).data


time.sleep(REST)
release_memory()  # what the library had kept for later results goes back to the system
singles = np.array([timed(norm_silu) for _ in range(300)])
figure(
    timings(1e3 * singles),
    "One call, timed 300 times in a row. A point far above its neighbours is a call that something else held up. Where a "
    "whole stretch lies higher or lower, the machine itself was slower or faster for a while.",
)
later = singles[1:]
table(
    ["of 300 timings", "ms"],
    [["the first", f"{1e3 * singles[0]:.2f}"], ["the shortest", f"{1e3 * later.min():.2f}"],
     ["the median", f"{1e3 * median(later):.2f}"], ["the longest after the first", f"{1e3 * later.max():.2f}"]],
)  # fmt: skip

# %% [markdown]
# - The **first** call has more to do than the others: it asks the system for the memory of its result, and may
#   have to wake up sleeping threads. None of that is the operation. (On a busy machine it can drown in the noise
#   of the others.) So each call is **warmed up**: made once or twice before the clock counts.
# - The others scatter. Sort them: the one in the middle is the **median**; half of all lie between the **quartiles**, at a
#   quarter and at three quarters of the row. The median is not moved by a few calls that were held up, as the mean is, and it
#   is not the luckiest moment, as the minimum is. The quartiles say how far to trust it.
# - A call that takes microseconds is timed in bundles: the clock itself, and Python around it, take some too.
#
# How much can a single timing deceive? Compare the function *with itself*: draw two of the timings above at random, divide one
# by the other, and call it a speed-up. The truth is 1. Then the same with the medians of nine timings each:

# %%
drawn = rng.choice(later, (20_000, 2, 9))
speed_ups = {
    "one timing each": drawn[:, 0, 0] / drawn[:, 1, 0],
    "the median of nine each": np.divide(*np.median(drawn, axis=2).T),
}
table(
    ["how it was timed", "one in twenty says less than", "one in twenty says more than"],
    [[name, *(f"{v:.2f}" for v in np.percentile(found, [5, 95]))] for name, found in speed_ups.items()],
)  # fmt: skip

# %% [markdown]
# All of these "speed-ups" are nothing at all: the function against itself. One that is claimed and lies within
# such limits cannot be told from nothing.
#
# ### Take rivals in turns
#
# The median helps against single calls that were held up. It does not help if the machine itself becomes slower for a while:
# because it grows hot and lowers its clock, or because somebody else starts to work on it. Let us arrange that. We compare a
# function A with a function B, which are the *same* convolution, and a little after half of the calls a neighbour begins to
# copy arrays, in twice as many threads as there are cores. Once we take all timings of A and then all of B; once A and B in turns.

# %%
x = rng.standard_normal((16, 32, 32, 64), dtype=np.float32)
w = rng.standard_normal((3, 3, 64, 64), dtype=np.float32) / 24


def convolve():
    return ops.conv2d(x, w, padding=1).data


def taken(order, begins):
    """Seconds of one call for each letter; from call number `begins` on a neighbour computes too."""
    seconds = []
    with Neighbour(2 * common.THREADS) as neighbour:
        for i, _ in enumerate(order):
            if i == begins:
                neighbour.begin()
            seconds.append(timed(convolve))
    return seconds


convolve()
turns = 60 if compiled else 20
begins = turns + turns // 6
orders = {
    "all of A, then all of B": "A" * turns + "B" * turns,
    "A and B in turns": "AB" * turns,
}
measured = {title: (order, taken(order, begins)) for title, order in orders.items()}
figure(
    two_orders(measured, begins),
    "A and B are the same function. Shaded: the neighbour is at work. On the left it meets B alone; on the right it meets "
    "both alike.",
)  # fmt: skip
rows = []
for title, (order, seconds) in measured.items():
    a, b = (
        np.median([s for s, o in zip(seconds, order, strict=True) if o == name])
        for name in "AB"
    )
    rows.append([title, f"{1e3 * a:.2f}", f"{1e3 * b:.2f}", f"{b / a:.2f}"])
table(["order", "median of A (ms)", "median of B (ms)", "B / A, in truth 1"], rows)  # fmt: skip

# %% [markdown]
# Whatever happens to the machine, in turns it happens to both. What is then left of a difference is the noise of the two
# medians; the quartiles and more turns tell how much that is. So all comparisons of this project are made like this, and so
# is everything below:

# %%
source(in_turns, summary)

# %% [markdown]
# (NumPy's side, called `reference`, gets fewer turns there, as it is slow.)
#
# ## Every operation on the roof
#
# Now to the measurement: each operation with the compiled kernels and with NumPy, and the two ceilings along with them in every
# round, so that a slow moment of the machine lowers the roof as it lowers what stands under it. A short call is repeated until
# some hundredths of a second are full.
#
# One trap is left. NumPy hands products of matrices to a library, BLAS, whose threads go on waiting busily for a while when
# their work is done, in case there is more: they **spin**, and hold a core that whoever is timed next would need. Here is the
# loop of multiply-adds again, so and so long after such a product:

# %%
if compiled:
    square = np.ones((1024, 1024), np.float32)
    rows = []
    for pause in (0.0, 0.05, 0.1, 0.2, REST):
        found = []
        for _ in range(3):
            square @ square
            time.sleep(pause)
            found.append(common.multiply_add_ceiling() / 1e9)
        rows.append([f"{pause:g} s", f"{median(found):.0f}"])
    table(["after a product by NumPy and a pause of", "multiply-adds (GFLOP/s)"], rows)

# %% [markdown]
# So NumPy comes last in every round, and after it there is a pause, before the ceilings and the kernels have their turn. (The
# benchmarks give each side a process of its own.) You may have noticed pauses in the cells above, after the checks: these use
# NumPy, too.


# %%
def prepared(name):
    """The case's pass, on arrays of its own."""
    bench, case, what = chosen[name]
    case = bench.CASES[case]
    arrays = [a.astype(np.float32) for a in bench.arrays(case, np.random.default_rng(0))]
    return bench.ours(case, arrays)[what]


def sampler(call, kind):
    """A function that gives seconds a call: warmed up, and repeated if the call is short."""

    def several(n):
        with kernels(kind):
            call()
            return timed(call, n)

    repeats = max(1, int(common.SECONDS_A_SAMPLE / several(1)))
    return lambda: several(repeats)


def after_rest():
    time.sleep(REST)
    return 1 / arithmetic_ceiling()  # seconds an operation


ask = {"arithmetic": after_rest, "memory": lambda: 1 / common.copy_ceiling()}
passes = {name: prepared(name) for name in chosen}
for kind in dict.fromkeys([fastest, "reference"]):
    for name, call in passes.items():
        ask[name, kind] = sampler(call, kind)
seconds = in_turns(ask, 5)
P_now, B_now = (1 / seconds[ceiling]["median"] for ceiling in ("arithmetic", "memory"))
rows = []
for ceiling, unit in (("arithmetic", "GFLOP/s"), ("memory", "GB/s")):
    middle, low, high = (1e-9 / seconds[ceiling][s] for s in ("median", "high", "low"))
    rows.append([ceiling, unit, f"{middle:.1f}", f"{low:.1f}-{high:.1f}"])
table(["ceiling meanwhile", "", "median", "quartiles"], rows)

# %%
rows = []
for name in chosen:
    least, took = floor(name, P_now, B_now), seconds[name, fastest]
    numpy_took = seconds[name, "reference"]["median"]
    rows.append([name, f"{1e3 * least:.3f}", common.spread(took), f"{work[name][0] / took['median'] / 1e9:.0f}",
                 f"{least / took['median']:.2f}", f"{1e3 * numpy_took:.1f}", f"{numpy_took / took['median']:.1f}"])  # fmt: skip
header = ["operation", "floor (ms)", f"{'compiled' if compiled else 'NumPy'} (ms): median (quartiles)",
          "GFLOP/s", "floor / time", "NumPy (ms)", "NumPy / compiled"]  # fmt: skip
columns = len(header) if compiled else len(header) - 2
table(header[:columns], [row[:columns] for row in rows])

# %%
series = {"compiled kernel": fastest, "NumPy reference": "reference"}
figure(
    roofline(
        P_now,
        B_now,
        intensity,
        {
            label: {name: work[name][0] / seconds[name, kind]["median"] for name in chosen}
            for label, kind in series.items()
            if compiled or label == "NumPy reference"
        },
    ),
    "The same roof, and what was measured under it. Each grey line is the way from the NumPy reference to the compiled kernel. "
    "Operations are counted by the plain algorithm in both, so they stand above each other.",
)  # fmt: skip

# %% [markdown]
# How to read it. The **share of the floor**, floor over time, is how much of the machine a kernel uses: 1 would
# be all of it. (Only what was counted counts: for attention and linear layers that is the products alone, without
# the softmax.) What is far under the roof can be improved; what is at the roof cannot, unless one changes what is
# counted.
#
# Some points may stand *above* the roof. There are two good reasons for it:
#
# - On the slope: the arrays fit into a cache. Then they come from there and not from the main memory, whose speed the slope is.
# - On the flat part: the kernel does less arithmetic than was counted. That is the next section.
#
# (And a point that lies above it by no more than the ceilings scatter, see their quartiles, is just noise.)
#
# And the way from NumPy to the kernel has three parts, of different length for each operation. NumPy makes a pass over memory
# for each `+` and `*`, which costs bytes (we shall count them below). It uses one core for everything but products of matrices.
# And it builds arrays that are not needed, such as the columns of im2col, nine times as large as the image. Where
# most of an operation is a product of matrices, as in a linear layer, or in a convolution once im2col has written
# its columns, BLAS does it for NumPy, and the way is short; it can even lead backwards. (The convolution with 64
# channels has a long way all the same: its kernel does less arithmetic, see the next section.)
#
# ## Above the roof: fewer multiplications
#
# The convolution was counted as the formula of notebook 3 says: one multiplication and one addition for each weight. But the
# compiled kernel uses Winograd's algorithm, of which that notebook showed the idea: F(m×m, 3×3) computes a tile of
# $m \times m$ outputs by $(m+2)^2$ multiplications instead of $9m^2$. The kernel can be asked for a certain algorithm, so we
# set them beside each other, again in turns with the ceiling. One column counts the operations of the direct algorithm,
# the other those that are really done in the products.

# %%
if compiled:
    x = rng.standard_normal((32, 32, 32, 64), dtype=np.float32)
    y, sides = np.empty_like(x), ((1, 1), (1, 1))
    with kernels("reference"):
        exact = ops.conv2d(x.astype(np.float64), w.astype(np.float64), padding=1).data

    def by(algorithm):
        _cpu.conv2d_forward(
            y, x, None, w, None, None, None, 1, sides, 1, False, None, algorithm
        )

    tiles = {"direct": 0, "Winograd F(2×2, 3×3)": 2, "Winograd F(4×4, 3×3)": 4}
    error = {}
    for name, m in tiles.items():
        by(m)
        error[name] = relative_errors([y], [exact])
        assert error[name] < common.WORST_ERROR
    time.sleep(REST)
    asked = {"ceiling": lambda: 1 / arithmetic_ceiling()}
    asked |= {name: lambda m=m: timed(lambda: by(m), 3) for name, m in tiles.items()}
    took = in_turns(asked, 9)
    counted = 2 * y.size * 9 * x.shape[-1]
    rows, share = [], {"counted": [], "done": []}
    for name, m in tiles.items():
        rate = counted / took[name]["median"] * took["ceiling"]["median"]  # of the ceiling
        done = (m + 2) ** 2 / (9 * m**2) if m else 1.0
        share["counted"].append(rate)
        share["done"].append(rate * done)
        rows.append([name, f"{1 / done:.2f}", common.spread(took[name]), f"{rate:.2f}", f"{rate * done:.2f}", f"{error[name]:.1e}"])  # fmt: skip
    table(
        ["algorithm", "times fewer multiplications", "ms", "counted / ceiling", "done / ceiling", "error"],
        rows,
    )  # fmt: skip
    figure(
        plotting.bars(
            list(tiles),
            {"operations of the direct algorithm": share["counted"], "operations that are done": share["done"]},
            "share of the arithmetic ceiling",
            ("the ceiling", 1.0),
        ),
        "One convolution, three algorithms. Counted as the direct algorithm, Winograd's goes beyond the ceiling; counted by "
        "what it really multiplies, it stays beneath.",
    )  # fmt: skip
else:
    print(
        "Without the compiled kernels there is nothing to compare here: the reference knows the direct algorithm alone."
    )

# %% [markdown]
# So the roof is no law of nature for a *task*, but for an *algorithm*. A ceiling that is reached is a reason to look for
# another way to the same result. The price is in the last two columns. The sums before and after the products (the transforms)
# take time too, so the saving in time is less than in multiplications. And the larger tiles of F(4×4) add and
# subtract numbers of very different size, which costs a little of the precision. (F(2×2) can even be more exact
# than the direct sum, because far fewer products are added up one after the other. F is here a part of the name,
# not a number of operations.)
#
# ## Fewer bytes: fusing
#
# For what is memory-bound there is no such trick with arithmetic; it must move less. How much does NumPy move? Let it tell us: a
# kind of array that looks on at every NumPy operation and adds up the bytes of its inputs and results.


# %%
class Watched(np.ndarray):
    """An array that counts the bytes that every NumPy operation on it reads and writes."""

    moved = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **settings):
        inputs = [np.asarray(a) for a in inputs]
        if out:
            settings["out"] = tuple(np.asarray(a) for a in out)
        result = np.asarray(getattr(ufunc, method)(*inputs, **settings))
        Watched.moved += sum(a.nbytes for a in inputs) + result.nbytes
        return result.view(Watched)


from minidiff.ops.groupnorm import group_norm_forward

batch, places = shape[0], shape[1] * shape[2]
flat = features.reshape(batch, places, -1)  # (B, N, C)
rows = []
for what, silu in {"GroupNorm": False, "GroupNorm, then SiLU": True}.items():
    Watched.moved = 0
    group_norm_forward.reference(flat.view(Watched), ones[None], zeros[None], 32, 1e-5, silu)
    a_number = Watched.moved / flat.size
    at_ceiling = f"{1e3 * Watched.moved / B_now:.1f}"
    rows.append([what, f"{a_number:.1f}", 8, f"{a_number / 8:.1f}", at_ceiling])
table(
    ["", "bytes a number that NumPy moves", "the least", "times", "at the memory ceiling (ms)"],
    rows,
)
took = seconds["GroupNorm + SiLU", "reference"]["median"]
print(f"NumPy took {1e3 * took:.1f} ms for both, a few cells above.")

# %% [markdown]
# Each `-`, `*`, `/` and `exp` is a **pass**: it reads whole arrays and writes a whole array, which the next pass reads again.
# (Some of it is caught by the caches, so that NumPy can be faster than the last column; and it works on one core, so that it
# can be slower.) A kernel that does all of it at once reads $x$, and writes $y$. That is called **fusing**: the
# results in between stay in registers or in a cache.
#
# The compiled kernels offer both, so we can predict and measure what fusing alone is worth. GroupNorm and then SiLU, each a
# compiled kernel: the norm reads $x$ and writes $z$, the SiLU reads $z$ and writes $y$, that is 16 bytes a number. Both in one: 8
# bytes. If memory is all that counts, the fused one takes half the time. While the arrays fit into a cache, the bytes
# come cheaper and the saving may be another.

# %%
megabytes, ratios, rows = [], [], []
for batch in (1, 4, 16, 64, 160):
    images = rng.standard_normal((batch, *shape[1:]), dtype=np.float32)
    ways = {
        "norm": lambda x=images: ops.group_norm(x, ones, zeros, 32).data,
        "one": lambda x=images: ops.group_norm(x, ones, zeros, 32, silu=True).data,
        "two": lambda x=images: ops.silu(ops.group_norm(x, ones, zeros, 32)).data,
    }
    assert relative_errors([ways["one"]()], [ways["two"]()]) < common.WORST_ERROR
    took = in_turns({name: sampler(call, fastest) for name, call in ways.items()}, 7)
    megabytes.append(images.nbytes / 1e6)
    ratios.append(took["two"]["median"] / took["one"]["median"])
    times = [common.spread(took[way]) for way in ("two", "one", "norm")]
    rows.append([f"{megabytes[-1]:.2f}", *times, f"{ratios[-1]:.2f}"])
table(
    ["x (MB)", "norm, then SiLU (ms)", "both in one (ms)", "norm alone (ms)", "two / one"], rows
)

# %%
chart = plotting.line_plot(
    {"measured": (megabytes, ratios), "predicted": (megabytes, [2.0] * len(megabytes))},
    "size of the array (MB, logarithmic)",
    "two passes / one, time",
    log="x",
)
(axes,) = chart.axes
axes.lines[0].set_marker("o")
axes.set_ylim(0, 1.1 * max(2.2, *ratios))
axes.set_xticks(megabytes, [f"{mb:.3g}" for mb in megabytes])
axes.minorticks_off()
figure(
    chart,
    "How many times as long the two passes take, measured, and predicted by counting bytes alone."
    + ("" if compiled else " NumPy fuses nothing, so here the two are the same."),
)

# %% [markdown]
# Where the measured line stays far below 2, memory is not all that holds these kernels up, although they stand
# under the slope. If bytes were all, the norm alone would take as long as both in one, for it moves the same:
# what lies between these two columns is the arithmetic of the SiLU, most of all its exponentials. It is the same
# in one pass and in two, and draws the ratio towards 1; so does a cache that holds the arrays, because the second
# pass then reads at the cache's speed. Where the measured line lies above the prediction, the second pass costs
# more than its bytes, such as fresh memory for its result. The prediction from bytes is good where bytes are the
# limit, and only there; that is why we measure after we have counted.
#
# The library fuses wherever two operations always meet: SiLU into GroupNorm, bias, timestep and residual into the convolution
# before them, activations into linear layers, the moving average of the weights into AdamW, guidance into the reverse step.
#
# ## A whole training step
#
# A network is more than its operations: there is Python around them, the tape, sums of gradients. Here is one training step
# (forward, backward, AdamW) of the U-Net with 10 million parameters, on 2 images. First, are its gradients right? All of them,
# against float64, on one image.
#
# A check can be hollow, too. The last convolution of a fresh U-Net begins with weights of zero, and so does the last of every
# block: nearly all gradients of the first step are exactly 0, and 0 agrees with 0 however wrong a kernel is. So we move all
# weights a little at random, and see to it that no gradient is zero.

# %%
from bench_profile import KINDS, OTHER, kind_of

from minidiff.models import UNet
from minidiff.optim import AdamW

unet = UNet(bench_adamw.UNETS["conditional 10 M"], seed=0)
parameters = dict(unet.named_parameters())
for p in parameters.values():
    p.data = p.data + 0.02 * rng.standard_normal(p.shape, dtype=np.float32)
image, words = (2, 32, 32, 3), (2, 16, bench_adamw.UNETS["conditional 10 M"].text_width)
x_t, eps, tokens = (rng.standard_normal(s, dtype=np.float32) for s in (image, image, words))
t = np.array([300, 600])


def gradients_of(batch):
    """dL/dp of every parameter, for the first images."""
    dtype = next(iter(parameters.values())).data.dtype
    given, wanted, cond = (a[:batch].astype(dtype) for a in (x_t, eps, tokens))
    ops.mse(unet(given, t[:batch], (cond, None)), wanted).backward()
    found = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


got = gradients_of(1)
begun = {name: p.data for name, p in parameters.items()}
for p in parameters.values():
    p.data = p.data.astype(np.float64)
with kernels("reference"):
    exact = gradients_of(1)
for name, p in parameters.items():
    p.data = begun[name]
size = {name: np.sqrt(np.mean(g**2)) for name, g in exact.items()}
largest = max(size.values())
errors = [
    np.sqrt(np.mean((got[name] - g) ** 2)) / max(size[name], 1e-4 * largest)
    for name, g in exact.items()
]
assert max(errors) < common.WORST_ERROR and min(size.values()) > 0
print(
    f"{len(errors)} gradients: median error {np.median(errors):.0e}, largest {max(errors):.0e}"
)

# %% [markdown]
# (A gradient that is next to zero counts as at least $10^{-4}$ of the largest: its relative error would be noise
# over noise. These errors are larger than those of one operation, because the rounding of every layer, forward
# and backward, goes into them; they are still far below the limit.)
#
# Now the time. Every kernel is wrapped in a clock, and its seconds go to the kind of work that its name speaks of. What no kernel
# has taken is Python's, and small NumPy operations. The compiled kernels are
# taken three times, and the middle one is shown; NumPy, which is slow, once.

# %%
optimizer = AdamW(parameters)


def one_step():
    optimizer.step(1e-6, gradients_of(len(x_t)))


ways = {"compiled kernels": fastest, "NumPy reference": "reference"}
if not compiled:
    del ways["compiled kernels"]
for kind in ways.values():
    with kernels(kind):
        one_step()
taken_apart = {name: [] for name in ways}
for turn in range(3):
    for name, kind in ways.items():
        if turn == 0 or kind != "reference":
            time.sleep(REST)
            taken_apart[name].append(seconds_by_kind(kind, one_step, kind_of, OTHER))
middle = {
    name: sorted(runs, key=lambda run: sum(run.values()))[len(runs) // 2]
    for name, runs in taken_apart.items()
}
parts = {
    name: {kind: 1e3 * run[kind] for kind in [*KINDS, OTHER] if kind in run}
    for name, run in middle.items()
}
figure(
    plotting.stacked_shares(parts, "milliseconds"),
    "A training step on 2 images, by kind of work. (With more images the arithmetic grows; the optimizer's part does "
    "not, and most of Python's does not either.)",
)
rows = []
for kind in [*KINDS, OTHER]:
    of_kind = [(run.get(kind, 0.0), sum(run.values())) for run in middle.values()]
    rows.append([kind, *(f"{1e3 * s:.0f} ({100 * s / total:.0f}%)" for s, total in of_kind)])
rows.append(["all", *(f"{1e3 * sum(run.values()):.0f}" for run in middle.values())])
table(["kind of work", *(f"{name} (ms)" for name in middle)], rows)

# %% [markdown]
# This table says where work is worth doing. If a part takes the share $s$ of the time and becomes $k$ times as fast, the whole
# becomes
#
# $$\frac{1}{(1-s) + s/k}$$
#
# times as fast (Amdahl's law, 1967), and however large $k$ is, never more than $1/(1-s)$ times. So the most that can be won on
# each part, if it took no time at all:

# %%
run = middle[next(iter(middle))]
total = sum(run.values())
most = sorted(((total / (total - s), kind) for kind, s in run.items()), reverse=True)
table(["part", "at most so many times as fast"], [[kind, f"{gain:.2f}"] for gain, kind in most])

# %% [markdown]
# That is also why nothing may be forgotten. When the convolutions have become fast, what was small beside them is suddenly a
# large part.
#
# ## The rivals
#
# How good is it beside the best there is? [PyTorch](https://pytorch.org) calls on kernels that many people have worked on for
# years. It is not needed to run this notebook, so we do not measure here. We read what `make bench` measured, with all the rules
# from above: both sides in one run, results checked against float64 first, the same number of threads, in turns, the median.
# PyTorch is taken at its best: *eager* (each operation called as it comes) in both memory layouts for images
# (*contiguous*: one channel after the other, (B, C, H, W); *channels last*: (B, H, W, C), as ours), or *compiled*
# (`torch.compile`, which fuses operations by itself), whichever is faster for the shape.


# %%
def committed(name):
    """The committed results of a benchmark: those of this machine if there are, else of the first."""
    here, files = (
        common.results_path(name, "json"),
        sorted(common.RESULTS.glob(f"{name}-*.json")),
    )
    return json.loads((here if here in files else files[0]).read_text())


from summarise import OPS, line

benchmarks = {name: committed(name) for name in OPS}
table(
    ["results of", "measured on", "cores", "command", "ceilings: GFLOP/s", "GB/s"],
    [[OPS[name], r["device"]["cpu"], r["device"]["cores"], f"`{r['command']}`",
      f"{r['ceilings']['multiply-adds'] / 1e9:.0f}", f"{r['ceilings']['copy'] / 1e9:.1f}"]
     for name, r in benchmarks.items()],
)  # fmt: skip

# %%
devices = sorted({r["device"]["cpu"] for r in benchmarks.values()})
names = {"step": "forward"}  # the optimizer's one pass stands with the others' first
by_op = {
    OPS[name]: {
        names.get(what, what): [row[what]["ratio"] for row in r["cases"].values()]
        for what in next(iter(r["cases"].values()))
    }
    for name, r in benchmarks.items()
}
figure(
    rivals(by_op, "time of PyTorch at its best / time of minidiff (logarithmic)"),
    f"Every shape that was measured, on {', '.join(devices)}. To the right of the line minidiff is faster, on the shaded "
    "side it loses. (The optimizer's whole step stands as forward.)",
)  # fmt: skip

# %%
header = ["op", "pass", "shapes", "PyTorch / ours: median (worst-best)", "NumPy / ours", "floor / time", "lost to PyTorch"]  # fmt: skip
rows = [
    line(name, what, r["cases"]).strip("| ").split(" | ")
    for name, r in benchmarks.items()
    for what in next(iter(r["cases"].values()))
]
table(header, rows)

# %% [markdown]
# The last column names every shape in which minidiff loses, with PyTorch's time over ours; `NumPy / ours` and
# `floor / time` are medians. The roofline helps to read the rest. Where an operation is memory-bound and both
# sides fuse, neither can be far ahead: the bytes are the same, and so is the memory. Where it is compute-bound,
# an algorithm with less arithmetic makes a difference, and a shape to which it does not apply is where to look
# for losses. Take the extremes apart, the six worst and the three best. An outlier in one's own favour deserves
# as much suspicion as a loss: it is more likely that the rival stumbles over a shape than that we fly. Look at
# the quartiles, in brackets: where those of one side lie far apart, its median says little, and so does the
# ratio.

# %%
ordered = sorted(
    (row[what]["ratio"], OPS[name], case, what, row[what])
    for name, r in benchmarks.items()
    for case, row in r["cases"].items()
    for what in row
)
extremes = ordered[:6] + ordered[-3:]  # fmt: skip
table(
    ["op", "shape", "pass", "ours (ms)", "PyTorch (ms)", "its best way", "PyTorch / ours", "floor / time, ours"],
    [[op, case, what, common.spread(r["seconds"]["ours"]), common.spread(r["seconds"][r["best rival"]]), r["best rival"],
      f"{ratio:.2f}", f"{r['share']:.2f}"] for ratio, op, case, what, r in extremes],
)  # fmt: skip

# %% [markdown]
# And whole networks, from the same command: a conditional U-Net, the one of the DDPM paper, Stable Diffusion's, and the demo's in
# sampling. `forward` is one call of the network, `step` a whole training step (forward, backward, optimizer), on
# 32 images for the conditional U-Net, 16 for the DDPM paper's and one for Stable Diffusion's; `sampling` draws 64
# pictures in 50 steps of DDIM with guidance.

# %%
whole = committed("unet")
print(f"{whole['device']['cpu']}, {whole['device']['threads']} threads, `{whole['command']}`")
rows = []
for name, r in whole["networks"].items():
    for what, found in r.items():
        if isinstance(found, dict) and "ratio" in found:
            ours, best = found["seconds"]["ours"], found["best rival"]
            rows.append([name, what, common.spread(ours), common.spread(found["seconds"][best]), best, f"{found['ratio']:.2f}"])  # fmt: skip
table(["network", "pass", "ours (ms)", "PyTorch (ms)", "its best way", "PyTorch / ours"], rows)

# %%
profile = committed("profile")
two = {name.replace("\n", ", ", 1): parts for name, parts in profile["rows"].items()}
figure(
    plotting.stacked_shares(dict(list(two.items())[:4]), "milliseconds"),
    f"Where the two sides spend their time in a training step, measured one after the other on {profile['device']['cpu']}: "
    "it says what the time goes to; how long a step is, the table above says better.",
)  # fmt: skip

# %% [markdown]
# ## Exercises
#
# Replace each `...`, run the cell, and read what the checker says. Solutions are in `solutions/n11_how_fast.py`.
#
# **11.1** The roof. Given an operational intensity (operations a byte), the arithmetic ceiling `P` (operations a second) and
# the memory ceiling `B` (bytes a second): what is the highest speed, in operations a second?

# %%
from exercises import n11_how_fast as check


def attainable(intensity, P, B):
    return ...


check.attainable(attainable)

# %% [markdown]
# **11.2** Count bytes. `x` and `r` are arrays of `n` numbers in single precision, far larger than the caches. You want
# $y = \operatorname{silu}(x + r)$. How many bytes go to and from memory if it is done in two passes (`s = x + r`, then
# `y = silu(s)`), and how many if it is done in one?


# %%
def bytes_moved(n):
    in_two_passes = ...
    in_one_pass = ...
    return in_two_passes, in_one_pass


check.passes(bytes_moved)

# %% [markdown]
# **11.3** Measure honestly. `calls` is a dict {name: function}. Return {name: median seconds of a call}: warm each up once,
# then take `repeats` timings of each, in turns. `clock()` gives the time in seconds. It is not this computer's clock: the checker
# has a small world of its own in which things go wrong as they do on a real machine.


# %%
def measure(calls, repeats, clock):
    return ...


check.honest(measure)

# %% [markdown]
# ## Where to go on
#
# What measures is `benchmarks/common.py`, with one file an operation beside it; `make bench` runs all, and the results are in
# `benchmarks/results/`. What was tried in the kernels, what was expected and what it gave, is told in
# [docs/performance.md](../docs/performance.md). The kernels are in `csrc/cpu/`: `gemm.h` for products of matrices, `conv2d.cpp`
# for Winograd's algorithm, `groupnorm.cpp` for what is fused.
