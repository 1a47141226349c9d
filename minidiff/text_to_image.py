"""The whole model: tokenizer, text encoder, U-Net and schedule, and what is needed to train it and draw with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minidiff import schedule as schedules
from minidiff.backend import Array, array_module
from minidiff.diffusion import PREDICTIONS, eps_from_prediction, noised, weighted_mse, x0_loss_weight
from minidiff.models.text import TextEncoder, TextEncoderConfig
from minidiff.models.unet import UNet, UNetConfig
from minidiff.nn import Module
from minidiff.random import Draw
from minidiff.tensor import Tensor
from minidiff.text import WordTokenizer

SCHEDULES = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear, "cosine": schedules.cosine}


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process, and what the network is asked for."""

    schedule: str = field(default="cosine", metadata={"help": f"noise schedule: {', '.join(SCHEDULES)}"})
    T: int = field(default=1000, metadata={"help": "number of diffusion steps"})
    prediction: str = field(default="eps", metadata={"help": f"what the network predicts: {', '.join(PREDICTIONS)}"})
    weight_limit: float = field(
        default=1.0, metadata={"help": "x0-loss: each image counts min(1 + SNR, this) times; 1: all count the same"}
    )
    patch: int = field(
        default=1, metadata={"help": "space-to-depth: each patch x patch square of pixels is one position of the U-Net"}
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"diffusion.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"diffusion.prediction: {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if self.weight_limit < 1:
            raise ValueError(f"diffusion.weight_limit must be at least 1, got {self.weight_limit}")
        if self.patch < 1 or self.T < 1:
            raise ValueError("diffusion.patch and diffusion.T must be at least 1")


def space_to_depth(images: Array, patch: int) -> Array:
    """(B, H, W, C) -> (B, H / patch, W / patch, patch * patch * C): nothing is lost, pixels become channels."""
    B, H, W, C = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} do not divide into patches of {patch}x{patch}")
    tiles = images.reshape(B, H // patch, patch, W // patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return array_module(images).ascontiguousarray(tiles).reshape(B, H // patch, W // patch, patch * patch * C)


def depth_to_space(x: Array, patch: int) -> Array:
    """The inverse of space_to_depth."""
    B, h, w, D = x.shape
    tiles = x.reshape(B, h, w, patch, patch, D // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return array_module(x).ascontiguousarray(tiles).reshape(B, h * patch, w * patch, D // patch**2)


class Question(NamedTuple):
    """What the network is asked in one pass of training, as arrays on its device."""

    x_t: Array  # (B, *latent_shape)
    t: Array  # (B,)
    ids: Array  # (B, L) words of the captions
    mask: Array  # (B, L)
    target: Array  # like x_t
    weight: Array | None  # (B,) of the squared errors


class TextToImage(Module):
    """A text encoder and a U-Net that are trained together.

    Called as model(x_t, t, cond) it is eps_theta, whatever the U-Net was trained to predict. Diffusion runs on
    `encode(images)`: images (B, H, W, C) with patches as channels.
    """

    def __init__(
        self,
        unet: UNetConfig,
        text: TextEncoderConfig,
        diffusion: DiffusionConfig,
        words: Sequence[str],
        image_shape: tuple[int, int, int],
        seed: int | None = 0,
    ):
        H, W, C = image_shape
        p = diffusion.patch
        if H % p or W % p:
            raise ValueError(f"diffusion.patch: images of {H}x{W} do not divide into patches of {p}x{p}")
        channels = p * p * C
        self.tokenizer = WordTokenizer(words)
        self.schedule = SCHEDULES[diffusion.schedule](diffusion.T)
        self.diffusion = diffusion
        self.image_shape = image_shape
        self.latent_shape = (H // p, W // p, channels)
        self.text_encoder = TextEncoder(replace(text, vocabulary=len(self.tokenizer)), seed=None)
        self.unet = UNet(replace(unet, in_channels=channels, out_channels=channels, text_width=text.width), seed=None)
        if seed is not None:
            self.initialise(seed)

    def encode(self, images: Array) -> Array:
        """Images (B, H, W, C) in [-1, 1] -> what diffusion works on (B, *latent_shape)."""
        return space_to_depth(images, self.diffusion.patch)

    def decode(self, x: Array) -> Array:
        """The inverse of `encode`."""
        return depth_to_space(x, self.diffusion.patch)

    @property
    def array_module(self) -> ModuleType:
        """numpy or cupy: where the parameters are, and arrays must be."""
        return array_module(self.text_encoder.token_embedding.weight.data)

    def condition(self, captions: Sequence[str]) -> tuple[Tensor, Array]:
        """Captions -> cond = (tokens (B, L, D), mask (B, L)); "" is the unconditional input."""
        ids, mask = self._words(captions)
        return self.text_encoder(ids), mask

    def _words(self, captions: Sequence[str]) -> tuple[Array, Array]:
        ids, mask = self.tokenizer(captions, self.text_encoder.config.context)
        return self.array_module.asarray(ids), self.array_module.asarray(mask)

    def question(self, images: Array, captions: Sequence[str], t: np.ndarray, eps: Array | Draw) -> Question:
        """Images (B, H, W, C), their captions, t (B,) in 1..T, and noise (B, *latent_shape), or which to draw."""
        xp, prediction = self.array_module, self.diffusion.prediction
        eps = eps if isinstance(eps, Draw) else xp.asarray(eps)
        x_t, target = noised(self.encode(xp.asarray(images)), t, eps, self.schedule, prediction)
        weight = None
        if prediction == "x0":
            weight = xp.asarray(x0_loss_weight(t, self.schedule, self.diffusion.weight_limit))
        return Question(x_t, xp.asarray(t), *self._words(captions), target, weight)

    def answer_loss(self, question: Question) -> Tensor:
        """The loss of the network's answer: a function of arrays alone, the same work whatever they hold."""
        cond = self.text_encoder(question.ids), question.mask
        return weighted_mse(self.unet(question.x_t, question.t, cond), question.target, question.weight)

    def loss(self, images: Array, captions: Sequence[str], t: np.ndarray, eps: Array | Draw) -> Tensor:
        """The training loss of what `question` takes."""
        return self.answer_loss(self.question(images, captions, t, eps))

    def prepare(self, cond: Any) -> Any:
        """`UNet.prepare`: cond for many calls with the same text, and for several conditions an image."""
        return self.unet.prepare(cond)

    def forward(self, x_t: Array, t: Array, cond: Any) -> Array:
        """eps_theta(x_t, t, cond): x_t (B, *latent_shape), cond of k B samples -> an array (k B, *latent_shape)."""
        answer = self.unet(x_t, t, cond).data
        xp, k = array_module(x_t), len(answer) // max(1, len(x_t))
        if k > 1:
            x_t, t = xp.concatenate([x_t] * k), xp.concatenate([xp.broadcast_to(t, x_t.shape[:1])] * k)
        return eps_from_prediction(answer, x_t, t, self.schedule, self.diffusion.prediction)

    def time_embedding(self, t: Array) -> Tensor:
        """t (B,) -> the vector that, after a SiLU, every residual block receives."""
        return self.unet.time_embedding(t)
