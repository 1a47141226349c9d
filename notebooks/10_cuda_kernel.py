# %% [markdown]
# # 10. Writing a CUDA kernel
#
# A graphics processor (GPU) computes thousands of numbers at the same time. A function that runs on it is called a
# **kernel**, and CUDA, NVIDIA's language for it, is C++ with a few words more. This notebook writes the norm of
# notebook 4 as a kernel, first the obvious way, then better and better; a matrix product and attention follow.
#
# You need no GPU. The library's *emulator* compiles the same source for an ordinary processor. There it runs one
# thread after the other, watches every access to memory, counts what a GPU would have to move, and says where a
# program is wrong. What it cannot tell is how long a GPU takes.
#
# **What you will learn**
#
# - threads, warps, blocks and the grid, and how a thread finds its piece of the work;
# - what memory moves at a time, and why neighbouring threads should touch neighbouring numbers;
# - how threads work together, and how a forgotten barrier is found;
# - why a fused kernel, GroupNorm and SiLU in one, moves half as much as two;
# - how the library's kernels for GroupNorm, matrix products and attention were made fast, with their traffic counted.
#
# You need notebook 4 (GroupNorm, SiLU, attention and the online softmax).

# %%
from course import ROOT, begin, close, figure, source, table

begin(10, "emulator")

# %%
import numpy as np

from drawing_10 import banks, butterfly, by_length, fragments, gpu_results, hierarchy, tiles
from emulator_10 import aligned, counted, cu_source, emulator_here, refusal, unwritten, write
from minidiff import ops, plotting
from minidiff.backend import MODULES
from minidiff.ops.groupnorm import group_norm_forward

rng = np.random.default_rng(0)


def random_array(*shape):
    """Random numbers that start on a multiple of 256 bytes, as arrays on a GPU do."""
    return aligned(rng.standard_normal(shape, dtype=np.float32))


# %% [markdown]
# ## Threads, blocks and a first kernel
#
# A kernel is written for *one* **thread**, and many threads run it at the same time, each on a number of its own.
# Threads come in **blocks** of up to 1024, and all blocks of one call are its **grid**. The chip has many
# **multiprocessors**; each block runs on one of them, and blocks that find no room wait for their turn.

# %%
figure(
    hierarchy(),
    "What a call of a kernel is made of, and where its numbers lie. Every thread has its "
    "registers, every block its shared memory, both on the multiprocessor and fast; arrays "
    "are in global memory, far away, and the L2 cache keeps what was used last. Warps, banks "
    "and sectors are explained below.",
)

# %% [markdown]
# The simplest kernel: SiLU, $y_i = x_i / (1 + e^{-x_i})$, for $n$ numbers.

# %%
SILU = r"""
__global__ void silu(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float v = x[i];
    y[i] = v / (1 + expf(-v));
  }
}
"""

# %% [markdown]
# Read it word by word:
#
# - `__global__` marks a kernel. It returns nothing (`void`); it writes its result into an array that is there
#   already.
# - `const float* x` is the address of an array's first number, `x[i]` the number $i$ places further. A `float` has 4
#   bytes. `const`: this kernel does not write there.
# - `int` is a whole number of 4 bytes. Behind `//` stands a comment.
# - `threadIdx.x` is the thread's number within its block, `blockIdx.x` the block's number in the grid, `blockDim.x`
#   the number of threads in a block. So `i` counts all threads of the grid. (There is a `.y` and a `.z` as well, for
#   blocks that are thought of as squares or cubes.)
# - `if (i < n)`: blocks are of one size, so the last one may have threads too many. They do nothing.
# - `float v` is the thread's own number. It lies in a **register**, the fastest memory there is. `expf` is $e^x$.
#
# CUDA calls this kernel by `silu<<<8, 128>>>(x, y, 1000)`: 8 blocks of 128 threads. Here `launch` does it, and copies
# the arrays to the emulated GPU's memory and back:

# %%
x, y = random_array(1000), unwritten(1000)
if emulator_here():
    first = write(SILU)
    first.launch("silu", 8, 128, x, y, 1000)
    assert close(y, ops.silu(x).data, 1e-5)
    print(f"{8 * 128} threads for 1000 numbers, the same as the library's")

# %% [markdown]
# And if we get it wrong? Say that there are 1020 numbers, where the arrays have 1000:

# %%
if emulator_here():
    print(refusal(first, "silu", 8, 128, x, y, 1020))

# %% [markdown]
# A GPU would have read whatever lies behind the array, or stopped without telling where. The emulator says which
# kernel, which line and which thread.
#
# ## Warps and sectors
#
# Threads do not run alone. 32 neighbours form a **warp**, which executes one instruction for all 32 at once. When the
# instruction is a load, the warp makes one **request** with 32 addresses. Global memory answers in **sectors**: 32
# bytes that lie together, 8 floats, and never less. So what counts is into how many sectors the 32 addresses fall:

# %%
if emulator_here():
    first.launch("silu", 8, 128, x, y, 1000)
    figure(
        first.traffic.picture(),
        "The first warp's load. A square is a float of global memory, the number in it the "
        "thread that reads it; thick lines separate sectors, and a row is a line of 4 sectors. "
        "Below stands how many sectors had to move, and how few would do. Neighbouring threads "
        "read neighbouring floats, and 4 sectors bring all 32.",
    )

# %% [markdown]
# Such an access is called **coalesced**: nothing is fetched that is not wanted. The arithmetic of a norm is little,
# so its time is the time of its memory traffic, and sectors are what there is to save.
#
# ## GroupNorm, the obvious way
#
# From notebook 4: with $\mu$ and $\sigma^2$ the mean and variance of a group of channels of one image, over all
# positions,
#
# $$y_{b,n,c} = \gamma_c\,\frac{x_{b,n,c}-\mu_{b,g}}{\sqrt{\sigma^2_{b,g}+\delta}} + \beta_c$$
#
# for image $b$ of $B$, position $n$ of $N$, channel $c$ of $C$, which lies in group $g$ of $G$; $\delta = 10^{-5}$.
# In NumPy, the reference that the kernels must agree with:

# %%
source(group_norm_forward)

# %% [markdown]
# In memory channels are neighbours: $x_{b,n,c}$ is number $(b\,N + n)\,C + c$ of the array. One thread for every
# group of every image, and three walks over its numbers. (Between whole numbers `/` drops the remainder, and `%` is
# the remainder. `for (int n = 0; n < N; n++)` has `n` run from 0 to `N - 1`.)

# %%
NAIVE = r"""
__global__ void one_thread(const float* x, const float* gamma, const float* beta, float* y,
                           int B, int N, int C, int G) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;  // which group of which image
  if (i >= B * G) return;
  int size = C / G;                               // channels of a group
  int b = i / G, first = i % G * size;            // the image, the group's first channel
  x += b * N * C, y += b * N * C;                 // now x[n * C + c] is of this image
  float sum = 0, squares = 0;
  for (int c = first; c < first + size; c++)
    for (int n = 0; n < N; n++) sum += x[n * C + c];
  float mean = sum / (N * size);
  for (int c = first; c < first + size; c++)
    for (int n = 0; n < N; n++) squares += (x[n * C + c] - mean) * (x[n * C + c] - mean);
  float rstd = rsqrtf(squares / (N * size) + 1e-5f);  // one over the root
  for (int c = first; c < first + size; c++) {
    float gain = gamma[c], offset = beta[c];
    for (int n = 0; n < N; n++) y[n * C + c] = (x[n * C + c] - mean) * rstd * gain + offset;
  }
}
"""

# %%
B, N, C, G = 4, 256, 64, 8
x, gamma, beta = random_array(B, N, C), random_array(C), random_array(C)
wanted = ops.group_norm(x, gamma, beta, groups=G).data

if emulator_here():
    naive = write(NAIVE)
    y = unwritten(*x.shape)
    naive.launch("one_thread", 1, 32, x, gamma, beta, y, B, N, C, G)
    assert close(y, wanted, 1e-5)
    figure(
        naive.traffic.picture(),
        "One request of the naive kernel. Its 32 threads are at the first channels of 32 "
        "groups, each in a sector of its own: of the 8 floats in a sector one is used.",
    )

# %% [markdown]
# Right, and slow for two reasons. Of each sector it uses an eighth, and comes back for the next eighth much later,
# when the caches may have forgotten it. And it has a single warp, where a large GPU can hold thousands.

# %%
SMALLEST = 2 * x.nbytes  # x read once, y written once


def in_numbers(name, traffic):
    """A row of the table: what a way moves."""
    moved = traffic.bytes()
    return [name, f"{moved / 1e3:,.0f}", f"{moved / x.size:.1f}", f"{moved / SMALLEST:.2f}"]


HEADER = ["way", "kilobytes asked for", "bytes for each number", "times the least"]
if emulator_here():
    ways = {"one thread a group": naive.traffic}
    table(HEADER, [in_numbers(name, traffic) for name, traffic in ways.items()])

# %% [markdown]
# The least is 8 bytes for each number: 4 read, 4 written. (The emulator has no caches. It counts what the
# multiprocessors ask for; part of that a GPU's caches may answer.)
#
# ## One block for a group
#
# Let 256 threads share a group, so that the 8 channels of one position go to 8 neighbouring threads. Each thread then
# has a sum of *its* numbers, and the 256 sums must become one. For this a block has **shared memory**: a small array,
# marked `__shared__`, that all its threads can read and write. The sums are added up as a tree: the first 128 threads
# add the sum of the thread 128 places on, then the first 64, and so on, until `sums[0]` holds the total.
#
# In between stands `__syncthreads()`, a **barrier**: no thread goes on before all threads of the block have come to
# it. `__device__` marks a function that kernels can call.

# %%
BLOCK = r"""
__device__ float sum_over_block(float mine) {
  __shared__ float sums[256];
  int t = threadIdx.x;
  sums[t] = mine;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();  // the sums that are read next are written
    if (t < half) sums[t] += sums[t + half];
  }
  __syncthreads();    // the total is written
  float total = sums[0];
  __syncthreads();    // all have read it: sums may be used again
  return total;
}

__global__ void one_block(const float* x, const float* gamma, const float* beta, float* y,
                          int N, int C, int G) {
  int size = C / G, b = blockIdx.x / G, first = blockIdx.x % G * size;
  x += b * N * C + first, y += b * N * C + first;
  int c = threadIdx.x % size;                                  // this thread's channel,
  int row = threadIdx.x / size, rows = blockDim.x / size;      // and every rows-th position
  float gain = gamma[first + c], offset = beta[first + c], sum = 0, squares = 0;
  for (int n = row; n < N; n += rows) sum += x[n * C + c];
  float mean = sum_over_block(sum) / (N * size);
  for (int n = row; n < N; n += rows) squares += (x[n * C + c] - mean) * (x[n * C + c] - mean);
  float rstd = rsqrtf(sum_over_block(squares) / (N * size) + 1e-5f);
  for (int n = row; n < N; n += rows)
    y[n * C + c] = (x[n * C + c] - mean) * rstd * gain + offset;
}
"""

# %%
if emulator_here():
    block = write(BLOCK)
    y = unwritten(*x.shape)
    block.launch("one_block", B * G, 256, x, gamma, beta, y, N, C, G)
    assert close(y, wanted, 1e-5)
    figure(
        block.traffic.picture(),
        "The same load by one block a group: a warp takes 4 positions of 8 channels, 4 whole "
        "sectors. The empty squares are of other groups, and so are the lines that are left out.",
    )
    ways["one block a group"] = block.traffic
    table(HEADER, [in_numbers(name, traffic) for name, traffic in ways.items()])

# %% [markdown]
# ## A race
#
# What if a barrier is forgotten? Take out the one behind the loop, for the loop has barriers already. A thread may
# then read the total before thread 0 has written it: two threads touch one place, one of them writes, and nothing
# says who comes first. That is a **race**. On a GPU it is the nastiest of mistakes, as the result is often right: it
# depends on which warp happens to be quicker.

# %%
planted = BLOCK.replace("  __syncthreads();    // the total is written\n", "")
assert planted != BLOCK
if emulator_here():
    racing = write(planted)
    y = unwritten(*x.shape)
    print(refusal(racing, "one_block", B * G, 256, x, gamma, beta, y, N, C, G))

# %% [markdown]
# The emulator names the place in shared memory, the lines of both accesses, and the two threads; the lines are quoted
# below. It needs no luck for this: it does not wait for a wrong result, but remembers who touched what since the last
# barrier. Are the other two barriers needed as well? Leave out each in turn:

# %%
if emulator_here():
    rows = []
    for line in BLOCK.splitlines():
        if "__syncthreads" in line:
            without = write(BLOCK.replace(line + "\n", ""))
            y = unwritten(*x.shape)
            told = refusal(without, "one_block", B * G, 256, x, gamma, beta, y, N, C, G)
            rows.append([f"`{line.strip()}`", told.split(" in one_block")[0]])
    table(["left out", "reported"], rows)

# %% [markdown]
# They are. (The emulator chooses itself which thread goes first, so a neighbour's sum may not be there at all when it is
# read; that is reported as what it is.)
#
# The library's tests go through all its kernels in this way, and leave out every barrier in turn to see that it is
# missed. [How to look into a kernel](../docs/debugging-kernels.md) tells more.
#
# ## Sums within a warp
#
# The threads of a warp can do without shared memory: by a **shuffle** they read each other's registers. In the first
# step every thread exchanges sums with the one 16 places away, then 8, 4, 2 and 1; **lane** is the word for a
# thread's number in its warp. After each step a lane's sum has the numbers of twice as many, and in the end all
# lanes hold the total. With 8 lanes:

# %%
figure(
    butterfly(8),
    "A sum over 8 lanes in 3 steps. In a step each lane adds what another holds, whose number "
    "differs in one binary digit (^ is C's exclusive or): bold lines bring the other's sum, "
    "thin ones its own.",
)

# %% [markdown]
# That is the library's `warp_sum`, and its `block_sum` needs only one number a warp in shared memory and one barrier:

# %%
cu_source("reduce.cuh", "warp_sum", "block_sum")

# %% [markdown]
# (`template <class T>` leaves the type of number open; `#pragma unroll` has the compiler write out all steps one
# after the other; `~0u` has all 32 bits set: all lanes take part. `block_sum<0>` and `block_sum<1>` are two
# functions, each with shared memory of its own, so the last barrier can go too.)
#
# ## Read once, write once
#
# The kernel still reads $x$ three times: for the mean, for the variance, and to normalise. But a group has $N\,C/G$
# numbers, here 2048: they fit on the multiprocessor. Keep them in shared memory, and global memory is read once.
#
# And after the norm comes a SiLU, a kernel of its own so far, which reads every number that the norm has just
# written. Do it at once, while the number is in a register: this is called **fusing** two kernels. `with_silu`
# switches it on. (`a ? b : c` is Python's `b if a else c`.)

# %%
FUSED = r"""
#include "reduce.cuh"

__global__ void on_chip(const float* x, const float* gamma, const float* beta, float* y,
                        int N, int C, int G, int with_silu) {
  __shared__ float kept[2048];
  int size = C / G, b = blockIdx.x / G, first = blockIdx.x % G * size, numbers = N * size;
  x += b * N * C + first, y += b * N * C + first;
  int c = threadIdx.x % size, row = threadIdx.x / size, rows = blockDim.x / size;
  float gain = gamma[first + c], offset = beta[first + c], sum = 0, squares = 0;
  for (int n = row, k = threadIdx.x; n < N; n += rows, k += blockDim.x) {
    kept[k] = x[n * C + c];
    sum += kept[k];
  }
  float mean = block_sum<0>(sum) / numbers;
  for (int k = threadIdx.x; k < numbers; k += blockDim.x)
    squares += (kept[k] - mean) * (kept[k] - mean);
  float rstd = rsqrtf(block_sum<1>(squares) / numbers + 1e-5f);
  for (int n = row, k = threadIdx.x; n < N; n += rows, k += blockDim.x) {
    float z = (kept[k] - mean) * rstd * gain + offset;
    y[n * C + c] = with_silu ? z / (1 + expf(-z)) : z;
  }
}
"""

# %%
BOTH = ("read", "written")
if emulator_here():
    fused = write(FUSED)
    z, y = unwritten(*x.shape), unwritten(*x.shape)
    fused.launch("on_chip", B * G, 256, x, gamma, beta, z, N, C, G, 0)
    assert close(z, wanted, 1e-5)
    ways["kept on the chip"] = fused.traffic

    first.launch("silu", x.size // 256, 256, z, y, x.size)
    silu_alone = first.traffic

    fused.launch("on_chip", B * G, 256, x, gamma, beta, y, N, C, G, 1)
    assert close(y, ops.group_norm(x, gamma, beta, groups=G, silu=True).data, 1e-5)
    in_one = fused.traffic

    bars = {
        name: {f"norm, {way}": norm.bytes(way == "written") / x.size for way in BOTH}
        | {f"SiLU, {way}": silu_alone.bytes(way == "written") / x.size for way in BOTH}
        for name, norm in list(ways.items())[1:]
    }
    bars["norm and SiLU fused"] = {
        f"norm, {way}": in_one.bytes(way == "written") / x.size for way in BOTH
    }
    figure(
        plotting.stacked_shares(
            bars, "bytes of global memory for each number", number="{:.1f}"
        ),
        "GroupNorm and SiLU: what is read from global memory and what is written there. (The "
        "naive norm would leave the picture on the right.)",
    )
    apart, together = ways["kept on the chip"].bytes() + silu_alone.bytes(), in_one.bytes()
    print(
        f"two kernels {apart:,} bytes, fused {together:,}: {apart / together:.2f} times as much"
    )

# %% [markdown]
# (A little above 8 bytes: each block also reads its group's $\gamma$ and $\beta$.) For an operation that is bound by
# memory, half the bytes is half the time, or nearly.
#
# ## The library's ladder
#
# In `csrc/cuda` every operation is a **ladder**: versions of its kernel from the naive one to the fastest, each with
# one idea more. All of them stay, and all compute the same. (Where CUDA has `kernel<<<grid, block>>>(...)` they
# have `LAUNCH(kernel, grid, block, ...)`, so that an ordinary compiler understands it, too.) `counted` runs our norm
# and SiLU on each rung in turn:

# %%
if emulator_here():
    ladders = MODULES["checked"].module.ladders()
    rows = []
    for rung, (name, change, *_) in enumerate(ladders["group_norm"], start=1):
        y, traffic = counted(
            "group_norm", rung, lambda: ops.group_norm(x, gamma, beta, groups=G, silu=True)
        )
        assert close(y.data, ops.group_norm(x, gamma, beta, groups=G, silu=True).data, 1e-5)
        rows.append([rung, name, change, traffic.launches, f"{traffic.bytes() / x.size:.1f}"])
    table(["rung", "name", "its idea", "kernels called", "bytes for each number"], rows)

# %% [markdown]
# The first two and the last are our kernels, in general form. The two between are for groups that are too large to
# stay on the chip. There several blocks share an image (*split*): one kernel finds the sums of parts, one joins them,
# one applies them. The second of the two also takes so few images at a time that its second reading still finds
# them in the L2 cache, which all multiprocessors share (*cached*). The emulator has no caches, so the two look
# alike to it. (What is above the 8, 12 or 16 bytes of reading $x$ once, twice or three times and writing $y$ is
# what each way looks up or hands on besides: $\gamma$ and $\beta$, and the sums of parts. In so small an array
# that is much.) A group of 65,536 numbers does not fit, and the last rung hands on to them:

# %%
if emulator_here():
    large, gain, offset = random_array(1, 4096, 16), random_array(16), random_array(16)
    rung = len(ladders["group_norm"])
    _, traffic = counted(
        "group_norm", rung, lambda: ops.group_norm(large, gain, offset, groups=1, silu=True)
    )
    print(f"{traffic.launches}: {traffic.bytes() / large.size:.1f} bytes for each number")

# %% [markdown]
# Here is the last rung itself. It takes `V` neighbouring floats with one load, 4 where it can, so that a thread asks
# for 16 bytes at once, and it keeps several loads on their way.

# %%
cu_source("groupnorm.cu", "forward_on_chip")

# %% [markdown]
# Reading aids: `SHARED_DYNAMIC` is shared memory whose size the caller gives; `Layout` says which column and row of
# the group are this thread's; `Walk::next` loads the next `M` rows; `Affine` is the norm's last line with the SiLU
# behind it; `__launch_bounds__(THREADS)` tells the compiler how large blocks are.
#
# ### What the counts do not tell
#
# A load from global memory takes hundreds of clock cycles. A multiprocessor bridges them by holding many warps: while
# one waits, another computes. How many it holds, as a share of those it has room for, is called **occupancy**. The
# limit is what a block takes: threads, registers, shared memory. For a block of 256 threads that keeps its group in
# shared memory, on a multiprocessor with room for 2048 threads and 228 KiB ([compute capability
# 9.0](https://docs.nvidia.com/cuda/cuda-c-programming-guide/), where each block costs another KiB), that would be:

# %%
rows = []
for many in (2048, 8192, 16384, 32768):
    kib = many * 4 / 1024
    blocks = min(2048 // 256, int(228 // (kib + 1)))
    rows.append([f"{many:,}", f"{kib:.0f}", blocks, f"{blocks * 256 / 2048:.0%}"])
table(["numbers of a group", "shared memory (KiB)", "blocks at a time", "occupancy"], rows)

# %% [markdown]
# So a kernel that keeps more on the chip moves less, and hides its waiting worse. Which of the two wins, only a clock
# can tell.
#
# ## The matrix product
#
# Most of a network's time goes into matrix products: linear layers are one, attention is two, a convolution is one
# (notebook 3).
#
# $$y_{ij} = \sum_{k=1}^{K} x_{ik}\,W_{kj}$$
#
# with $x$ $(M, K)$, $W$ $(K, N)$ and $y$ $(M, N)$. (In this section the letters are the usual ones of matrices:
# $N$ is no longer the positions, nor is $C$ below the channels.) Here arithmetic is plenty: $M N K$
# multiplications and additions, for $M K + K N$ numbers read. If every thread computes one $y_{ij}$ by itself,
# each of these numbers is read again and again. The first two rungs do that, and differ in one line, which thread
# computes what:

# %%
cu_source("linear.cu", "one_output", "naive", "coalesced")

# %% [markdown]
# (`p.a.at(i, k)` is the address of $x_{ik}$, the star before it reads what is there, and `p.b` is $W$. `Corner` is
# where the block's square of $y$ begins. `finish` writes the sum, with bias and activation where a layer has them.
# `__forceinline__` asks the compiler to copy the function to where it is called.)

# %%
if emulator_here():
    small_x, small_w = random_array(32, 8), random_array(8, 32)  # M = N = 32, K = 8
    _, down = counted("linear", 1, lambda: ops.linear(small_x, small_w), drawn=True)
    figure(
        down.picture(),
        "Naive: a warp's threads are below each other in y. They read a column of x, whose "
        "numbers lie a row apart; that is drawn. Of W they all read the same number.",
    )
    _, across = counted("linear", 2, lambda: ops.linear(small_x, small_w), drawn=True)
    figure(
        across.picture(),
        "Coalesced: they are beside each other. Of x they all read the same number, and of W "
        "32 neighbours in a row, which are drawn.",
    )

# %% [markdown]
# ### Tiles
#
# The remedy for reading again and again is a **tile**. A block computes a square of $y$. For that it needs some rows
# of $x$ and some columns of $W$; it loads a strip of both into shared memory, and every number there serves a whole
# row or column of the tile. With tiles of $R$ rows and $C$ columns, only $R + C$ numbers are loaded for every
# $k$, for $R\,C$ multiplications.

# %%
figure(
    tiles(),
    "A block's tile of y (orange) and the strips of x and W (blue) that are in shared memory "
    "at one time; the block moves along k, through the grey.",
)

# %%
cu_source("linear.cu", "shared_tiles")

# %% [markdown]
# Two barriers: one before the tiles are read, one before they are overwritten. (`auto load = ...;` is a function
# within the function. `SIDES` is 2 for a linear layer with a gate, whose two halves are computed side by side; here
# it is 1.)
#
# ### Banks
#
# Why has a tile in the source above `SQUARE + 1` columns? Shared memory is made of 32 **banks**: word $w$ (4 bytes)
# is in bank $w \bmod 32$, and in one pass each bank serves one word. If the 32 threads of a warp want words in 32
# different banks (or the same word), one pass is enough. If two want different words of one bank, that is a **bank
# conflict**, and takes two.
#
# Nothing is easier than the worst case: a tile of 32 × 32, written by rows and read by columns. This kernel
# transposes one, and `stride` is how far apart the rows are:

# %%
TRANSPOSE = r"""
__global__ void transposed(const float* x, float* y, int stride) {
  __shared__ float tile[32 * 33];
  int column = threadIdx.x, row = threadIdx.y;
  tile[row * stride + column] = x[row * 32 + column];
  __syncthreads();
  y[row * 32 + column] = tile[column * stride + row];
}
"""

# %%
if emulator_here():
    kernel, square = write(TRANSPOSE), random_array(32, 32)
    ways = {}
    for stride in (32, 33):
        y = unwritten(32, 32)
        kernel.launch("transposed", 1, (32, 32), square, y, stride)
        assert close(y, square.T)
        ways[f"rows of {stride} words"] = kernel.traffic
    figure(
        banks(ways),
        "The words that a warp reads at once, a column of the tile. In rows of 32 words a "
        "column lies in one bank, and its words come one by one. One unused word behind each "
        "row moves every row on by a bank.",
    )

# %% [markdown]
# Padding costs memory. The tiles for tensor cores, which come next, do without: they **swizzle**. They hold numbers
# in **bf16**, a float cut to 2 bytes. Their rows are in chunks of 16 bytes, 8 numbers, and in each row the chunks
# change places, by the exclusive or of their number with one made of the row's:

# %%
cu_source("tiles.h", "swizzled")

# %%
if emulator_here():
    x2, w2 = random_array(128, 64), random_array(64, 128)
    _, traffic = counted(
        "linear", len(ladders["linear"]), lambda: ops.linear(x2, w2), drawn=True
    )
    figure(
        traffic.picture(shared=True, code="ldmatrix("),
        "One load of the last rung. Each thread reads a chunk of 16 bytes: threads 0 to 15 "
        "chunk 0 of their rows, the others chunk 1. Eight are served at a time: look for 0 to "
        "7, and you find each bank once. So four passes serve all 32.",
    )


def busiest_bank(place):
    """The words of the busiest bank where 8 threads read chunk 0 of 8 rows, of 4 chunks each."""
    words = [4 * place(row, 0) + word for row in range(8) for word in range(4)]
    return np.bincount(np.array(words) % 32).max()


print(
    "passes for 8 threads, chunks where they are:",
    busiest_bank(lambda row, chunk: 4 * row + chunk),
)
print(
    "passes for 8 threads, chunks swizzled:      ",
    busiest_bank(lambda row, chunk: 4 * row + (chunk ^ row // 2 % 4)),
)

# %% [markdown]
# ### Tensor cores
#
# A **tensor core** multiplies small matrices in one instruction: here 16 × 16 by 16 × 8, of factors in bf16, with
# sums in full precision. `ldmatrix`, drawn above, loads such matrices from shared memory. The 32 threads of a warp
# hold the matrices together, each a few elements, in registers. Which ones, the instruction prescribes ([PTX ISA,
# matrix fragments for mma.m16n8k16](https://docs.nvidia.com/cuda/parallel-thread-execution/)): with $g$ the
# lane's number divided by 4 without remainder, and $t$ the remainder, a lane's elements of $a$ and of the result
# are in the rows $g$ and $g + 8$, and those of $b$ in the column $g$; $t$ says where along the other side:

# %%
ONE_PRODUCT = r"""
#include "ptx.h"

__global__ void one_product(const float* a, const float* b, float* y) {  // (16, 16) (16, 8)
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned left[4], right[2];  // two numbers in bf16 in each
  for (int i = 0; i < 4; i++) {
    const float* two = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = pack_bf16(two[0], two[1]);
  }
  for (int i = 0; i < 2; i++) {
    const float* two = b + (2 * t + i * 8) * 8 + g;
    right[i] = pack_bf16(two[0], two[8]);
  }
  float sums[4] = {0, 0, 0, 0};
  mma_m16n8k16_bf16(sums, left, right, sums);
  for (int i = 0; i < 4; i++) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
"""

# %%
if emulator_here():
    # small whole numbers, which bf16 holds exactly
    a = rng.integers(-8, 9, (16, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    y = unwritten(16, 8)
    cores = write(ONE_PRODUCT)
    cores.launch("one_product", 1, 32, a, b, y)
    assert close(y, a @ b, 0)
    seen = cores.traffic
    held = {
        "a": seen.lanes("left[i] =", a.shape),
        "b": seen.lanes("right[i] =", b.shape),
        "y = a b": seen.lanes("y[", y.shape, store=True),
    }
    figure(
        fragments(held, lane=6),
        "Which lane loads and stores which element, as the emulator saw it; row and column "
        "are at the edges. Lane 6, dark, has 8 elements of a, 4 of b and 4 of the result; "
        "what it multiplies them with other lanes hold, and only the tensor core sees all. "
        "Light: the lanes with the same t.",
    )

# %% [markdown]
# ### All rungs
#
# The rungs behind the tile go on with the same thought, one level nearer to the arithmetic. A thread computes 8 × 8
# sums in its registers, so that a number from shared memory serves 8 of them. The next tile is on its way while this
# one is multiplied (*prefetch*), and goes from global to shared memory without a stop in registers (*cp_async*). In
# the last two, tensor cores multiply.

# %%
M, K, N_out = 256, 64, 256
x2, w2 = random_array(M, K), random_array(K, N_out)
exact = x2.astype(np.float64) @ w2
least = x2.nbytes + w2.nbytes + 4 * exact.size

if emulator_here():
    rows, moved = [], {}
    for rung, (name, change, *_) in enumerate(ladders["linear"], start=1):
        y2, traffic = counted("linear", rung, lambda: ops.linear(x2, w2))
        error = np.abs(y2.data - exact).max() / np.abs(exact).max()
        assert error < 0.01
        shared = sum(a.transactions for a in traffic.of(shared=True))
        moved[f"{rung} {name}"] = traffic.bytes() / 1e3
        times = f"{traffic.bytes() / least:.1f}"
        rows.append([rung, name, change, times, f"{shared:,}", f"{error:.0e}"])
    counts = [
        "global bytes, times the least",
        "passes over the banks",
        "largest error (of the largest number)",
    ]
    table(["rung", "name", "its idea", *counts], rows)
    figure(
        plotting.bars(
            list(moved), {"asked for": list(moved.values())},
            "kilobytes of global memory (logarithmic)",
            ceiling=("each number once", least / 1e3), log=True,
        ),
        f"A product of ({M}, {K}) and ({K}, {N_out}) on every rung. From one labelled line to the "
        "next is a factor of ten; the bars do not begin at 0, so compare their ends.",
    )  # fmt: skip

# %% [markdown]
# (*K may be split*: where there are too few tiles to fill the chip, several blocks take parts of the sum over
# $k$.) From the second rung to the third the traffic falls by an order of magnitude: that is the tile. Larger
# matrices allow larger tiles, and would show more. From the fourth rung on it is nearly the same, and still each
# rung is there for a reason: they differ in what they wait for, which only a clock shows. The tensor cores'
# factors are rounded (*tf32* keeps 10 digits after the binary point, *bf16* 7), so their errors are larger.
#
# ## Attention
#
# Attention is two products with a softmax between them, $\operatorname{softmax}(Q K^\top/\sqrt d)\,V$. The naive kernels
# write the scores, $L_q \times L_k$ of them, into global memory, and read them back for the softmax and once more for
# the second product. The online softmax of notebook 4 needs none of that: for each query the running $m$, $l$ and
# $o$ are enough, the largest score so far, the sum of the weights and the weighted sum of the values, and they fit
# into a thread's registers. One thread for each query, then:

# %%
ATTENTION = r"""
constexpr int D = 32;  // a head's width: known to the compiler, so arrays of D are registers

__global__ void attend(const float* q, const float* k, const float* v, float* y,
                       int Lq, int Lk) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's query
  if (i >= Lq) return;
  float mine[D], o[D] = {}, m = -INFINITY, l = 0;
  for (int c = 0; c < D; c++) mine[c] = q[i * D + c] / sqrtf(D);
  for (int j = 0; j < Lk; j++) {
    float s = 0;
    for (int c = 0; c < D; c++) s += mine[c] * k[j * D + c];
    float higher = fmaxf(m, s), shrink = expf(m - higher), p = expf(s - higher);
    for (int c = 0; c < D; c++) o[c] = o[c] * shrink + p * v[j * D + c];
    l = l * shrink + p;
    m = higher;
  }
  for (int c = 0; c < D; c++) y[i * D + c] = o[c] / l;
}
"""

# %%
if emulator_here():
    attention = write(ATTENTION)
    q, k, v = (random_array(1, 100, 32) for _ in range(3))
    y = unwritten(*q.shape)
    attention.launch("attend", 4, 32, q, k, v, y, 100, 100)
    assert close(y, ops.attention(q, k, v).data, 1e-5)

# %% [markdown]
# The library's third rung does the same with more threads: 8 lanes share a query's scores, and exchange their largest
# score and their sum by shuffles. (`fast_exp2` is $2^x$, the power that the chip computes fastest; $\log_2 e$ has
# been multiplied into the queries. A row whose scores are all $-\infty$, because all its keys are masked, is what
# `base` is for.)

# %%
cu_source("attention.cu", "online_softmax")

# %% [markdown]
# A block of 64 queries shares tiles of keys and values in shared memory. How much is asked of global memory, for $L$
# queries and as many keys:

# %%
lengths = [32, 64, 128, 256]
if emulator_here():
    moved = {"1 naive": [], "one thread a query": [], "2 flash": [], "3 registers": []}
    moved |= {"5 pipelined": [], "each number once": []}
    for L in lengths:
        q, k, v = (random_array(1, L, 32) for _ in range(3))
        y = unwritten(*q.shape)
        attention.launch("attend", L // 32, 32, q, k, v, y, L, L)
        moved["one thread a query"].append(attention.traffic.bytes())
        moved["each number once"].append(4 * q.nbytes)
        for way in moved:
            if way[0].isdigit():
                got, traffic = counted(
                    "attention", int(way[0]), lambda q=q, k=k, v=v: ops.attention(q, k, v)
                )
                assert close(got.data, y, 0.02)
                moved[way].append(traffic.bytes())
    figure(
        by_length(
            lengths, {way: np.array(values) / 1e3 for way, values in moved.items()},
            "tokens L (as many queries as keys)", "kilobytes of global memory",
        ),
        "Attention of one head of 32 numbers. Each line across is ten times the traffic. The "
        "fourth rung moves as much as the third.",
    )  # fmt: skip

# %% [markdown]
# The kernels (all lines but *each number once*, the least) come to grow with the square of $L$: every block reads
# all keys and values again, which shows once there are several blocks. But a block of 64 queries reads them once
# for all 64, and scores never leave the chip. *flash* gives a block 8 queries, *registers* 64; *pipelined* takes
# more, and rounds keys and values to bf16 beforehand, an extra that pays with length. The naive kernels read a
# query and a key again for every single score, and grow so from the start.
#
# ## On a GPU
#
# Counts are not times. What was measured on GPUs with these kernels, if anything was:

# %%
ops_measured = ("group_norm_forward", "linear_forward", "attention_forward")
header, measured = gpu_results(ROOT, ops_measured)
for device, rows in measured.items():
    print(device)
    table(header, rows)
if not measured:
    print(
        "No GPU has been measured yet: there is no GPU's folder in benchmarks/results.\n"
        "`make gpu-bench` on a machine with one measures every rung, beside PyTorch."
    )

# %% [markdown]
# ## Exercises
#
# Change the kernels, replace the `...`, run the cells, and read what the checker says. Solutions are in
# `solutions/n10_cuda_kernel.py`.
#
# **10.1** This kernel replaces, `rounds` times over, every number of a ring of 128 by the mean of itself and its
# right neighbour. It needs barriers and has none. Where, and how few are enough?

# %%
from exercises import n10_cuda_kernel as check

SMOOTH = r"""
__global__ void smooth(const float* x, float* y, int rounds) {  // one block of 128 threads
  __shared__ float ring[128];
  int t = threadIdx.x;
  ring[t] = x[t];
  for (int r = 0; r < rounds; r++) {
    float mean = (ring[t] + ring[(t + 1) % 128]) / 2;
    ring[t] = mean;
  }
  y[t] = ring[t];
}
"""

check.barriers(SMOOTH)

# %% [markdown]
# **10.2** $y_{n,c} = x_{n,c} + b_c$, a bias for each channel. Here a thread takes a position $n$ and walks along its
# channels. Change which thread takes which numbers, so that accesses are coalesced. (It is called with 8 blocks of
# 128 threads, however many numbers there are; `gridDim.x` is the number of blocks.)

# %%
ADD_BIAS = r"""
__global__ void add_bias(const float* x, const float* b, float* y, int N, int C) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n < N)
    for (int c = 0; c < C; c++) y[n * C + c] = x[n * C + c] + b[c];
}
"""

check.coalesced(ADD_BIAS)

# %% [markdown]
# **10.3** A tile of 32 × 32 words in exactly 1024 words of shared memory, without padding. At which of them, 0 to
# 1023, should the number of `row` and `column` lie, so that a warp reads a whole row in one pass, and a whole column,
# too? (In Python: `^` is the exclusive or here as well.)


# %%
def place(row, column):
    return ...


check.swizzle(place)

# %% [markdown]
# ## Where to go on
#
# The kernels are in `csrc/cuda`, the emulator in `csrc/emulator`, and
# [docs/debugging-kernels.md](../docs/debugging-kernels.md) shows how to stop in one thread with a debugger, and how
# to print the counts line by line. `tests/emulator/bugs.cu` has one kernel for every kind of mistake that the
# emulator finds.
