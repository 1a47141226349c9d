"""Drawing pictures: captions in, images out, each a pure function of (seed, sample number, settings)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff import plotting
from minidiff.backend import to_numpy
from minidiff.config import SampleConfig
from minidiff.diffusion import Guidance
from minidiff.errors import UserError
from minidiff.files import whole_file, whole_folder
from minidiff.random import Draw, Purpose, normal
from minidiff.samplers import SAMPLERS, SamplerStep, spaced_timesteps
from minidiff.tensor import no_grad
from minidiff.text_to_image import TextToImage
from minidiff.threads import num_workers, parallel_map


def denoise(
    model: TextToImage, captions: Sequence[str], settings: SampleConfig, seed: int = 0, first: int = 0
) -> Iterator[SamplerStep]:
    """Walk from noise to one image a caption, yielding every step; `model.decode` turns its arrays into images.

    The starting noise of sample i is that of number first + i: it does not depend on the others in the batch.
    """
    try:
        timesteps = spaced_timesteps(model.schedule.T, settings.steps)
    except ValueError as e:
        raise UserError(f"sample.steps: {e}") from e
    samples = range(first, first + len(captions))
    xp = model.array_module
    x_T = xp.asarray(normal(seed, samples, 0, Purpose.START_NOISE, model.latent_shape))
    with no_grad():
        tokens, mask = model.condition(captions)
        empty, empty_mask = model.condition([""] * len(captions))
    cond, uncond = (tokens.data, mask), (empty.data, empty_mask)

    def noise(i: int) -> Draw:
        return Draw(seed, samples, i + 1, Purpose.STEP_NOISE)

    walk = (model, x_T, cond, uncond, guidance(settings, model.schedule.T), timesteps, model.schedule, noise)
    its_own: dict[str, dict[str, Any]] = {"ddpm": {"sigma_kind": settings.sigma}, "ddim": {"eta": settings.eta}}
    return SAMPLERS[settings.sampler](*walk, clip=1.0 if settings.clip else None, **its_own.get(settings.sampler, {}))


def guidance(settings: SampleConfig, T: int) -> float | Guidance:
    """What the settings say of guidance; a plain number where that is all."""
    low, high = settings.interval
    if settings.rescale == 0 and (low, high) == (0, 1):
        return settings.guidance
    return Guidance(settings.guidance, settings.rescale, (low * T, high * T))


def draw(
    model: TextToImage, captions: Sequence[str], settings: SampleConfig, seed: int = 0, batch: int = 64
) -> np.ndarray:
    """One image a caption, float32 (n, H, W, C), nominally in [-1, 1]."""

    def draw_batch(first: int) -> np.ndarray:
        *_, last = denoise(model, captions[first : first + batch], settings, seed, first)
        return to_numpy(model.decode(last.x_prev))

    threads = num_workers(model.array_module)
    return np.concatenate(list(parallel_map(draw_batch, range(0, len(captions), batch), threads)))


def save_pictures(images: np.ndarray, captions: Sequence[str], out: Path, facts: Mapping[str, object]) -> None:
    """One labelled grid (out is a .png file), or a folder of separate PNGs; facts and captions in their metadata.

    The folder appears under its name only when it is complete.
    """
    if out.suffix == ".png":
        text = {"prompt": "; ".join(captions), **{key: str(value) for key, value in facts.items()}}
        plotting.save(plotting.image_grid(images, list(captions)), out, text)
        return
    with whole_folder(out) as folder:
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            save_picture(image, folder / f"{i:04d}.png", {"prompt": caption, "sample": i, **facts})


def save_picture(image: np.ndarray, out: Path, about: dict[str, object]) -> None:
    """One image (H, W, C) in [-1, 1] as a PNG, pixel for pixel, with facts in its metadata."""
    text = PngInfo()
    for key, value in about.items():
        text.add_itxt(key, str(value))
    picture = Image.fromarray(plotting.to_uint8(image))
    with whole_file(out) as file:
        picture.save(file, format="png", pnginfo=text)
