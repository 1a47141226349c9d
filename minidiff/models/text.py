"""The text encoder: a small transformer in the style of CLIP's, trained together with the U-Net.

Words and their places become vectors; each layer lets every word look at the words before it (causal attention) and
then thinks about what it saw (two linear layers). Parameter names follow transformers' CLIPTextModel.
Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minidiff import ops
from minidiff.backend import Array
from minidiff.nn import Embedding, LayerNorm, Linear, Module
from minidiff.tensor import Tensor


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder."""

    vocabulary: int = field(default=0, metadata={"help": "number of tokens; 0: as many as the data's tokenizer has"})
    context: int = field(default=16, metadata={"help": "tokens a caption, start and end included"})
    width: int = field(default=128, metadata={"help": "width of a token"})
    layers: int = field(default=2, metadata={"help": "transformer layers"})
    heads: int = field(default=4, metadata={"help": "attention heads"})

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"text.context must be at least 2, for a caption's start and end, got {self.context}")
        if self.layers < 0:
            raise ValueError(f"text.layers must not be negative, got {self.layers}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"text.width: {self.width} does not divide into {self.heads} heads")


class SelfAttention(Module):
    """Causal self-attention over the tokens."""

    def __init__(self, width: int, heads: int):
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width, zero=True)
        self.heads = heads

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), + residual."""
        y = ops.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True)
        return self.out_proj(y, residual)


class MLP(Module):
    """Linear to 4 D, quick GELU, linear back."""

    def __init__(self, width: int):
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width, zero=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), + residual."""
        return self.fc2(self.fc1(x, activation="gelu_quick"), residual)


class EncoderLayer(Module):
    """Pre-norm attention and MLP, each added to its input. Starts as the identity: the words stay apart."""

    def __init__(self, width: int, heads: int):
        self.layer_norm1 = LayerNorm(width)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = self.self_attn(self.layer_norm1(x), x)
        return self.mlp(self.layer_norm2(x), x)


class TextEncoder(Module):
    """Token ids (B, L) -> token vectors (B, L, D), the keys and values of the U-Net's cross-attention."""

    def __init__(self, config: TextEncoderConfig, seed: int | None = 0):
        self.config = config
        # Not CLIP's 0.02: beside such small vectors the first layers drown the words, and a short training learns
        # the text much later (docs/recipe.md).
        self.token_embedding = Embedding(config.vocabulary, config.width, std=1.0)
        self.position_embedding = Embedding(config.context, config.width, std=1.0)
        self.layers = [EncoderLayer(config.width, config.heads) for _ in range(config.layers)]
        self.final_layer_norm = LayerNorm(config.width)
        if seed is not None:
            self.initialise(seed)

    def forward(self, ids: Array) -> Tensor:
        """ids (B, L) integers, L at most the context -> (B, L, D)."""
        if ids.ndim != 2 or ids.shape[1] > self.config.context:
            raise ValueError(f"TextEncoder: wanted ids (B, L) with L <= {self.config.context}, got {ids.shape}")
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
