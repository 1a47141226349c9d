"""minidiff's U-Net in plain PyTorch, written for speed: what whole training steps are compared with.

It needs nothing but PyTorch. Weights, state_dict keys (minidiff's parameter paths) and results are those of
`minidiff.models.unet.UNet`; tests/test_torch_unet.py compares outputs and all gradients.

Shapes: x (B, C, H, W), in either memory format; h (B, N, C), the N = H W positions as tokens; tokens (B, L, D).
Between the two the code only views where the memory is channels last. Nothing breaks torch.compile's graph.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.models.unet import UNetConfig


class TimeEmbedding(nn.Module):
    """t as a vector: waves of t - 1, then two linear layers with a SiLU between."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        base = config.channels[0]
        self.linear_1 = nn.Linear(base, 4 * base)
        self.linear_2 = nn.Linear(4 * base, 4 * base)
        self.base, self.sin_first, self.shift = base, config.sin_first, config.frequency_shift

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), counted from 1 -> (B, 4 * channels[0]); the waves' angles are in float64, as minidiff's."""
        half = self.base // 2
        i = torch.arange(half, device=t.device, dtype=torch.float64)
        angle = (t - 1)[:, None] * torch.exp(i * (-math.log(10000) / (half - self.shift)))
        sin, cos = angle.sin(), angle.cos()
        waves = torch.cat([sin, cos] if self.sin_first else [cos, sin], 1).to(self.linear_1.weight.dtype)
        if self.base % 2:
            waves = F.pad(waves, (0, 1))
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, + timestep, GroupNorm, SiLU, conv, + input."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.scale_shift = config.time_scale_shift
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.channels[0], 2 * c_out if self.scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C_in, H, W), emb = silu(timestep vector) (B, D) -> (B, C_out, H, W)."""
        time = self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(x)))
        if self.scale_shift:
            scale, shift = time.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Queries from h, keys and values from h itself or, with a text_width, from the text; then a linear layer."""

    def __init__(self, width: int, heads: int, text_width: int | None = None, bias: bool = False):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(text_width or width, width, bias)
        self.to_v = nn.Linear(text_width or width, width, bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads, self.cross = heads, text_width is not None

    def forward(self, h: Tensor, tokens: Tensor | None = None) -> Tensor:
        """h (B, N, C), tokens (B, L, D) -> (B, N, C)."""
        if self.cross:
            q = self.to_q(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
            k, v = self._together(tokens, self.to_k, self.to_v)
        else:
            q, k, v = self._together(h, self.to_q, self.to_k, self.to_v)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

    def _together(self, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Each layer of x (B, N, D) as (B, heads, N, d), in one matrix product: the joined weights are small."""
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).unflatten(2, (len(layers), self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def as_image(h: Tensor, like: Tensor) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return h.transpose(1, 2).unflatten(2, like.shape[2:])


class SelfAttentionBlock(Attention):
    """GroupNorm, self-attention over all positions, + input."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__(config.channels[level], config.heads[level], bias=True)
        self.group_norm = nn.GroupNorm(config.norm_groups, config.channels[level], config.norm_eps)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Same shape as x; the text is not looked at."""
        return x + as_image(super().forward(as_tokens(self.group_norm(x))), x)


class GEGLU(nn.Module):
    """Linear to twice the width; one half gates the other."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        a, gate = self.proj(h).chunk(2, -1)
        return a * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the text, feed-forward, each added to its input."""

    def __init__(self, c: int, heads: int, text_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, heads, text_width)
        self.norm3 = nn.LayerNorm(c)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))})

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Same shape as h (B, N, C)."""
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), tokens)
        return h + self.ff["net"](self.norm3(h))


class CrossAttentionBlock(nn.Module):
    """GroupNorm, projection, transformer blocks over the positions as tokens, projection, + input."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        c, heads, layers = config.channels[level], config.heads[level], config.transformer_layers[level]
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if config.linear_projection else nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(c, heads, config.text_width) for _ in range(layers))
        self.proj_out = nn.Linear(c, c) if config.linear_projection else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Same shape as x."""
        h = _project(self.proj_in, as_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, tokens)
        return x + as_image(_project(self.proj_out, h), x)


def _project(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """A 1x1 convolution of tokens is a linear layer, whose bias is added inside the product."""
    return F.linear(h, layer.weight.flatten(1), layer.bias)


def attention_blocks(kind: str, level: int, n: int, config: UNetConfig) -> nn.ModuleList:
    """n blocks of one kind; an empty list for "none"."""
    block = {"none": None, "self": SelfAttentionBlock, "cross": CrossAttentionBlock}[kind]
    return nn.ModuleList(block(level, config) for _ in range(n if block else 0))


class Downsample(nn.Module):
    """A convolution with stride 2: half the height and width."""

    def __init__(self, c: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel becomes four, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """One level on the way down; every result is kept for a skip."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        c_in, c, n = config.channels[max(level - 1, 0)], config.channels[level], config.blocks
        self.resnets = nn.ModuleList(ResBlock(c_in if i == 0 else c, c, config) for i in range(n))
        self.attentions = attention_blocks(config.attention[level], level, n, config)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c, config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None) -> list[Tensor]:
        """The level's results, the last of them at half the size unless it is the lowest level."""
        results = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, tokens)
            results.append(x)
        return results + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """The bottom of the U: residual block, attention, residual block."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        level, c = len(config.channels) - 1, config.channels[-1]
        self.resnets = nn.ModuleList([ResBlock(c, c, config), ResBlock(c, c, config)])
        self.attentions = attention_blocks(config.mid_attention, level, 1, config)

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None) -> Tensor:
        """Same shape as x."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x, tokens)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """One level on the way up; every residual block takes one skip beside the level's own features."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        c, n = config.channels[level], config.blocks + 1
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        above = config.channels[max(level - 1, 0)]
        widths = [(below if i == 0 else c) + (above if i == n - 1 else c) for i in range(n)]
        self.resnets = nn.ModuleList(ResBlock(width, c, config) for width in widths)
        self.attentions = attention_blocks(config.attention[level], level, n, config)
        self.upsamplers = nn.ModuleList([Upsample(c)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, tokens: Tensor | None) -> Tensor:
        """x at this level's size; takes its skips off the end of the list -> at twice the size unless it is the top."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], 1), emb)
            if self.attentions:
                x = self.attentions[i](x, tokens)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class TorchUNet(nn.Module):
    """eps_theta(x_t, t, tokens) of minidiff's U-Net of this configuration; give it weights with `load`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        levels = range(len(config.channels))
        self.conv_in = nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config)
        self.down_blocks = nn.ModuleList(DownBlock(level, config) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(level, config) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, config.channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) counted from 1, tokens (B, L, D) where it looks at text -> (B, C_out, H, W)."""
        emb = F.silu(self.time_embedding(t))
        skips = [self.conv_in(x)]
        for down in self.down_blocks:
            skips += down(skips[-1], emb, tokens)
        x = self.mid_block(skips[-1], emb, tokens)
        for up in self.up_blocks:
            x = up(x, skips, emb, tokens)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def load(model: TorchUNet, state: dict[str, np.ndarray]) -> None:
    """Take over minidiff's `state()`, whatever the model's dtype, device and memory format."""
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # vectors, linear (in, out), convolutions HWIO
    model.load_state_dict({name: torch.tensor(a.transpose(order[a.ndim])) for name, a in state.items()})


def our_layout(array: Tensor) -> np.ndarray:
    """A parameter or its gradient in minidiff's layout: convolutions HWIO, linear (in, out)."""
    order = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
    return array.detach().cpu().numpy().transpose(order[array.ndim])
