"""The equations of diffusion, each once, in the papers' symbols. They take t and eps as arguments.

Shapes: images x0, x_t and noise eps are (B, H, W, C) or any (B, ...); t is a number in 0..T or an array (B,) of them;
between the whole numbers lie the levels that `Schedule.alpha_bar_at` interpolates. `t_prev=None` means t - 1; any
smaller t_prev gives the same equation over a longer step, with alpha = alpha_bar[t] / alpha_bar[t_prev] and
beta = 1 - alpha.

DDPM: Ho et al. 2020, arXiv 2006.11239. DDIM: Song et al. 2020, arXiv 2010.02502. v: Salimans and Ho 2022, arXiv
2202.00512. Guidance: Ho and Salimans 2022, arXiv 2207.12598.

Where alpha_bar_T = 0 (`schedule.zero_terminal_snr`), eps says nothing of x0: what divides by sqrt(alpha_bar) raises a
ValueError, and x0 comes from v or x0 itself (`x0_from_prediction`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minidiff import ops
from minidiff.backend import Array, array_module, kernel
from minidiff.random import Draw, normal
from minidiff.schedule import Schedule, per_sample
from minidiff.tensor import Tensor, as_array, no_grad

Model = Callable[[Array, Array, Any], Any]  # model(x_t, t, cond) -> eps_theta (a sampler may be told: v or x0)
PREDICTIONS = ("eps", "v", "x0")


# ---- forward: from the image to noise


def q_step(x_prev: Array, t: Array, eps: Array, schedule: Schedule, t_prev: Array | None = None) -> Array:
    """One step of the forward process: x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I). DDPM, equation 2.
    """
    beta, alpha, _, _ = schedule.between(t, t_prev)
    return per_sample(np.sqrt(alpha), x_prev) * x_prev + per_sample(np.sqrt(beta), x_prev) * eps


def q_sample(x0: Array, t: Array, eps: Array, schedule: Schedule) -> Array:
    """The jump to any t: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

    q(x_t | x0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I). DDPM, equation 4.
    """
    alpha_bar = schedule.alpha_bar_at(t)
    return per_sample(np.sqrt(alpha_bar), x0) * x0 + per_sample(np.sqrt(1 - alpha_bar), x0) * eps


# ---- training


def noised(x0: Array, t: Array, eps: Array | Draw, schedule: Schedule, prediction: str) -> tuple[Array, Array]:
    """What a training step begins with: x_t, and the target that the network is asked for.

    eps: the noise like x0, or which noise is to be drawn.
    """
    if not isinstance(eps, Draw):
        return q_sample(x0, t, eps, schedule), training_target(x0, t, eps, schedule, prediction)
    xp, alpha_bar = array_module(x0), schedule.alpha_bar_at(t)
    signal, noise = (xp.asarray(np.sqrt(level).astype(x0.dtype)) for level in (alpha_bar, 1 - alpha_bar))
    x_t, target = q_sample_drawn(x0, signal, noise, prediction, eps)
    return x_t, x0 if target is None else target


@kernel
def q_sample_drawn(x0: Array, signal: Array, noise: Array, prediction: str, draw: Draw) -> tuple[Array, Array | None]:
    """`q_sample` and `training_target` of drawn noise in one pass: (x_t, target), None for the target x0.

    signal = sqrt(alpha_bar_t) and noise = sqrt(1 - alpha_bar_t) are (B,).
    """
    eps = normal(*draw, x0.shape[1:], x0)
    s, n = per_sample(signal, x0), per_sample(noise, x0)
    return s * x0 + n * eps, {"eps": eps, "v": s * eps - n * x0, "x0": None}[prediction]


def training_target(x0: Array, t: Array, eps: Array, schedule: Schedule, prediction: str) -> Array:
    """What the network is asked for: eps, x0, or v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    _check_is_v(prediction)
    alpha_bar = schedule.alpha_bar_at(t)
    return per_sample(np.sqrt(alpha_bar), x0) * eps - per_sample(np.sqrt(1 - alpha_bar), x0) * x0


def weighted_mse(answer: Tensor, target: Array, weight: Array | None) -> Tensor:
    """The mean over all elements of weight (answer - target)^2; weight: one factor a sample (B,), None for 1."""
    if weight is None:
        return ops.mse(answer, target)
    root = per_sample(array_module(weight).sqrt(weight), target)
    return ops.mse(answer * root, target * root)


def x0_loss_weight(t: Array, schedule: Schedule, limit: float) -> np.ndarray:
    """min(1 + SNR_t, limit), SNR_t = alpha_bar_t / (1 - alpha_bar_t): the weight that makes an x0-loss a v-loss.

    || v - v_theta ||^2 = (1 + SNR) || x0 - x0_theta ||^2: fine detail, which is decided at little noise, counts more.
    The limit keeps the cleanest images from drowning the others. Salimans and Ho 2022, arXiv 2202.00512, section 4;
    a limit on the weight as in Hang et al. 2023, arXiv 2303.09556.
    """
    alpha_bar = schedule.alpha_bar_at(t)
    return 1 / np.maximum(1 - alpha_bar, 1 / limit)


def eps_loss(model: Model, x0: Array, t: Array, eps: Array, cond: Any, schedule: Schedule) -> Tensor:
    """L = mean || eps - eps_theta(sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, t) ||^2. DDPM, equation 14."""
    return ops.mse(model(q_sample(x0, t, eps, schedule), t, cond), eps)


# ---- one place that converts between predictions


def predict_x0(x_t: Array, t: Array, eps: Array, schedule: Schedule) -> Array:
    """The image that x_t and its noise imply: x0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
    alpha_bar = schedule.alpha_bar_at(t)
    _check_signal(alpha_bar)
    return (x_t - per_sample(np.sqrt(1 - alpha_bar), x_t) * eps) / per_sample(np.sqrt(alpha_bar), x_t)


def eps_from_x0(x_t: Array, t: Array, x0: Array, schedule: Schedule) -> Array:
    """The noise that x_t and its image imply: eps = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t)."""
    alpha_bar = schedule.alpha_bar_at(t)
    return (x_t - per_sample(np.sqrt(alpha_bar), x_t) * x0) / per_sample(np.sqrt(1 - alpha_bar), x_t)


def eps_from_prediction(answer: Array, x_t: Array, t: Array, schedule: Schedule, prediction: str) -> Array:
    """eps_theta from what the network was trained to predict; eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
    if prediction == "eps":
        return answer
    if prediction == "x0":
        return eps_from_x0(x_t, t, answer, schedule)
    _check_is_v(prediction)
    alpha_bar = schedule.alpha_bar_at(t)
    return per_sample(np.sqrt(alpha_bar), x_t) * answer + per_sample(np.sqrt(1 - alpha_bar), x_t) * x_t


def x0_from_prediction(answer: Array, x_t: Array, t: Array, schedule: Schedule, prediction: str) -> Array:
    """x0_theta from what the network was trained to predict; x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    if prediction == "eps":
        return predict_x0(x_t, t, answer, schedule)
    if prediction == "x0":
        return answer
    _check_is_v(prediction)
    alpha_bar = schedule.alpha_bar_at(t)
    return per_sample(np.sqrt(alpha_bar), x_t) * x_t - per_sample(np.sqrt(1 - alpha_bar), x_t) * answer


def _check_is_v(prediction: str) -> None:
    if prediction != "v":
        raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")


def _check_signal(alpha_bar: np.ndarray) -> None:
    if not np.all(alpha_bar > 0):
        raise ValueError(
            "at alpha_bar = 0 (zero terminal SNR) there is noise alone, and eps says nothing of the image: take a "
            "network that predicts v or x0, and tell the sampler so"
        )


def clip_x0(x_t: Array, t: Array, eps: Array, schedule: Schedule, limit: float = 1.0) -> tuple[Array, Array]:
    """The predicted x0 held within [-limit, limit], and the eps that agrees with it: (x0, eps)."""
    x0 = array_module(x_t).clip(predict_x0(x_t, t, eps, schedule), -float(limit), float(limit))
    return x0, eps_from_x0(x_t, t, x0, schedule)


def x0_and_eps(
    answer: Array, x_t: Array, t: Array, schedule: Schedule, prediction: str, clip: float | None = None
) -> tuple[Array, Array]:
    """The image and the noise that make x_t, from the network's answer; clip: the limit of `clip_x0`, or None."""
    x0 = x0_from_prediction(answer, x_t, t, schedule, prediction)
    if clip is None:
        return x0, eps_from_prediction(answer, x_t, t, schedule, prediction)
    x0 = array_module(x0).clip(x0, -float(clip), float(clip))
    return x0, eps_from_x0(x_t, t, x0, schedule)


# ---- reverse: from noise to the image


def posterior(
    x0: Array, x_t: Array, t: Array, schedule: Schedule, t_prev: Array | None = None
) -> tuple[Array, np.ndarray]:
    """q(x_{t-1} | x_t, x0): its mean (B, ...), and its variance, one number a timestep.

    mean = (sqrt(alpha_bar_{t-1}) beta_t x0 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t) / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t. DDPM, equations 6 and 7.
    """
    beta, alpha, alpha_bar, alpha_bar_prev = schedule.between(t, t_prev)
    of_x0 = np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    of_x_t = np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    return per_sample(of_x0, x_t) * x0 + per_sample(of_x_t, x_t) * x_t, variance


def mu_theta(x_t: Array, t: Array, eps_theta: Array, schedule: Schedule, t_prev: Array | None = None) -> Array:
    """The mean of p_theta(x_{t-1} | x_t): (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t).

    DDPM, equation 11.
    """
    beta, alpha, alpha_bar, _ = schedule.between(t, t_prev)
    _check_signal(alpha_bar)
    return (x_t - per_sample(beta / np.sqrt(1 - alpha_bar), x_t) * eps_theta) / per_sample(np.sqrt(alpha), x_t)


def sigma(t: Array, schedule: Schedule, kind: str = "small", t_prev: Array | None = None) -> np.ndarray:
    """The standard deviation of p_theta(x_{t-1} | x_t). DDPM, section 3.2.

    small: sqrt of the posterior's variance, right if x0 is a single point; large: sqrt(beta_t), right if x0 ~ N(0, I).
    """
    beta, _, alpha_bar, alpha_bar_prev = schedule.between(t, t_prev)
    if kind == "small":
        return np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * beta)
    if kind == "large":
        return np.sqrt(beta)
    raise ValueError(f"sigma: kind {kind!r} is neither 'small' nor 'large'")


def ddim_step(
    x0: Array, eps: Array, t: Array, z: Array | float, eta: float, schedule: Schedule, t_prev: Array | None = None
) -> Array:
    """x_prev = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - s^2) eps + s z,  s = eta * sigma_small.

    x0 and eps: the predicted image and noise, which together make x_t. eta = 0 is deterministic, eta = 1 is DDPM with
    the small sigma. DDIM, equations 12 and 16.
    """
    of_x0, of_eps, of_z = (per_sample(c, x0) for c in ddim_coefficients(t, eta, schedule, t_prev))
    return of_x0 * x0 + of_eps * eps + of_z * z


def ddim_coefficients(
    t: Array, eta: float, schedule: Schedule, t_prev: Array | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `ddim_step` multiplies x0, eps and z by."""
    _, _, _, alpha_bar_prev = schedule.between(t, t_prev)
    s = eta * sigma(t, schedule, "small", t_prev)
    return np.sqrt(alpha_bar_prev), np.sqrt(np.maximum(1 - alpha_bar_prev - s**2, 0)), s


@kernel
def reverse_step_drawn(
    x_t: Array, eps_cond: Array, eps_uncond: Array | None, z: Draw, w: float, signal: float, noise: float,
    clip: float | None, of_x0: float, of_eps: float, of_z: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """`reverse_step` with the noise drawn on the way: z says which."""
    drawn = normal(*z, x_t.shape[1:], x_t)
    return reverse_step(x_t, eps_cond, eps_uncond, drawn, w, signal, noise, clip, of_x0, of_eps, of_z)


@kernel
def reverse_step(
    x_t: Array, eps_cond: Array, eps_uncond: Array | None, z: Array | None, w: float, signal: float, noise: float,
    clip: float | None, of_x0: float, of_eps: float, of_z: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Guidance, predicted image and step in one pass: (x_prev, x0, eps), x_prev = of_x0 x0 + of_eps eps + of_z z.

    It serves every sampler whose step is linear in these. x_t = signal x0 + noise eps: signal = sqrt(alpha_bar_t),
    noise = sqrt(1 - alpha_bar_t). eps_uncond: None where eps_cond is all. clip: the limit of `clip_x0`, or None.
    """
    eps = eps_cond if eps_uncond is None else classifier_free_guidance(eps_cond, eps_uncond, w)
    x0 = (x_t - noise * eps) / signal
    if clip is not None:
        x0 = array_module(x_t).clip(x0, -clip, clip)
        eps = (x_t - signal * x0) / noise
    x_prev = of_x0 * x0 + of_eps * eps
    return x_prev if z is None else x_prev + of_z * z, x0, eps


def classifier_free_guidance(eps_cond: Array, eps_uncond: Array, w: float) -> Array:
    """eps = eps_uncond + w (eps_cond - eps_uncond): w = 1 is no guidance, w = 0 unconditional.

    At w = 0 and w = 1 the result is exactly one of the two, without rounding.
    """
    if w == 1:
        return eps_cond
    if w == 0:
        return eps_uncond
    return eps_uncond + float(w) * (eps_cond - eps_uncond)  # NumPy's float64 would make float64 of float32 arrays


@dataclass(frozen=True)
class Guidance:
    """How strongly the text guides; taken wherever a plain number w is.

    With an interval (low, high) there is guidance only where low <= t <= high, and t must be one number; elsewhere
    w = 1, at half the work. Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """

    scale: float  # w
    rescale: float = 0.0  # phi in 0..1 of `rescale_guidance`
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance: rescale must be in 0..1, got {self.rescale}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance: the interval must go from a lower to a higher t, got {self.interval}")


def rescale_guidance(guided: Array, cond: Array, phi: float) -> Array:
    """phi guided std(cond) / std(guided) + (1 - phi) guided, the deviations (B, 1, ...) those of each sample.

    Strong guidance makes the network's answer too large, and the picture too bright; phi = 1 gives the answer the size
    that it has without. Lin et al. 2023, arXiv 2305.08891, section 3.4.
    """
    xp, axes = array_module(guided), tuple(range(1, guided.ndim))
    std_cond, std = (a.std(axis=axes, keepdims=True) for a in (cond, guided))
    factor = xp.where(std > 0, std_cond, 1) / xp.where(std > 0, std, 1)
    return float(phi) * (guided * factor) + (1 - float(phi)) * guided


def guide(cond: Array, uncond: Array | None, w: float | Guidance) -> Array:
    """The network's answer with guidance, from its answers with and without the text; uncond = None: cond is all."""
    if uncond is None:
        return cond
    if not isinstance(w, Guidance):
        return classifier_free_guidance(cond, uncond, w)
    guided = classifier_free_guidance(cond, uncond, w.scale)
    return rescale_guidance(guided, cond, w.rescale) if w.rescale else guided


def guided_eps(model: Model, x_t: Array, t: Array, cond: Any, uncond: Any, w: float | Guidance) -> Array:
    """eps_theta with guidance.

    cond and uncond are (tokens (B, L, D), mask (B, L) or None), or None for a model without text.
    """
    return guide(*both_eps(model, x_t, t, cond, uncond, w), w)


def both_eps(
    model: Model, x_t: Array, t: Array, cond: Any, uncond: Any, w: float | Guidance
) -> tuple[Array, Array | None]:
    """eps_theta with and without the text, from one call; for w = 0 or 1 one of them, and None."""
    return conditioned(model, cond, uncond, w)(x_t, t)


def conditioned(
    model: Model, cond: Any, uncond: Any, w: float | Guidance
) -> Callable[[Array, Array], tuple[Array, Array | None]]:
    """`both_eps` as a function of (x_t, t) alone, for a walk through many t under the same text.

    A model with a method `prepare(cond)` keeps there what it will need at every t, and takes each image once for both
    conditions (`UNet`); others get a batch of twice the size.
    """
    if isinstance(w, Guidance):
        inside, interval = conditioned(model, cond, uncond, w.scale), w.interval
        if interval is None:
            return inside
        outside = conditioned(model, cond, None, 1)
        return lambda x_t, t: (inside if interval[0] <= t <= interval[1] else outside)(x_t, t)
    if w != 1 and uncond is None and cond is not None:
        raise ValueError(f"guidance with w = {w} needs the unconditional input too")
    alone = w in (0, 1) or uncond is None
    given = join_conditions(cond, uncond) if not alone else uncond if w == 0 and uncond is not None else cond
    prepare = getattr(model, "prepare", None)
    if prepare is not None and given is not None:
        given = prepare(given)

    def eps(x_t: Array, t: Array) -> tuple[Array, Array | None]:
        xp = array_module(x_t)
        t = xp.broadcast_to(xp.asarray(t), x_t.shape[:1])
        with no_grad():
            if alone:
                return as_array(model(x_t, t, given)), None
            if prepare is None:
                x_t, t = xp.concatenate([x_t, x_t]), xp.concatenate([t, t])
            both = as_array(model(x_t, t, given))
        return both[: len(both) // 2], both[len(both) // 2 :]

    return eps


def join_conditions(a: Any, b: Any) -> tuple[Array, Array | None]:
    """Two conditions (tokens, mask) as one batch."""
    xp = array_module(as_array(a[0]))
    tokens = xp.concatenate([as_array(a[0]), as_array(b[0])])
    if a[1] is None and b[1] is None:
        return tokens, None
    masks = [xp.ones(as_array(c[0]).shape[:2], dtype=bool) if c[1] is None else c[1] for c in (a, b)]
    return tokens, xp.concatenate(masks)


class DenoiseStep(NamedTuple):
    """One reverse step in its seven parts; x_prev = (x_t - removed) / sqrt(alpha_t) + added."""

    x_t: Array  # 1. the noisy image (B, H, W, C)
    t_emb: Array | None  # 2. the timestep as a vector (B, D), before the blocks' SiLU
    cond: Any  # 3. the text conditioning (tokens, mask)
    eps: Array  # 4. the guided noise prediction
    removed: Array  # 5. the scaled noise removed, beta_t / sqrt(1 - alpha_bar_t) * eps
    added: Array  # 6. the fresh noise added, sigma_t * z; zero in the last step
    x_prev: Array  # 7. the result, slightly less noisy


def denoise_step(
    model: Model,
    x_t: Array,
    t: float,
    cond: Any,
    uncond: Any,
    w: float | Guidance,
    z: Array | None,
    schedule: Schedule,
    t_prev: float | None = None,
    sigma_kind: str = "small",
    clip: float | None = None,
) -> DenoiseStep:
    """One step of the reverse process p_theta(x_{t-1} | x_t), in its seven parts. DDPM, algorithm 2.

    z: standard normal noise like x_t; not looked at in the step to t_prev = 0. w: the guidance.
    clip: hold the predicted x0 within +-clip and recompute eps from it; None leaves it free.
    """
    t_prev = t - 1 if t_prev is None else t_prev
    eps = guided_eps(model, x_t, t, cond, uncond, w)
    if clip is not None:
        _, eps = clip_x0(x_t, t, eps, schedule, clip)
    beta, alpha, alpha_bar, _ = schedule.between(t, t_prev)
    _check_signal(alpha_bar)
    removed = per_sample(beta / np.sqrt(1 - alpha_bar), x_t) * eps
    if t_prev == 0:
        added = array_module(x_t).zeros_like(x_t)
    else:
        added = per_sample(sigma(t, schedule, sigma_kind, t_prev), x_t) * z
    x_prev = (x_t - removed) / per_sample(np.sqrt(alpha), x_t) + added  # = mu_theta + sigma_t z
    return DenoiseStep(x_t, _time_embedding(model, x_t, t), cond, eps, removed, added, x_prev)


def _time_embedding(model: Model, x_t: Array, t: float) -> Array | None:
    embed = getattr(model, "time_embedding", None)
    if embed is None:
        return None
    xp = array_module(x_t)
    with no_grad():
        return as_array(embed(xp.full(len(x_t), t)))
