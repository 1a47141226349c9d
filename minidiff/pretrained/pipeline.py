"""A pretrained model with all its parts: words in, pictures out.

    prompt -> tokenizer -> ids -> text encoder -> tokens ┐
                                     noise -> x_T -> U-Net, step by step -> latents -> VAE -> picture

Rombach et al. 2022, arXiv 2112.10752. `load_pipeline` reads Stable Diffusion 1 and 2, the pixel models of Ho et al.
2020 (DDPM), and what `minidiff export` writes, all in diffusers' layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from minidiff import plotting
from minidiff.backend import Array, array_module, device_module, to_numpy
from minidiff.diffusion import Guidance
from minidiff.errors import UserError, UserNotice
from minidiff.files import listed, read_json
from minidiff.models import VAE, TextEncoder, UNet
from minidiff.pretrained.configs import text_config, unet_config, vae_config
from minidiff.pretrained.scheduler import Sampling, read_scheduler
from minidiff.pretrained.weights import clip_keys, current_keys, load_weights, open_weights
from minidiff.pretrained.words import word_tokenizer
from minidiff.random import Draw, Purpose, normal
from minidiff.samplers import SAMPLERS, Noise, SamplerStep
from minidiff.tensor import as_array, no_grad
from minidiff.text import CLIPTokenizer, WordTokenizer
from minidiff.text_to_image import depth_to_space

UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
OURS = "MinidiffPipeline"
PIPELINES = ("StableDiffusionPipeline", *UNCONDITIONAL, OURS)
"""The _class_name of a model_index.json."""
LARGEST = 2**14  # pixels a side
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class Pipeline:
    """The parts of a pretrained model; call it to draw.

    vae: None where the U-Net draws pixels, patch x patch of them as the channels of one position.
    text_encoder, tokenizer: None where it knows no words.
    scheduler: diffusers' scheduler_config.json, as a dict; the sampler is made of it at every call.
    size: height and width of a picture, in pixels, unless the call says otherwise; None where the folder does not say.
    steps, guidance: likewise.
    masked: whether the U-Net is kept from looking at padding. Stable Diffusion's was trained to look at it.
    """

    unet: UNet
    scheduler: dict[str, Any]
    size: tuple[int, int] | None
    text_encoder: TextEncoder | None = None
    tokenizer: CLIPTokenizer | WordTokenizer | None = None
    vae: VAE | None = None
    patch: int = 1
    masked: bool = False
    steps: int = 20
    guidance: float = 7.5

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        steps: int | None = None,
        guidance: float | Guidance | None = None,
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        sampler: str | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        count: int = 1,
        latents: Array | None = None,
        noise: Noise | None = None,
        eta: float = 0.0,
        first: int = 0,
        output: Literal["image", "array", "latent"] = "image",
        progress: bool | None = None,
    ) -> list[Image.Image] | np.ndarray:
        """Draw `count` pictures of each prompt; the arguments up to `first` are those of `denoise`.

        output: "image" gives Pillow images, "array" float32 (B, H, W, 3), nominally in [-1, 1], "latent" what the last
        step gives, float32 (B, h, w, c). progress: a bar on stderr; None: where that is a terminal.
        """
        if output not in ("image", "array", "latent"):
            raise ValueError(f"output must be image, array or latent, got {output!r}")
        walk = self.denoise(
            prompt, steps, guidance, negative_prompt, seed, sampler, size, count=count, latents=latents, noise=noise,
            eta=eta, first=first,
        )  # fmt: skip
        if output == "latent":
            return to_numpy(_last(walk, progress))
        images = self.draw(walk, progress)
        return images if output == "array" else [Image.fromarray(image) for image in plotting.to_uint8(images)]

    def draw(self, walk: Walk, progress: bool | None = None) -> np.ndarray:
        """Images float32 (B, H, W, 3), nominally in [-1, 1], of what the walk ends with."""
        return self.decode(_last(walk, progress))

    def denoise(
        self,
        prompt: str | Sequence[str] = "",
        steps: int | None = None,
        guidance: float | Guidance | None = None,
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        sampler: str | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        count: int = 1,
        latents: Array | None = None,
        noise: Noise | None = None,
        eta: float = 0.0,
        first: int = 0,
    ) -> Walk:
        """Walk from noise to latents, yielding every step; `decode` turns any of its arrays into images.

        prompt: one or several; several are drawn together, in one batch. steps, guidance: None is the pipeline's own,
        20 and 7.5 unless the folder says otherwise. guidance: w, or a `Guidance` with rescaling or an interval of t; 1
        is none. negative_prompt: what stands in place of no text, one or one for each prompt. sampler: one of
        `SAMPLERS`; None is the folder's own. size: the pictures' side, or (height, width), in pixels.
        latents: the starting noise (B, h, w, c), standard normal, B = prompts times count; sample i is otherwise drawn
        from (seed, first + i), whatever else is in the batch: parts of a large batch, drawn one after the other, give
        the same pictures. noise(i): what a stochastic sampler adds at step i, shaped like the latents. eta: ddim's
        noise, 0..1.
        Raises UserError for what does not fit the model, before anything is computed. Warns of words that are cut off.
        """
        sampling, timesteps = self._sampling(sampler, self.steps if steps is None else steps)
        guidance = self.guidance if guidance is None else guidance
        if not isinstance(guidance, Guidance) and not _finite(guidance):
            raise UserError(f"guidance must be a number or a Guidance, got {guidance!r:.40}")
        if eta and sampling.sampler != "ddim":
            raise UserError(f"eta is ddim's; {sampling.sampler} has none")
        if not (_finite(eta) and 0 <= eta <= 1):
            raise UserError(f"eta must be in 0..1, got {eta!r:.40}")
        if not (_whole(seed) and 0 <= seed < 2**64):
            raise UserError(f"the seed must be in 0..2^64 - 1, got {seed!r:.40}")
        prompts = self._texts(prompt)
        if not (_whole(first) and first >= 0):
            raise UserError(f"first, a sample's number, must not be negative, got {first!r:.40}")
        if not _whole(count) or count < 1 or not prompts:
            raise UserError(f"nothing to draw: {len(prompts)} prompts, {count} times")
        negatives = self._negatives(negative_prompt, len(prompts), count)
        prompts = [text for text in prompts for _ in range(count)]
        shape = (len(prompts), *self._latent_shape(size, latents))
        samples = range(first, first + len(prompts))
        x_T = self._noise(latents, seed, samples, shape)
        cond = uncond = None
        if self.text_encoder is not None:
            cond, uncond = self.condition(prompts), self.condition(negatives)
        options = sampling.options | ({"eta": eta} if eta else {})
        walk = SAMPLERS[sampling.sampler](
            _Network(self.unet), sampling.start(x_T, timesteps), cond, uncond,
            guidance if cond is not None else 1.0, timesteps, sampling.schedule,
            (lambda i: Draw(seed, samples, i + 1, Purpose.STEP_NOISE)) if noise is None
            else (lambda i: self._given(noise(i), shape, "noise")),
            clip=sampling.clip, prediction=sampling.prediction, **options,
        )  # fmt: skip
        return Walk(walk, len(timesteps) - 1)

    def condition(self, texts: Sequence[str]) -> tuple[Array, Array | None]:
        """Texts -> cond = (tokens (B, L, D), mask (B, L) or None) for the U-Net; equal texts are encoded once."""
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this model knows no words: it draws without a prompt")
        different = list(dict.fromkeys(texts))
        ids, mask = self.tokenizer(different, self.text_encoder.config.context)
        xp, rows = self.array_module, [different.index(text) for text in texts]
        with no_grad():
            tokens = self.text_encoder(xp.asarray(ids)).data[rows]
        return tokens, xp.asarray(mask[rows]) if self.masked else None

    def decode(self, latents: Array) -> np.ndarray:
        """Latents (B, h, w, c) -> images, float32 (B, H, W, 3), nominally in [-1, 1]; one after the other."""
        if self.vae is None:
            return to_numpy(depth_to_space(latents, self.patch))
        with no_grad():
            return np.concatenate([to_numpy(self.vae.decode(latents[i : i + 1]).data) for i in range(len(latents))])

    def to(self, device: str) -> Pipeline:
        """Move the weights to "cpu" or "cuda"; returns the pipeline."""
        for part in (self.unet, self.text_encoder, self.vae):
            if part is not None:
                part.to(device)
        return self

    @property
    def array_module(self) -> ModuleType:
        """numpy or cupy: where the weights are."""
        return array_module(self.unet.conv_in.weight.data)

    @property
    def stride(self) -> int:
        """What the height and width of a picture must divide by, in pixels."""
        return self._pixels * 2 ** (len(self.unet.config.channels) - 1)

    @property
    def _pixels(self) -> int:
        """Pixels, in height and in width, that are one position of the latents."""
        return self.patch if self.vae is None else self.vae.config.stride

    def _sampling(self, sampler: str | None, steps: int) -> tuple[Sampling, list[float]]:
        sampling = read_scheduler(self.scheduler, sampler)
        if sampling.note:
            warnings.warn(sampling.note, UserNotice, stacklevel=4)
        if not _whole(steps):
            raise UserError(f"steps must be a whole number, got {steps!r:.40}")
        try:
            return sampling, sampling.timesteps(int(steps))
        except ValueError as e:
            raise UserError(str(e)) from e

    def _texts(self, prompt: str | Sequence[str]) -> list[str]:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.text_encoder is None and any(texts):
            raise UserError("this model knows no words: it draws without a prompt")
        if isinstance(self.tokenizer, WordTokenizer):
            unknown = [word for text in texts for word in self.tokenizer.unknown(text)]
            if unknown:
                raise UserError(f"this model does not know {listed(list(map(repr, unknown)))}")
        return texts

    def _negatives(self, negative: str | Sequence[str], prompts: int, count: int) -> list[str]:
        texts = self._texts(negative)
        if len(texts) not in (1, prompts):
            raise UserError(f"give one negative prompt, or one for each prompt; got {len(texts)} for {prompts}")
        return [text for text in texts for _ in range(count * prompts // len(texts))]

    def _latent_shape(self, size: int | tuple[int, int] | None, latents: Array | None) -> tuple[int, int, int]:
        if latents is not None:
            if size is not None:
                raise UserError("give the size or the latents, not both: the latents have a size")
            if getattr(latents, "ndim", None) != 4:
                raise UserError(f"latents must be an array (B, h, w, c), got {_about(latents)}")
            H, W = (n * self._pixels for n in latents.shape[1:3])
        else:
            sides = self.size if size is None else size
            H, W = sides if isinstance(sides, (tuple, list)) and len(sides) == 2 else (sides, sides)
            if not (_whole(H) and _whole(W)):
                told = "the folder does not say how large its pictures are: give a size" if sides is None else (
                    f"size must be pixels, one number or (height, width), got {sides!r:.40}"
                )  # fmt: skip
                raise UserError(told)
        stride = self.stride
        if max(H, W) > LARGEST:
            raise UserError(f"sizes go up to {LARGEST} pixels a side, got {H}x{W}")
        if H < 1 or W < 1 or H % stride or W % stride:
            near = [max(1, round(n / stride)) * stride for n in (H, W)]
            raise UserError(
                f"this model draws sizes that divide by {stride}, got {H}x{W} (height x width); try {near[0]}x{near[1]}"
            )
        return H // self._pixels, W // self._pixels, self.unet.config.in_channels

    def _noise(self, latents: Array | None, seed: int, samples: range, shape: tuple[int, ...]) -> Array:
        if latents is None:
            return self.array_module.asarray(normal(seed, samples, 0, Purpose.START_NOISE, shape[1:]))
        return self._given(latents, shape, "latents")

    def _given(self, array: Any, shape: tuple[int, ...], name: str) -> Array:
        if getattr(array, "shape", None) != shape:
            raise UserError(f"{name} must be (B, h, w, c) = {shape} for these prompts, got {_about(array)}")
        return self.array_module.asarray(array, dtype=np.float32)


def _about(value: Any) -> str:
    return str(getattr(value, "shape", type(value).__name__))


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(np.isfinite(float(value)))


class Walk(Iterator[SamplerStep]):
    """A sampler's steps, one after the other; its length is how many there are in all."""

    def __init__(self, walk: Iterator[SamplerStep], steps: int):
        self._walk, self._steps = walk, steps

    def __next__(self) -> SamplerStep:
        return next(self._walk)

    def __len__(self) -> int:
        return self._steps


def _last(walk: Walk, progress: bool | None) -> Array:
    """The latents that a walk ends with; progress: a bar on stderr, None: where that is a terminal."""
    for step in tqdm(walk, unit="step", disable=None if progress is None else not progress):
        latents = step.x_prev
    return latents


class _Network:
    """A U-Net as samplers call their model: arrays in, arrays out."""

    def __init__(self, unet: UNet):
        self.unet, self.prepare = unet, unet.prepare

    def __call__(self, x_t: Array, t: Array, cond: Any) -> Array:
        return as_array(self.unet(x_t, t, cond))


# ---- from a folder


def load_pipeline(folder: str | Path, device: str = "cpu") -> Pipeline:
    """A diffusers folder (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/) -> Pipeline.

    The weights may be float32, float16 or bfloat16, in one file or in shards; they become float32. Raises UserError,
    one sentence naming the file, for what is missing, damaged, unknown or does not fit together.
    """
    folder = Path(folder)
    try:
        device_module(device)
    except ValueError as e:
        raise UserError(str(e)) from e
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a model in diffusers' layout, with a model_index.json")
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{folder}/model_index.json: minidiff has no {kind!r}, only {', '.join(PIPELINES)}")
    parts = ["unet", "scheduler"]
    parts += [] if kind in UNCONDITIONAL else ["text_encoder", "tokenizer"]
    parts += ["vae"] if kind == "StableDiffusionPipeline" else []
    _check_index(index, parts, folder)
    if kind not in UNCONDITIONAL:
        _check_folders(folder, parts)

    unet, unet_file = _unet(folder, kind not in UNCONDITIONAL)
    text_encoder = tokenizer = vae = None
    if "text_encoder" in parts:
        text_encoder = _text_encoder(folder, unet)
        tokenizer = _tokenizer(_part(folder, "tokenizer"), text_encoder)
    if "vae" in parts:
        vae = _vae(folder, unet)
    elif unet.config.in_channels != unet.config.out_channels:
        channels = f"{unet.config.in_channels} channels in and {unet.config.out_channels} out"
        raise UserError(f"{folder}: the U-Net has {channels}; one that also predicts a variance is not supported")
    patch = index.get("patch", 1) if kind == OURS else 1
    if type(patch) is not int or patch < 1 or unet.config.in_channels % patch**2:
        raise UserError(f"{folder}/model_index.json: patch cannot be {patch!r:.40}")
    pipeline = Pipeline(
        unet, read_json(_part(folder, "scheduler") / "scheduler_config.json"), None, text_encoder, tokenizer, vae,
        patch, masked=kind == OURS, **(_settings(index, folder) if kind == OURS else {}),
    )  # fmt: skip
    pipeline.size = _size(read_json(unet_file), unet_file, pipeline._pixels)
    read_scheduler(pipeline.scheduler, "euler_a")  # what no sampler can do without; the rest where one is chosen
    return pipeline.to(device)


def _settings(index: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What our own folders say of how to draw."""
    said = index.get("sample", {})
    steps, guidance = (said.get("steps", 20), said.get("guidance", 7.5)) if isinstance(said, dict) else (0, 0)
    if not _whole(steps) or steps < 1 or not _finite(guidance):
        raise UserError(f"{folder}/model_index.json: sample should hold steps and guidance, not {said!r:.80}")
    return {"steps": steps, "guidance": float(guidance)}


def _check_index(index: dict[str, Any], parts: list[str], folder: Path) -> None:
    named = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    missing, more = sorted(set(parts) - named), sorted(named - {*parts, *NOT_NEEDED})
    if missing:
        raise UserError(f"{folder}/model_index.json names no {listed(missing)}")
    if more:
        raise UserError(f"{folder}/model_index.json names {listed(more)}, of which minidiff knows nothing")


def _check_folders(folder: Path, parts: list[str]) -> None:
    missing = [f"{name}/" for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder} has no {listed(missing)}; download the folder again, all of it")


def _part(folder: Path, name: str) -> Path:
    """The folder of a part; models of pixels may have its files beside model_index.json."""
    return folder / name if (folder / name).is_dir() else folder


def _unet(folder: Path, conditional: bool) -> tuple[UNet, Path]:
    place = _part(folder, "unet")
    file = place / "config.json"
    config = read_json(file)
    ours = unet_config(config, str(file))
    if conditional != ("cross" in (*ours.attention, ours.mid_attention)):
        raise UserError(f"{file}: the U-Net is {config.get('_class_name')!r:.40}, which does not fit model_index.json")
    unet = UNet(ours, seed=None)
    load_weights(unet, current_keys(open_weights(place, "diffusion_pytorch_model")), str(place))
    return unet, file


def _text_encoder(folder: Path, unet: UNet) -> TextEncoder:
    place = _part(folder, "text_encoder")
    config = text_config(read_json(place / "config.json"), f"{place}/config.json")
    if config.width != unet.config.text_width:
        raise UserError(
            f"{folder}: the text encoder's tokens are {config.width} wide, the U-Net wants {unet.config.text_width}"
        )
    text_encoder = TextEncoder(config, seed=None)
    load_weights(text_encoder, clip_keys(open_weights(place, "model")), str(place))
    return text_encoder


def _tokenizer(place: Path, text_encoder: TextEncoder) -> CLIPTokenizer | WordTokenizer:
    tokenizer = word_tokenizer(place) or CLIPTokenizer.from_folder(place)
    highest, rows = max(tokenizer.ids.values()), text_encoder.config.vocabulary
    if highest >= rows:
        raise UserError(f"{place}: the tokenizer has an id {highest}, but the text encoder only {rows} tokens")
    return tokenizer


def _vae(folder: Path, unet: UNet) -> VAE:
    place = _part(folder, "vae")
    config = vae_config(read_json(place / "config.json"), f"{place}/config.json")
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels != (config.latent_channels,) * 2:
        raise UserError(
            f"{folder}: the U-Net has {channels[0]} channels in and {channels[1]} out, the VAE's latents "
            f"{config.latent_channels}; models that see a picture or a mask beside the noise are not supported"
        )
    vae = VAE(config, seed=None)
    load_weights(vae, current_keys(open_weights(place, "diffusion_pytorch_model")), str(place))
    return vae


def _size(config: dict[str, Any], file: Path, pixels: int) -> tuple[int, int] | None:
    size = config.get("sample_size")
    if size is None:
        return None
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or any(type(n) is not int or not 1 <= n * pixels <= LARGEST for n in sides):
        raise UserError(
            f"{file}: sample_size should be a whole number or two, up to {LARGEST} pixels, got {size!r:.40}"
        )
    return sides[0] * pixels, sides[1] * pixels
