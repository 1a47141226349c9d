"""Settings: dataclasses, presets in TOML, and overrides from the command line, each with one clear error."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from minidiff.data import DataConfig
from minidiff.errors import UserError
from minidiff.files import read_text
from minidiff.models import TextEncoderConfig, UNetConfig
from minidiff.optim import OPTIMIZERS
from minidiff.samplers import SAMPLERS
from minidiff.text_to_image import DiffusionConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained."""

    steps: int = field(default=10000, metadata={"help": "optimizer steps"})
    minutes: float = field(
        default=0.0,
        metadata={"help": "minutes of training in all; if not 0, they decide `steps`, once warm-up shows the speed"},
    )
    batch: int = field(default=64, metadata={"help": "images in one forward pass"})
    accumulate: int = field(default=1, metadata={"help": "forward passes whose gradients make one step"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon (for hidden layers, adamw for the rest)"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    warmup: int = field(default=100, metadata={"help": "steps over which the learning rate rises"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decay of matrices and kernels"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW's memory of the gradient"})
    beta2: float = field(default=0.99, metadata={"help": "AdamW's memory of the squared gradient"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of all gradients together"})
    ema_decay: float = field(default=0.999, metadata={"help": "decay of the parameters' moving average"})
    timesteps: str = field(
        default="uniform", metadata={"help": "how t is drawn: uniform, or logit_normal (more often at middling noise)"}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "logit_normal: t / T = sigmoid(mean + std * normal)"})
    logit_std: float = field(default=1.0, metadata={"help": "logit_normal: its standard deviation"})
    drop_caption: float = field(
        default=0.1, metadata={"help": "probability that a caption is replaced by the empty one"}
    )
    capture: bool = field(default=False, metadata={"help": "on a GPU: launch each pass whole, as one CUDA graph"})
    checkpointing: bool = field(default=False, metadata={"help": "less memory: recompute each block in backward"})
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda (with CuPy)"})
    seed: int = field(default=0, metadata={"help": "seed of parameters, data, noise and timesteps"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    sample_every: int = field(default=1000, metadata={"help": "steps between sample grids; 0: none"})

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"train.device: {self.device!r} is neither cpu nor cuda")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"train.optimizer: {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"train.timesteps: {self.timesteps!r} is neither uniform nor logit_normal")
        for name in ("steps", "batch", "accumulate", "warmup", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("minutes", "sample_every", "seed", "weight_decay", "logit_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("drop_caption", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.seed >= 2**64:
            raise ValueError(f"train.seed must be less than 2^64, got {self.seed}")


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn."""

    sampler: str = field(default="ddim", metadata={"help": f"one of {', '.join(SAMPLERS)}"})
    steps: int = field(default=50, metadata={"help": "sampling steps, 1..T"})
    guidance: float = field(default=1.5, metadata={"help": "guidance scale w: 1 is none, 0 ignores the caption"})
    eta: float = field(default=0.0, metadata={"help": "ddim: 0 deterministic .. 1 as much noise as ddpm"})
    sigma: str = field(
        default="small",
        metadata={"help": "ddpm: deviation of the fresh noise, small (posterior's) or large (beta's)"},
    )
    clip: bool = field(default=True, metadata={"help": "hold the predicted image within [-1, 1]"})
    rescale: float = field(
        default=0.0, metadata={"help": "0..1: how far a strongly guided answer is brought back to its size without"}
    )
    interval: tuple[float, ...] = field(
        default=(0.0, 1.0), metadata={"help": "LOW,HIGH: guidance only where t / T is within these"}
    )

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sample.sampler: {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"sample.steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta must be in 0..1, got {self.eta}")
        if self.sigma not in ("small", "large"):
            raise ValueError(f"sample.sigma: {self.sigma!r} is neither small nor large")
        if self.sampler != "ddim" and self.eta:
            raise ValueError(f"sample.eta is ddim's; {self.sampler} has none")
        if self.sampler != "ddpm" and self.sigma != "small":
            raise ValueError(f"sample.sigma is ddpm's; {self.sampler} has none")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"sample.rescale must be in 0..1, got {self.rescale}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"sample.interval must be two numbers, 0 <= low <= high <= 1, got {self.interval}")


@dataclass(frozen=True)
class Config:
    """Everything that a run is made from; saved beside it as config.toml."""

    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.sample.steps > self.diffusion.T:
            raise ValueError(f"sample.steps: the number of sampling steps must be in 1..{self.diffusion.T}")
        pixels = self.diffusion.patch * 2 ** (len(self.unet.channels) - 1)
        if self.data.size % pixels:
            raise ValueError(
                f"data.size: {self.data.size} pixels do not divide by {pixels}, which patches of "
                f"{self.diffusion.patch} and {len(self.unet.channels)} levels of the U-Net ask for"
            )


SECTIONS: dict[str, type] = {f.name: get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}


DECIDED = {"unet": ("in_channels", "out_channels", "text_width"), "text": ("vocabulary",)}
"""Sizes that are not chosen: a run's config records what they came to."""


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(p.name[:-5] for p in resources.files("minidiff.configs").iterdir() if p.name.endswith(".toml"))


def load_config(preset: str, overrides: dict[str, Any] | None = None) -> Config:
    """A preset's name, or the path of a TOML file, and overrides {"section.field": value} -> the resolved Config.

    Raises UserError on an unknown preset, section or field, and on a value that its field does not take. Given steps
    without minutes, the preset's minutes do not hold.
    """
    if preset in presets():
        text = resources.files("minidiff.configs").joinpath(f"{preset}.toml").read_text()
    elif preset.endswith(".toml") and Path(preset).is_file():
        text = read_text(Path(preset))
    else:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, presets())}; presets: {', '.join(presets())}")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{preset} is not valid TOML: {e}") from e
    return _overridden(tables, overrides or {}, preset)


def with_overrides(config: Config, overrides: dict[str, Any], source: str) -> Config:
    """The Config with {"section.field": value} in place of its own; raises UserError as `load_config` does."""
    return _overridden(config_to_dict(config), overrides, source)


def _overridden(tables: dict[str, Any], overrides: dict[str, Any], source: str) -> Config:
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if key in DECIDED.get(section, ()):
            raise UserError(f"{name} follows from the data and the other settings; leave it out")
        tables.setdefault(section, {})[key] = value
    if "train.steps" in overrides and "train.minutes" not in overrides:
        tables["train"]["minutes"] = 0.0
    config = config_from_dict(tables, source)
    if "train.steps" in overrides and config.train.minutes:
        raise UserError("give train.steps or train.minutes, not both")
    return config


def config_from_dict(tables: dict[str, Any], source: str) -> Config:
    """Nested tables {section: {field: value}} -> Config; raises UserError naming the source, section and field."""
    parts = {}
    for section, values in tables.items():
        if section not in SECTIONS:
            raise UserError(f"{source}: there is no section {section!r}{did_you_mean(section, list(SECTIONS))}")
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} must be a table of settings, got {values!r}")
        hints = get_type_hints(SECTIONS[section])
        converted = {}
        for key, value in values.items():
            if key not in hints:
                raise UserError(f"{source}: there is no setting {section}.{key}{did_you_mean(key, list(hints))}")
            converted[key] = _convert(value, hints[key], f"{source}: {section}.{key}")
        try:
            parts[section] = SECTIONS[section](**converted)
        except ValueError as e:
            raise UserError(f"{source}: {e}") from e
    try:
        return Config(**parts)
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e


def config_to_dict(config: Config) -> dict[str, Any]:
    """The Config as nested tables of plain values, as TOML and JSON take them."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def config_to_toml(config: Config) -> str:
    """The Config as a TOML file, which `load_config` reads."""
    return tomli_w.dumps(config_to_dict(config))


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A value from TOML, or a string from the command line, as the field's type."""
    if get_origin(kind) is tuple:
        items = [v.strip() for v in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{where} wants a list, got {value!r}")
        return tuple(_convert(item, get_args(kind)[0], where) for item in items)
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if kind in (int, float) and isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            raise UserError(f"{where} wants {wanted}, got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} wants a finite number, got {value}")
    if type(value) is not kind:
        raise UserError(f"{where} wants {wanted}, got {value!r}")
    return value


def did_you_mean(name: str, known: list[str]) -> str:
    """ " (did you mean ...?)" where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
