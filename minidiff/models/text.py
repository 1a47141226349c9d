"""The text encoder: CLIP's transformer, at any size. Ours is small and trained together with the U-Net.

Words and their places become vectors; each layer lets every word look at the words before it (causal attention) and
then thinks about what it saw (two linear layers). Parameter names follow transformers' CLIPTextModel, so that its
weights fit: those of ViT-L/14's text tower (Stable Diffusion 1) and of OpenCLIP-H's (Stable Diffusion 2).
Radford et al. 2021, arXiv 2103.00020; Cherti et al. 2022, arXiv 2212.07143.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    hidden: int = field(default=0, metadata={"help": "width between an MLP's two linear layers; 0: four times width"})
    gelu: str = field(default="quick", metadata={"help": "the MLP's activation: quick (CLIP) or exact (OpenCLIP)"})
    norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of every LayerNorm"})

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"text.context must be at least 2, for a caption's start and end, got {self.context}")
        if self.layers < 0:
            raise ValueError(f"text.layers must not be negative, got {self.layers}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"text.width: {self.width} does not divide into {self.heads} heads")
        if self.hidden < 0:
            raise ValueError(f"text.hidden must not be negative, got {self.hidden}")
        if self.gelu not in ("quick", "exact"):
            raise ValueError(f"text.gelu: {self.gelu!r} is neither quick nor exact")


class SelfAttention(Module):
    """Causal self-attention over the tokens."""

    def __init__(self, width: int, heads: int):
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width, zero=True)
        self.heads = heads

    def forward(self, x: Tensor, residual: Tensor, mask: Array | None) -> Tensor:
        """x (B, L, D), mask (B, L) or None -> (B, L, D), + residual."""
        y = ops.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask=mask, causal=True)
        return self.out_proj(y, residual)


class MLP(Module):
    """Linear to 4 D, GELU, linear back."""

    def __init__(self, config: TextEncoderConfig):
        hidden = config.hidden or 4 * config.width
        self.fc1 = Linear(config.width, hidden)
        self.fc2 = Linear(hidden, config.width, zero=True)
        self.activation = f"gelu_{config.gelu}"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), + residual."""
        return self.fc2(self.fc1(x, activation=self.activation), residual)


class EncoderLayer(Module):
    """Pre-norm attention and MLP, each added to its input. Starts as the identity: the words stay apart."""

    def __init__(self, config: TextEncoderConfig):
        self.layer_norm1 = LayerNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Array | None = None) -> Tensor:
        """x (B, L, D), mask (B, L) or None -> (B, L, D)."""
        x = self.self_attn(self.layer_norm1(x), x, mask)
        return self.mlp(self.layer_norm2(x), x)


class TextEncoder(Module):
    """Token ids (B, L) -> token vectors (B, L, D), the keys and values of the U-Net's cross-attention."""

    def __init__(self, config: TextEncoderConfig, seed: int | None = 0):
        self.config = config
        # Not CLIP's 0.02: beside such small vectors the first layers drown the words, and a short training learns
        # the text much later (docs/recipe.md).
        self.token_embedding = Embedding(config.vocabulary, config.width, std=1.0)
        self.position_embedding = Embedding(config.context, config.width, std=1.0)
        self.layers = [EncoderLayer(config) for _ in range(config.layers)]
        self.final_layer_norm = LayerNorm(config.width, config.norm_eps)
        if seed is not None:
            self.initialise(seed)

    def forward(self, ids: Array, mask: Array | None = None, skip: int = 0) -> Tensor:
        """ids (B, L) integers, L at most the context -> (B, L, D).

        mask: booleans (B, L), False for tokens that no other sees; the first, the start token, is always seen. Stable
        Diffusion gives none: its U-Net was trained to look at padding too.
        skip: how many of the last layers are left out (1: the penultimate layer's result, normalised).
        """
        self._check(ids, mask, skip)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x, mask)
        return self.final_layer_norm(x)

    def _check(self, ids: Array, mask: Array | None, skip: int) -> None:
        if ids.ndim != 2 or ids.shape[1] > self.config.context:
            raise ValueError(f"TextEncoder: wanted ids (B, L) with L <= {self.config.context}, got {ids.shape}")
        if not 0 <= skip <= len(self.layers):
            raise ValueError(f"TextEncoder: skip must be in 0..{len(self.layers)}, the number of layers, got {skip}")
        if isinstance(mask, np.ndarray) and mask.ndim == 2 and not mask[:, :1].all():
            raise ValueError("TextEncoder: the mask hides a first token, which then sees nothing")
