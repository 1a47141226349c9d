"""How a pretrained model's pictures are drawn: diffusers' scheduler_config.json in our terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from minidiff.backend import Array
from minidiff.errors import UserError
from minidiff.files import listed
from minidiff.schedule import (
    SPACINGS,
    Schedule,
    cosine,
    karras_levels,
    linear,
    scaled_linear,
    visited_timesteps,
    zero_terminal_snr,
)

V = TypeVar("V")

LEAST = 1e-12  # of signal and of noise, as shares of the variance: beyond it float32 divides by 0
SIGMA_SPACE = ("euler", "euler_a", "heun")  # diffusers walks these in x_t / sqrt(alpha_bar)
MULTISTEP = ("dpm++2m", "unipc")


@dataclass(frozen=True)
class Sampling:
    """How a pretrained model's pictures are drawn: what diffusers' scheduler_config.json says, in our terms."""

    schedule: Schedule
    prediction: str  # what the network predicts: eps, v or x0
    sampler: str
    spacing: str
    offset: int = 0  # of leading spacing
    karras: bool = False
    final: int = 0  # the t where a walk ends: 0 is the image, 1 the table's smallest noise
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)  # what else the sampler takes
    note: str = ""  # what was replaced by what, one sentence

    def timesteps(self, steps: int) -> list[float]:
        """The levels of a walk, falling, the end included, as diffusers' scheduler for this sampler spaces them.

        A level that it visits twice is here once, and one above T is T, so that there may be fewer than `steps` steps.
        ValueError for steps outside 1..T, and where no step is left.
        """
        T, level = self.schedule.T, self.schedule.noise_level
        t = visited_timesteps(T, steps, self.spacing, self.offset, left_out=int(self.sampler in MULTISTEP))
        if self.sampler not in SIGMA_SPACE:
            t = 1 + np.round(t - 1)
        t = np.minimum(t, T)
        sigma = np.interp(t, np.arange(T + 1), level)  # diffusers interpolates the level itself, not its logarithm
        if self.karras:
            ends = level[[-1, 1]] if self.sampler in MULTISTEP else sigma[[0, -1]]
            high, low = np.minimum(ends, 2.0**12)  # diffusers' largest, where it is infinite
            sigma = karras_levels(high, low, steps)
        t = np.where((t == np.round(t)) & (not self.karras), t, np.round(self.schedule.t_at(sigma), 9))
        visited = sorted({float(v) for v in t if v > self.final}, reverse=True)
        if not visited:
            raise ValueError(f"{steps} step of {self.spacing} spacing begins where it ends; take more steps")
        return [*visited, self.final]

    def start(self, noise: Array, timesteps: list[float]) -> Array:
        """x_T from standard normal noise like it; in sigma space diffusers starts from sigma eps, a little smaller."""
        if self.sampler not in SIGMA_SPACE or self.spacing == "leading":
            return noise
        return noise * float(np.sqrt(1 - self.schedule.alpha_bar_at(timesteps[0])))


# ---- the file

SAMPLER_OF = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
}
REPLACED = {
    "PNDMScheduler": "dpm++2m",
    "LMSDiscreteScheduler": "dpm++2m",
    "DEISMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2m",
    "KDPM2DiscreteScheduler": "dpm++2m",
    "KDPM2AncestralDiscreteScheduler": "euler_a",
    "DPMSolverSDEScheduler": "euler_a",
}
"""Classes that are not here, and the sampler that walks the same path, or adds noise as they do."""
KNOWN = SAMPLER_OF | REPLACED
OTHER_BETAS = (
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
)  # fmt: skip
"""Where a file without betas means Stable Diffusion's."""

READ = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type",
    "use_karras_sigmas", "clip_sample", "clip_sample_range", "variance_type",
)  # fmt: skip
WITHOUT_EFFECT = (
    "skip_prk_steps", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type",
    "tensor_format",
)  # fmt: skip
EVERY = tuple(SAMPLER_OF.values())


def _for(samplers: tuple[str, ...], *can: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(samplers, can)


ONLY: dict[str, dict[str, tuple[Any, ...]]] = {  # key: {whose sampler's result it changes: the values that ours can}
    "predict_epsilon": _for(EVERY, True),
    "denoise_final": _for(EVERY, True),
    "variance_type": _for(EVERY, "fixed_small", "fixed_small_log", "fixed_large"),
    "thresholding": _for(("ddpm", "ddim", *MULTISTEP), False),
    "interpolation_type": _for(("euler",), "linear"),
    "timestep_type": _for(("euler",), "discrete"),
    "use_exponential_sigmas": _for(("euler", "heun", *MULTISTEP), False),
    "use_beta_sigmas": _for(("euler", "heun", *MULTISTEP), False),
    "sigma_min": _for(("euler", "unipc")),
    "sigma_max": _for(("euler", "unipc")),
    "solver_order": _for(MULTISTEP, 2),
    "lower_order_final": _for(MULTISTEP, True),
    "use_flow_sigmas": _for(MULTISTEP, False),
    "use_dynamic_shifting": _for(MULTISTEP, False),
    "algorithm_type": _for(("dpm++2m",), "dpmsolver++", "deis"),
    "solver_type": {  # of another scheduler's names diffusers makes its own usual one, the first here
        "dpm++2m": ("midpoint", "logrho", "bh1", "bh2"),
        "unipc": ("bh2", "midpoint", "heun", "logrho"),
    },
    "euler_at_final": _for(("dpm++2m",), False),
    "use_lu_lambdas": _for(("dpm++2m",), False),
    "lambda_min_clipped": _for(("dpm++2m",), -math.inf, "-inf"),
    "predict_x0": _for(("unipc",), True),
    "disable_corrector": _for(("unipc",), []),
    "solver_p": _for(("unipc",)),
    "shift_terminal": _for(("unipc",)),
}


def read_scheduler(config: Mapping[str, Any], sampler: str | None = None) -> Sampling:
    """Diffusers' scheduler_config.json, as a dict -> Sampling; `sampler` takes the place of the config's own.

    What the file leaves open is as diffusers' scheduler for that sampler has it. A class that is not here is replaced,
    with a note, whatever its own solver's settings. Raises UserError for a class that has nothing like it, for values
    that make no sense, and, by name, for keys that would change the result in unknown ways.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KNOWN:
        raise UserError(f"scheduler_config.json: {name!r:.80} is not one of {', '.join(KNOWN)}")
    note = ""
    if sampler is None:
        sampler = KNOWN[name]
        note = f"{name} is not here; {sampler} draws in its place" if name in REPLACED else ""
    elif sampler not in EVERY:
        raise UserError(f"sampler: {sampler!r} is not one of {', '.join(EVERY)}")
    _refuse_others(config, sampler, bool(note))
    prediction = _choice(config, "prediction_type", "epsilon", {"epsilon": "eps", "v_prediction": "v", "sample": "x0"})
    schedule = _schedule(config, (0.00085, 0.012) if name in OTHER_BETAS else (0.0001, 0.02))
    if prediction == "eps" and schedule.alpha_bar[-1] == 0:
        raise UserError(
            "scheduler_config.json: a noise schedule that ends in noise alone (rescale_betas_zero_snr) needs "
            "prediction_type v_prediction or sample, not epsilon"
        )
    offset, limit = _value(config, "steps_offset", 0, int), _value(config, "clip_sample_range", 1.0, float)
    if not 0 <= offset < schedule.T or not limit > 0:
        raise UserError(
            f"scheduler_config.json: steps_offset should be in 0..{schedule.T - 1} and clip_sample_range above 0, got "
            f"{offset} and {limit}"
        )
    clips = sampler in ("ddpm", "ddim", "heun") and _value(config, "clip_sample", sampler != "heun", bool)
    karras = sampler in ("euler", "heun", *MULTISTEP) and _value(config, "use_karras_sigmas", False, bool)
    spacing = "leading" if sampler in ("ddpm", "ddim") else "linspace"
    return Sampling(
        schedule,
        prediction,
        sampler,
        _choice(config, "timestep_spacing", spacing, {s: s for s in SPACINGS}),
        offset,
        karras,
        _final(config, sampler),
        limit if clips else None,
        {"sigma_kind": "large"} if sampler == "ddpm" and config.get("variance_type") == "fixed_large" else {},
        note,
    )


def _refuse_others(config: Mapping[str, Any], sampler: str, replaced: bool) -> None:
    others = []
    for key, value in config.items():
        if value is None or key.startswith("_") or key in WITHOUT_EFFECT:
            continue
        changes = ONLY.get(key, {} if key in READ else {sampler: ()})
        if replaced and key in ONLY and "ddpm" not in changes:  # of the solver that does not draw
            continue
        if sampler in changes and value not in changes[sampler]:
            others.append(f"{key} = {value!r:.80}")
    if others:
        raise UserError(
            f"scheduler_config.json: with these minidiff's {sampler} would give other pictures: {listed(others)}; "
            "name another sampler"
        )


def _schedule(config: Mapping[str, Any], first_and_last_beta: tuple[float, float]) -> Schedule:
    T, betas = _value(config, "num_train_timesteps", 1000, int), config.get("trained_betas")
    keys = ("beta_start", "beta_end")
    ends = [_value(config, key, beta, float) for key, beta in zip(keys, first_and_last_beta, strict=True)]
    if not all(0 < beta < 1 for beta in ends):
        raise UserError(f"scheduler_config.json: beta_start and beta_end should be between 0 and 1, got {ends}")
    if not 1 <= T <= 10**6:
        raise UserError(f"scheduler_config.json: num_train_timesteps should be in 1..1000000, got {T}")
    makers: dict[str, Callable[..., Schedule]] = {
        "linear": linear,
        "scaled_linear": scaled_linear,
        "squaredcos_cap_v2": lambda T, *_: cosine(T),
    }
    make = _choice(config, "beta_schedule", "linear", makers)
    rescale = _value(config, "rescale_betas_zero_snr", False, bool)
    try:
        schedule = make(T, *ends) if betas is None else Schedule(np.asarray(betas, np.float64))
        if schedule.T != T:
            raise ValueError(f"num_train_timesteps is {T}, but there are {schedule.T} trained_betas")
    except (ValueError, TypeError, OverflowError) as e:
        raise UserError(f"scheduler_config.json: {e}") from e
    first, last = schedule.alpha_bar[[1, -1]]
    if not (first <= 1 - LEAST and last >= LEAST):
        raise UserError(
            f"scheduler_config.json: the betas should leave some of the image and make some noise; alpha_bar goes from "
            f"{first:g} to {last:g}"
        )
    return zero_terminal_snr(schedule) if rescale else schedule


def _final(config: Mapping[str, Any], sampler: str) -> int:
    if sampler == "ddim":
        return 0 if _value(config, "set_alpha_to_one", True, bool) else 1
    if sampler in ("euler", *MULTISTEP):
        return _choice(config, "final_sigmas_type", "zero", {"zero": 0, "sigma_min": 1})
    return 0


def _value(config: Mapping[str, Any], key: str, default: V, kind: type[V]) -> V:
    value = default if config.get(key) is None else config[key]
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UserError(f"scheduler_config.json: {key} should be {wanted}, got {value!r:.80}")
    return value


def _choice(config: Mapping[str, Any], key: str, default: str, choices: Mapping[str, V]) -> V:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"scheduler_config.json: {key} should be one of {', '.join(choices)}, got {value!r:.80}")
    return choices[value]
