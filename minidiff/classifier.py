"""A small classifier of real pictures, made of our own layers: the yardstick for pictures that a model drew by class.

It never sees a drawn picture in training. Where it names the class that was asked for, the picture has what tells this
class from the others, to the eye of a small network; that is less than looking real.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff import ops
from minidiff.backend import array_module
from minidiff.checkpoint import load_checkpoint, save_checkpoint
from minidiff.data import DataConfig, cache_folder, open_pictures
from minidiff.data.pictures import Pictures, scaled
from minidiff.errors import UserError, UserNotice
from minidiff.nn import Conv2d, GroupNorm, Linear, Module
from minidiff.optim import OPTIMIZERS, clip_factor, gradient_norm, learning_rate
from minidiff.tensor import Tensor, no_grad

VERSION = 1  # of how a classifier is made and trained; one of another version is not taken for it
WIDTHS = (48, 96, 192)  # channels at full, half and a quarter of the resolution
EPOCHS, BATCH, LR = 5, 64, 1e-3


class Classifier(Module):
    """Images (B, H, W, 3) in [-1, 1] -> the logits (B, n) of n classes."""

    def __init__(self, n: int, seed: int | None = 0):
        fine, middle, coarse = WIDTHS
        sizes = ((3, fine, 1), (fine, middle, 2), (middle, middle, 1), (middle, coarse, 2), (coarse, coarse, 1))
        self.convs = [Conv2d(c_in, c_out, stride=stride) for c_in, c_out, stride in sizes]
        self.norms = [GroupNorm(c_out, c_out // 12, silu=True) for _, c_out, _ in sizes]
        self.head = Linear(coarse, n, zero=True)
        self.convs[0].weight.hidden = self.head.weight.hidden = False
        if seed is not None:
            self.initialise(seed)

    def forward(self, images: np.ndarray) -> Tensor:
        """The logits: what each class has for itself, up to a number common to all."""
        x = Tensor(images)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return self.head(x.mean(axis=(1, 2)))


def cross_entropy(logits: Tensor, labels: np.ndarray) -> Tensor:
    """-log softmax(logits)[label], the mean over the batch: logits (B, n), labels (B,) in 0..n - 1 -> a scalar."""
    xp = array_module(logits.data)
    x = logits - xp.max(logits.data, axis=1, keepdims=True)  # changes nothing but the largest exponent
    wanted = xp.eye(logits.shape[1], dtype=logits.dtype)[labels]
    return (ops.log(ops.exp(x).sum(axis=1)) - (x * wanted).sum(axis=1)).mean()


def train_classifier(data: Pictures, epochs: int = EPOCHS, seed: int = 0) -> Classifier:
    """A classifier of the set's classes, trained for whole epochs of it, mirrored half of the time."""
    data = dataclasses.replace(data, flip=True, seed=seed)
    model = Classifier(len(data.classes), seed)
    parameters = dict(model.named_parameters())
    optimizer = OPTIMIZERS["muon"](parameters, (0.9, 0.99), weight_decay=0.01)
    steps = max(1, epochs * len(data) // BATCH)
    for step in tqdm(range(steps), "classifier", unit="step", dynamic_ncols=True):
        images, labels = data.labelled_batch(step, BATCH)
        cross_entropy(model(images), labels).backward()
        grads = {name: p.grad for name, p in parameters.items()}
        factor = clip_factor(gradient_norm(list(grads.values())), 1.0)
        optimizer.step(learning_rate(step + 1, steps, LR, min(100, steps)), grads, factor)
        for p in parameters.values():
            p.grad = None
    model.load(optimizer.ema)
    return model


def classify(model: Classifier, images: np.ndarray) -> np.ndarray:
    """The most likely class (n,) of each image (n, H, W, 3) in [-1, 1]."""
    with no_grad():
        parts = [model(images[i : i + 256]).data.argmax(axis=1) for i in range(0, len(images), 256)]
    return np.concatenate(parts)


def accuracy(model: Classifier, data: Pictures) -> float:
    """The share of a labelled set that the classifier names rightly."""
    right = 0
    for i in range(0, len(data), 256):
        named = classify(model, scaled(data.images[data.rows[i : i + 256]]))
        right += int((named == _labels(data)[i : i + 256]).sum())
    return right / len(data)


def hold_out(data: Pictures, every: int = 10) -> tuple[Pictures, Pictures]:
    """Two parts of a labelled set: all but every tenth picture of it, and these."""
    tenth = np.arange(len(data)) % every == every - 1

    def part(mask: np.ndarray) -> Pictures:
        captions = [texts for texts, kept in zip(data.captions, mask, strict=True) if kept]
        return dataclasses.replace(data, rows=data.rows[mask], labels=_labels(data)[mask], captions=captions)

    return part(~tenth), part(tenth)


def open_classifier(config: DataConfig, longest: int = 1000) -> tuple[Classifier, float, int, Pictures]:
    """What `classifier_of` returns, and the pictures, `pictures_with_classes`; raises UserError as they do."""
    data = pictures_with_classes(config, longest)
    return *classifier_of(data, config), data


def pictures_with_classes(config: DataConfig, longest: int = 1000) -> Pictures:
    """The whole set, whatever its limit. Raises UserError where it has no two classes."""
    beyond = config.limit > 0 and config.name != "cifar10"  # training did not see all: what is broken is left out
    whole = dataclasses.replace(config, limit=0, skip_broken=config.skip_broken or beyond)
    data = open_pictures(whole, seed=0, longest=longest)
    if data.labels is None:
        raise UserError(
            f"the pictures of {config.path} are not sorted into classes, so there is nothing to judge them by"
        )
    if len(data.classes) < 2:
        raise UserError(
            f"the pictures of {config.path} are all of one class, {data.classes[0]!r}; a classifier needs two"
        )
    if len(set(data.prompts)) < len(data.classes):
        raise UserError(
            f"the first {longest} words of two classes of {config.path} are the same, and the model reads no more"
        )
    return data


def classifier_of(data: Pictures, config: DataConfig) -> tuple[Classifier, float, int]:
    """The classifier of such pictures, its accuracy on some that it did not see, and how many these are.

    It is trained once and kept beside the decoded pictures. Raises UserError where there are too few to keep some of
    each class for judging.
    """
    if config.name == "cifar10":
        train, test = data, open_pictures(dataclasses.replace(config, limit=0), seed=0, split="test")
    else:
        train, test = hold_out(data)
    if any(part.classes != data.classes or set(_labels(part)) != set(_labels(data)) for part in (train, test)):
        raise UserError(f"{config.path} has too few pictures: some of each class are to judge the classifier; add more")
    return *_kept(train, test, cache_folder(config)), len(test)


def _kept(train: Pictures, test: Pictures, cache: Path) -> tuple[Classifier, float]:
    made_from = [VERSION, WIDTHS, EPOCHS, BATCH, LR, train.content, test.content, train.classes]
    name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    path = cache / f"classifier-{name}.safetensors"
    if path.is_file():
        try:
            parts, about = load_checkpoint(path, ("model",))
            model = Classifier(len(train.classes), seed=None)
            model.load(parts["model"], str(path))
            return model, about["accuracy"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged or of other pictures; remove it, and it is trained anew") from e
    model = train_classifier(train)
    right = accuracy(model, test)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"model": model.state()}, {"accuracy": right, "classes": train.classes})
    except (OSError, UserError) as e:
        warnings.warn(f"the classifier is not kept, and trained anew the next time: {e}", UserNotice, stacklevel=2)
    return model, right


def _labels(data: Pictures) -> np.ndarray:
    assert data.labels is not None, "only a set with classes has a classifier"
    return data.labels
