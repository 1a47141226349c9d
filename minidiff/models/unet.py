"""The U-Net: a convolutional network that sees the noisy image at every scale, told the time and the text.

    x_t ── conv_in ── down 0 ── down 1 ── ... ── mid ── ... ── up 1 ── up 0 ── conv_out ── eps_theta
                        └─────────│──────── skips ────────────────│───────┘
                                  └───────────────────────────────┘

The way down halves the image and finds out what is there; the way up doubles it again and puts it where it belongs,
helped by the skips: every result of the way down is joined to the matching place of the way up. The timestep enters
every residual block; the text enters by cross-attention, where image features are the queries.

Ronneberger et al. 2015, arXiv 1505.04597; Ho et al. 2020, arXiv 2006.11239; Rombach et al. 2022, arXiv 2112.10752.
Structure and parameter names are those of diffusers' UNet2DModel and UNet2DConditionModel, so that their weights fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minidiff import ops
from minidiff.backend import Array, array_module
from minidiff.nn import Conv2d, GroupNorm, LayerNorm, Linear, Module
from minidiff.tensor import Tensor, as_tensor, checkpoint

ATTENTION = ("none", "self", "cross")


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; one entry a level, from the finest, where a tuple is wanted."""

    in_channels: int = field(default=3, metadata={"help": "channels of the input image"})
    out_channels: int = field(default=3, metadata={"help": "channels of the output"})
    channels: tuple[int, ...] = field(default=(64, 128, 128), metadata={"help": "width of each level"})
    blocks: int = field(
        default=2, metadata={"help": "residual blocks a level on the way down (one more on the way up)"}
    )
    attention: tuple[str, ...] = field(
        default=("none", "cross", "cross"), metadata={"help": "at each level: none, self, or cross (self and text)"}
    )
    mid_attention: str = field(default="cross", metadata={"help": "attention at the bottom: none, self or cross"})
    heads: tuple[int, ...] = field(default=(4, 4, 4), metadata={"help": "number of attention heads at each level"})
    transformer_layers: tuple[int, ...] = field(
        default=(1, 1, 1), metadata={"help": "transformer blocks in one cross attention"}
    )
    text_width: int = field(default=128, metadata={"help": "width of the text tokens"})
    linear_projection: bool = field(default=False, metadata={"help": "linear instead of 1x1 conv around transformers"})
    norm_groups: int = field(default=32, metadata={"help": "groups of every GroupNorm"})
    norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the residual blocks' GroupNorm"})
    time_scale_shift: bool = field(
        default=False, metadata={"help": "the timestep scales and shifts the second norm, instead of being added"}
    )
    downsample_padding: int = field(default=1, metadata={"help": "1: on all sides; 0: only below and on the right"})
    sin_first: bool = field(default=False, metadata={"help": "timestep embedding as sin, cos instead of cos, sin"})
    frequency_shift: float = field(default=0.0, metadata={"help": "shift of the timestep embedding's exponent"})

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if levels < 1 or min(*self.channels, *self.heads, self.norm_groups, self.blocks) < 1:
            raise ValueError("unet needs a level, and channels, heads, norm_groups and blocks of at least 1")
        for name in ("attention", "heads", "transformer_layers"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"unet.{name} has {len(getattr(self, name))} entries for {levels} levels")
        if min(self.transformer_layers) < 1:
            raise ValueError("unet.transformer_layers must be at least 1 at every level")
        for kind in (*self.attention, self.mid_attention):
            if kind not in ATTENTION:
                raise ValueError(f"unet.attention: {kind!r} is not one of {', '.join(ATTENTION)}")
        for c, heads in zip(self.channels, self.heads, strict=True):
            if c % self.norm_groups or c % heads:
                raise ValueError(
                    f"unet.channels: {c} does not divide into {self.norm_groups} norm groups and {heads} heads"
                )
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"unet.downsample_padding must be 0 or 1, got {self.downsample_padding}")


class TimeEmbedding(Module):
    """t as a vector: waves of t - 1, then two linear layers with a SiLU between."""

    def __init__(self, config: UNetConfig):
        base = config.channels[0]
        self.linear_1 = Linear(base, 4 * base)
        self.linear_2 = Linear(4 * base, 4 * base)
        self.base, self.sin_first, self.shift = base, config.sin_first, config.frequency_shift

    def forward(self, t: Array) -> Tensor:
        """t (B,), counted from 1 -> (B, 4 * channels[0])."""
        waves = ops.timestep_embedding(t - 1, self.base, self.sin_first, self.shift)
        weight = self.linear_1.weight.data
        x = Tensor(array_module(weight).asarray(waves, dtype=weight.dtype))
        return self.linear_2(self.linear_1(x, activation="silu"))


class ResBlock(Module):
    """GroupNorm, SiLU, conv, + timestep, GroupNorm, SiLU, conv, + input. Starts as the identity.

    time_width: of the timestep's vector; None for a block without one. scale_shift: the timestep scales and shifts the
    second norm, instead of being added.
    """

    def __init__(
        self, c_in: int, c_out: int, groups: int, eps: float, time_width: int | None = None, scale_shift: bool = False
    ):
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(c_in, groups, eps, silu=True)
        self.conv1 = Conv2d(c_in, c_out)
        self.time_emb_proj = None if time_width is None else Linear(time_width, 2 * c_out if scale_shift else c_out)
        self.norm2 = GroupNorm(c_out, groups, eps, silu=True)
        self.conv2 = Conv2d(c_out, c_out, zero=True)
        self.conv_shortcut = Conv2d(c_in, c_out, kernel=1, padding=0) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x (B, H, W, C_in), emb = silu(timestep vector) (B or 1, D) -> (B, H, W, C_out).

        skip: the last of the C_in channels, beside x's.
        """
        time = scale = shift = None
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(emb)
            if len(time.data) > 1:
                time = _once_a_condition(time, x)
            if self.scale_shift:
                C = time.shape[-1] // 2
                scale, shift, time = time[:, :C], time[:, C:], None
        h = self.conv1(self.norm1(x, beside=skip), shift=time)
        h = self.norm2(h, scale=scale, shift=shift)
        return self.conv2(h, residual=x if self.conv_shortcut is None else self.conv_shortcut(x, beside=skip))


class Text(Tensor):
    """Tokens (B, L, D) that remember the keys and values that attention layers made of them."""

    __slots__ = ("kept",)

    def __init__(self, tokens: Tensor | Array):
        super().__init__(tokens)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}


class Attention(Module):
    """Queries from x, keys and values from x itself or from the text; then a linear layer."""

    def __init__(self, width: int, heads: int, text_width: int | None = None, bias: bool = False):
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(text_width or width, width, bias=bias)
        self.to_v = Linear(text_width or width, width, bias=bias)
        self.to_out = [Linear(width, width)]  # a list, because diffusers keeps a dropout beside it
        self.heads = heads

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, mask: Array | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C), tokens (B, L, D) or None for self-attention -> (B, N, C), + residual if given."""
        keys, values = self.keys_and_values(x if tokens is None else tokens)
        y = ops.attention(self.to_q(x), keys, values, self.heads, mask=mask)
        return self.to_out[0](y, residual)

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What x is compared with, and what it is told: both (B, L, C)."""
        if not isinstance(source, Text):
            return self.to_k(source), self.to_v(source)
        if id(self) not in source.kept:
            source.kept[id(self)] = self.to_k(source), self.to_v(source)
        return source.kept[id(self)]


class SelfAttentionBlock(Attention):
    """GroupNorm, self-attention over all positions, + input (the attention of UNet2DModel and AutoencoderKL)."""

    def __init__(self, c: int, heads: int, groups: int, eps: float):
        super().__init__(c, heads, bias=True)
        self.group_norm = GroupNorm(c, groups, eps)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, mask: Array | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); the text is not looked at."""
        B, H, W, C = x.shape
        flat = x.reshape(B, H * W, C)
        return super().forward(self.group_norm(flat), residual=flat).reshape(B, H, W, C)


class GEGLU(Module):
    """Linear to twice the width; one half gates the other."""

    def __init__(self, c_in: int, c_out: int):
        self.proj = Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return self.proj(x, activation="geglu")


class FeedForward(Module):
    """GEGLU to 4 C, linear back to C."""

    def __init__(self, c: int):
        self.net = [GEGLU(c, 4 * c), Module(), Linear(4 * c, c)]  # diffusers has a dropout in the middle

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), + residual if given."""
        return self.net[2](self.net[0](x), residual)


class TransformerBlock(Module):
    """Pre-norm self-attention, cross-attention to the text, feed-forward, each added to its input."""

    def __init__(self, c: int, heads: int, text_width: int):
        self.norm1 = LayerNorm(c)
        self.attn1 = Attention(c, heads)
        self.norm2 = LayerNorm(c)
        self.attn2 = Attention(c, heads, text_width)
        self.norm3 = LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, tokens: Tensor, mask: Array | None) -> Tensor:
        """x (B, N, C), tokens (k B, L, D), mask (k B, L) or None -> (k B, N, C)."""
        x = _once_a_condition(self.attn1(self.norm1(x), residual=x), tokens)
        x = self.attn2(self.norm2(x), tokens, mask, residual=x)
        return self.ff(self.norm3(x), residual=x)


class CrossAttentionBlock(Module):
    """GroupNorm, projection, transformer blocks over the positions as tokens, projection, + input."""

    def __init__(self, c: int, heads: int, layers: int, config: UNetConfig):
        self.norm = GroupNorm(c, config.norm_groups, eps=1e-6)
        self.linear = config.linear_projection
        self.proj_in = Linear(c, c) if self.linear else Conv2d(c, c, kernel=1, padding=0)
        self.transformer_blocks = [TransformerBlock(c, heads, config.text_width) for _ in range(layers)]
        self.proj_out = Linear(c, c, zero=True) if self.linear else Conv2d(c, c, kernel=1, padding=0, zero=True)

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Array | None) -> Tensor:
        """x (B, H, W, C), tokens (k B, L, D), mask (k B, L) or None -> (k B, H, W, C)."""
        if tokens is None:
            raise ValueError("this U-Net has cross-attention: it needs cond = (tokens, mask)")
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x)).reshape(B, H * W, C)
        for block in self.transformer_blocks:
            h = block(h, tokens, mask)
        return self.proj_out(h.reshape(-1, H, W, C), residual=_once_a_condition(x, h))


def _once_a_condition(x: Tensor, wanted: Tensor) -> Tensor:
    """x (B, ...) repeated to the k B samples of `wanted`: images meet k conditions, and what they share ends here."""
    k = len(wanted.data) // max(1, len(x.data))
    return x if k <= 1 else ops.concat([x] * k, axis=0)


def _res_block(c_in: int, c_out: int, config: UNetConfig) -> ResBlock:
    return ResBlock(c_in, c_out, config.norm_groups, config.norm_eps, 4 * config.channels[0], config.time_scale_shift)


def _attention_block(kind: str, level: int, config: UNetConfig) -> Module | None:
    c, heads = config.channels[level], config.heads[level]
    if kind == "self":
        return SelfAttentionBlock(c, heads, config.norm_groups, config.norm_eps)
    if kind == "cross":
        return CrossAttentionBlock(c, heads, config.transformer_layers[level], config)
    return None


class Downsample(Module):
    """A convolution with stride 2: half the height and width."""

    def __init__(self, c: int, padding: int):
        self.conv = Conv2d(c, c, stride=2, padding=1 if padding else ((0, 1), (0, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, C)."""
        return self.conv(x)


class Upsample(Module):
    """Every pixel becomes four, then a convolution."""

    def __init__(self, c: int):
        self.conv = Conv2d(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2 H, 2 W, C)."""
        return self.conv(x, upsample=2)


class DownBlock(Module):
    """One level on the way down; every result is kept for a skip."""

    def __init__(self, level: int, config: UNetConfig):
        c_in, c = config.channels[max(level - 1, 0)], config.channels[level]
        self.resnets = [_res_block(c_in if i == 0 else c, c, config) for i in range(config.blocks)]
        self.attentions = [_attention_block(config.attention[level], level, config) for _ in range(config.blocks)]
        last = level == len(config.channels) - 1
        self.downsamplers = [] if last else [Downsample(c, config.downsample_padding)]

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Array | None, run: Any) -> list[Tensor]:
        """(B, H, W, C_in) -> the level's results, the last of them at half the size unless it is the lowest level."""
        results = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = run(resnet, x, emb)
            if attention is not None:
                x = run(attention, x, tokens, mask)
            results.append(x)
        for downsample in self.downsamplers:
            results.append(downsample(x))
            x = results[-1]
        return results


class MidBlock(Module):
    """The bottom of the U: residual block, attention, residual block."""

    def __init__(self, config: UNetConfig):
        c = config.channels[-1]
        self.resnets = [_res_block(c, c, config), _res_block(c, c, config)]
        self.attentions = [_attention_block(config.mid_attention, len(config.channels) - 1, config)]

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Array | None, run: Any) -> Tensor:
        """Same shape as x."""
        x = run(self.resnets[0], x, emb)
        if self.attentions[0] is not None:
            x = run(self.attentions[0], x, tokens, mask)
        return run(self.resnets[1], x, emb)


class UpBlock(Module):
    """One level on the way up; every residual block takes one skip beside the level's own features."""

    def __init__(self, level: int, config: UNetConfig):
        c = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        above = config.channels[max(level - 1, 0)]
        n = config.blocks + 1
        widths = [(below if i == 0 else c) + (above if i == n - 1 else c) for i in range(n)]
        self.resnets = [_res_block(width, c, config) for width in widths]
        self.attentions = [_attention_block(config.attention[level], level, config) for _ in range(n)]
        self.upsamplers = [Upsample(c)] if level > 0 else []

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, tokens: Tensor | None, mask: Array | None, run: Any
    ) -> Tensor:
        """x at this level's size; takes its skips off the end of the list -> at twice the size unless it is the top."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = run(resnet, x, emb, _once_a_condition(skips.pop(), x))
            if attention is not None:
                x = run(attention, x, tokens, mask)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(Module):
    """eps_theta(x_t, t, cond): predicts the noise (or v, or x0) in x_t.

    Call it with x_t (B, H, W, in_channels), t (B,) or a number, counted from 1, and cond = (tokens (B, L, D),
    mask (B, L) booleans or None), or None without text -> Tensor (B, H, W, out_channels). H and W must be divisible by
    2^(levels - 1). `checkpointing = True` trades a second forward pass of each block for its memory.

    cond may hold k B samples: all images under one condition each, then under another, and so on (classifier-free
    guidance has two). The answer has k B samples too, and what comes before the first look at the text is done once.
    `prepare(cond)` is for sampling: what does not depend on the image is then computed once for all calls.

    seed: initialises the parameters; None leaves them empty for `load`.
    """

    def __init__(self, config: UNetConfig, seed: int | None = 0):
        levels = range(len(config.channels))
        self.config = config
        self.checkpointing = False
        self._looks_at_text = "cross" in (*config.attention, config.mid_attention)
        self.conv_in = Conv2d(config.in_channels, config.channels[0])
        self.time_embedding = TimeEmbedding(config)
        self.down_blocks = [DownBlock(level, config) for level in levels]
        self.mid_block = MidBlock(config)
        self.up_blocks = [UpBlock(level, config) for level in reversed(levels)]
        self.conv_norm_out = GroupNorm(config.channels[0], config.norm_groups, config.norm_eps, silu=True)
        self.conv_out = Conv2d(config.channels[0], config.out_channels, zero=True)
        self.conv_in.weight.hidden = self.conv_out.weight.hidden = False
        if seed is not None:
            self.initialise(seed)

    def forward(self, x_t: Tensor | Array, t: Array | int, cond: Any = None) -> Tensor:
        """x_t (B, H, W, in_channels), t (B,) or a number, cond (tokens, mask) or None -> (B, H, W, out_channels)."""
        x = as_tensor(x_t)
        xp = array_module(x.data)
        t = xp.asarray(t)
        tokens, mask = (None, None) if cond is None else (as_tensor(cond[0]), cond[1])
        self._check(x, t, tokens)
        t = t.reshape(-1)
        if xp is np and (t == t[:1]).all():  # all samples are at one time, as in sampling: one row serves them
            t = t[:1]
        emb = ops.silu(self.time_embedding(t))
        run = _checkpointed if self.checkpointing else _plainly

        x = self.conv_in(x)
        if tokens is not None and not self._looks_at_text:
            x = _once_a_condition(x, tokens)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], emb, tokens, mask, run)
        x = self.mid_block(skips[-1], emb, tokens, mask, run)
        for up in self.up_blocks:
            x = up(x, skips, emb, tokens, mask, run)
        return self.conv_out(self.conv_norm_out(x))

    def prepare(self, cond: Any) -> Any:
        """cond for many calls without gradients, all with the same text and the same weights.

        Its keys and values, which do not depend on the image, are computed in the first call and kept.
        """
        return Text(cond[0]), cond[1]

    def _check(self, x: Tensor, t: Array, tokens: Tensor | None) -> None:
        B = x.shape[0] if x.ndim else 0
        stride = 2 ** (len(self.config.channels) - 1)
        if x.ndim != 4 or x.shape[3] != self.config.in_channels or x.shape[1] % stride or x.shape[2] % stride:
            raise ValueError(
                f"UNet: wanted x_t (B, H, W, {self.config.in_channels}), H and W divisible by {stride}; got {x.shape}"
            )
        if t.shape not in ((), (1,), x.shape[:1]):
            raise ValueError(f"UNet: wanted one t, or one a sample {x.shape[:1]}, got {t.shape}")
        if tokens is not None and (tokens.ndim != 3 or tokens.shape[0] < B or tokens.shape[0] % max(1, B)):
            raise ValueError(f"UNet: wanted tokens (k * {B}, L, D) for {B} images, got {tokens.shape}")


def _plainly(block: Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _checkpointed(block: Module, *inputs: Any) -> Tensor:
    """Tensors go through the tape; a missing text or a mask, which have no gradient, around it."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return block(*(next(rest) if isinstance(x, Tensor) else x for x in inputs))

    return checkpoint(call, *tensors)


def parameter_count(module: Module) -> int:
    """The number of trained numbers."""
    return int(sum(np.prod(p.wanted_shape) for p in module.parameters()))
