"""Each equation of diffusion tested by what must follow from it, not against a copy of the code."""

import numpy as np
import pytest
from helpers import placed

from minidiff import Tensor
from minidiff.backend import to_numpy
from minidiff.diffusion import (
    PREDICTIONS,
    classifier_free_guidance,
    clip_x0,
    ddim_coefficients,
    ddim_step,
    denoise_step,
    eps_from_prediction,
    eps_from_x0,
    eps_loss,
    guided_eps,
    join_conditions,
    mu_theta,
    noised,
    posterior,
    predict_x0,
    q_sample,
    q_sample_drawn,
    q_step,
    reverse_step,
    reverse_step_drawn,
    sigma,
    training_target,
    weighted_mse,
    x0_loss_weight,
)
from minidiff.random import Draw, Purpose, normal
from minidiff.schedule import cosine, linear, scaled_linear
from minidiff.tensor import record

T = 1000
SCHEDULES = {"linear": linear(T), "scaled_linear": scaled_linear(T), "cosine": cosine(T)}
STEPS = [(1, 0), (2, 1), (2, 0), (500, 499), (500, 120), (999, 3), (1000, 999), (1000, 1), (1000, 0)]
INNER = [(t, t_prev) for t, t_prev in STEPS if t_prev > 0]
ONE, ZERO = np.ones(1), np.zeros(1)

every_schedule = pytest.mark.parametrize("s", SCHEDULES.values(), ids=SCHEDULES)


def close(actual, expected, rtol=1e-10, atol=0.0):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=False)


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def jump(s, t):
    """Mean factor and standard deviation of q(x_t | x0), read off q_sample."""
    return q_sample(ONE, t, ZERO, s)[0], q_sample(ZERO, t, ONE, s)[0]


def step_factors(s, t, t_prev):
    """Mean factor and standard deviation of q(x_t | x_{t-1}), read off q_step."""
    return q_step(ONE, t, ZERO, s, t_prev)[0], q_step(ZERO, t, ONE, s, t_prev)[0]


# ---- forward


@every_schedule
def test_one_step_by_hand(s):
    x, eps = draw(3, 2), draw(3, 2, seed=1)
    for t in (1, 400, T):
        beta = s.betas[t - 1]
        close(q_step(x, t, eps, s), np.sqrt(1 - beta) * x + np.sqrt(beta) * eps)
        kept = np.prod(1 - s.betas[:t])
        close(q_sample(x, t, eps, s), np.sqrt(kept) * x + np.sqrt(1 - kept) * eps, rtol=1e-9)


@every_schedule
@pytest.mark.parametrize("stride", [1, 7, 250, 1000])
def test_steps_add_up_to_the_jump(s, stride):
    """x_t = a x_{t-1} + b eps: the mean factor is multiplied by a, the variance by a^2, and b^2 is added."""
    mean, variance, t_prev = 1.0, 0.0, 0
    for t in [*range(stride, T, stride), T]:
        a, b = step_factors(s, t, t_prev)
        mean, variance, t_prev = a * mean, a**2 * variance + b**2, t
        close([mean, np.sqrt(variance)], jump(s, t), rtol=1e-9)


@pytest.mark.parametrize("stride", [1, 3])
def test_steps_add_up_to_the_jump_by_monte_carlo(stride):
    s, n = linear(30, 0.01, 0.3), 100_000
    rng = np.random.default_rng(stride)
    x = np.full(n, 3.0)
    for t in range(stride, 31, stride):
        x = q_step(x, t, rng.standard_normal(n), s, t - stride)
    a, b = jump(s, 30)
    assert abs(x.mean() - 3 * a) < 4.5 * b / np.sqrt(n)
    assert abs(x.var() / b**2 - 1) < 4.5 * np.sqrt(2 / n)


@every_schedule
def test_time_zero_is_the_image(s):
    x, eps = draw(2, 3), draw(2, 3, seed=1)
    np.testing.assert_array_equal(q_sample(x, 0, eps, s), x)


@every_schedule
def test_the_forward_process_keeps_unit_variance(s):
    for t in (0, 1, 500, T):
        close(np.hypot(*jump(s, t)), 1)
    for t, t_prev in STEPS:
        close(np.hypot(*step_factors(s, t, t_prev)), 1)


# ---- reverse


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), INNER)
def test_posterior_satisfies_bayes(s, t, t_prev):
    """q(x_{t-1} | x_t, x0) q(x_t | x0) = q(x_t | x_{t-1}) q(x_{t-1} | x0), as densities, at random points."""
    x0, z, z_prev = draw(3, 50)
    a, b = jump(s, t)
    x_t = a * x0 + b * z
    mean, variance = posterior(x0, x_t, t, s, t_prev)
    x_prev = mean + np.sqrt(variance) * z_prev
    (a_prev, b_prev), (a_step, b_step) = jump(s, t_prev), step_factors(s, t, t_prev)
    left = log_normal(x_prev, mean, variance) + log_normal(x_t, a * x0, b**2)
    right = log_normal(x_t, a_step * x_prev, b_step**2) + log_normal(x_prev, a_prev * x0, b_prev**2)
    close(left, right, rtol=0, atol=1e-6)


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), INNER)
def test_posterior_weighs_by_precision(s, t, t_prev):
    """Two measurements of x_{t-1}, one from x0 and one from x_t: precisions add, means are weighted."""
    x0, x_t = draw(2, 50)
    (a_prev, b_prev), (a_step, b_step) = jump(s, t_prev), step_factors(s, t, t_prev)
    precision = 1 / b_prev**2 + a_step**2 / b_step**2
    mean, variance = posterior(x0, x_t, t, s, t_prev)
    close(mean, (a_prev * x0 / b_prev**2 + a_step * x_t / b_step**2) / precision, rtol=1e-8, atol=1e-9)
    close(variance, 1 / precision, rtol=1e-8)


@every_schedule
@pytest.mark.parametrize("t", [1, 2, 500, T])
def test_the_last_step_is_certain(s, t):
    x0, x_t = draw(2, 50)
    mean, variance = posterior(x0, x_t, t, s, 0)
    close(mean, x0, atol=1e-10)
    assert variance == 0
    assert sigma(t, s, "small", t_prev=0) == 0


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_mu_theta_is_the_posterior_at_the_predicted_x0(s, t, t_prev):
    x_t, eps = draw(2, 50)
    mean, _ = posterior(predict_x0(x_t, t, eps, s), x_t, t, s, t_prev)
    atol = 1e-14 / jump(s, t)[0]
    close(mu_theta(x_t, t, eps, s, t_prev), mean, atol=max(atol, 1e-11))


@every_schedule
@pytest.mark.parametrize("t", [1, 2, 500, T])
def test_mu_theta_with_the_true_noise_finds_x0(s, t):
    x0, eps = draw(2, 20)
    tolerance = 1e-14 / jump(s, t)[0] + 1e-10
    close(mu_theta(q_sample(x0, t, eps, s), t, eps, s, 0), x0, rtol=0, atol=tolerance)


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_sigma(s, t, t_prev):
    _, b_step = step_factors(s, t, t_prev)
    _, variance = posterior(ONE, ONE, t, s, t_prev)
    close(sigma(t, s, "large", t_prev), b_step)
    close(sigma(t, s, "small", t_prev), np.sqrt(variance))
    assert sigma(t, s, t_prev=t_prev) == sigma(t, s, "small", t_prev) < sigma(t, s, "large", t_prev)
    if t_prev == t - 1:
        close(sigma(t, s, "large"), np.sqrt(s.betas[t - 1]))
        assert sigma(t, s, "small") == sigma(t, s, "small", t_prev)


def test_sigma_of_no_kind():
    with pytest.raises(ValueError, match="'medium' is neither 'small' nor 'large'"):
        sigma(1, SCHEDULES["linear"], "medium")


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginal(s, t, t_prev, eta):
    """With the true eps x_prev has mean sqrt(alpha_bar_prev) x0, variance 1 - alpha_bar_prev, for any eta."""
    a, b = jump(s, t_prev)
    basis = np.eye(3)  # x0, eps, z
    x0, eps, z = (basis[:, i] for i in range(3))
    of_x0, of_eps, of_z = ddim_step(x0, eps, t, z, eta, s, t_prev)
    tolerance = 1e-10
    close(of_x0, a, atol=tolerance)
    close(np.hypot(of_eps, of_z), b, atol=tolerance)
    close(of_z, eta * sigma(t, s, "small", t_prev))


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_ddim_with_eta_1_is_ddpm(s, t, t_prev):
    x_t, eps, z = draw(3, 50)
    ddpm = mu_theta(x_t, t, eps, s, t_prev) + sigma(t, s, "small", t_prev) * z
    close(
        ddim_step(predict_x0(x_t, t, eps, s), eps, t, z, 1.0, s, t_prev), ddpm, atol=max(1e-14 / jump(s, t)[0], 1e-10)
    )


# ---- conversions between predictions


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, T // 2, T])
def test_conversions_round_trip(s, prediction, t):
    x0, eps = draw(2, 40)
    a, b = jump(s, t)
    x_t = q_sample(x0, t, eps, s)
    with np.errstate(all="raise"):
        target = training_target(x0, t, eps, s, prediction)
        back = eps_from_prediction(target, x_t, t, s, prediction)
        x0_back = predict_x0(x_t, t, back, s)
    close(back, eps, rtol=0, atol=1e-14 / b)
    close(x0_back, x0, rtol=0, atol=1e-13 / (a * b))
    close(eps_from_x0(x_t, t, x0, s), eps, rtol=0, atol=1e-14 / b)


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, T // 2, T])
def test_conversions_of_float32_are_finite(s, prediction, t):
    x_t, answer = draw(2, 40, dtype=np.float32)
    eps = eps_from_prediction(answer, x_t, t, s, prediction)
    x0 = predict_x0(x_t, t, eps, s)
    assert np.isfinite(eps).all() and np.isfinite(x0).all()
    assert eps.dtype == x0.dtype == np.float32


@every_schedule
def test_v_is_the_velocity(s):
    """With cos phi = sqrt(alpha_bar): x_t = cos(phi) x0 + sin(phi) eps, and v = d x_t / d phi."""
    x0, eps = draw(2, 40)
    for t in (1, 500, T):
        phi = np.arctan2(*jump(s, t)[::-1])
        h = 1e-5
        x = [np.cos(p) * x0 + np.sin(p) * eps for p in (phi - h, phi + h)]
        close(training_target(x0, t, eps, s, "v"), (x[1] - x[0]) / (2 * h), rtol=0, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("t", [1, 500, T])
def test_clipping_recomputes_eps(s, t):
    x0, eps = draw(2, 400)
    x_t = q_sample(x0, t, eps, s)
    x0, clipped = clip_x0(x_t, t, eps, s, limit=0.7)
    assert abs(x0).max() <= 0.7
    close(q_sample(x0, t, clipped, s), x_t, rtol=0, atol=1e-11)
    free = predict_x0(x_t, t, eps, s)
    inside = abs(free) < 0.7
    assert inside.any() and not inside.all()
    close(clipped[inside], eps[inside], rtol=0, atol=1e-11)
    close(x0, np.sign(free) * np.minimum(abs(free), 0.7))


# ---- training


class Scaled:
    """A network with one parameter: eps_theta = p * x_t. It keeps what it was given."""

    def __init__(self, p, dtype=np.float64):
        self.p = Tensor(np.array([p], dtype), requires_grad=True)

    def __call__(self, x_t, t, cond):
        self.seen = x_t, t, cond
        return self.p * Tensor(x_t)


def test_eps_loss_is_the_mean_square_and_has_its_gradient():
    s = SCHEDULES["linear"]
    x0, eps = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    t = np.array([1, 10, 500, T])
    network = Scaled(0.3)
    loss = eps_loss(network, x0, t, eps, "the condition", s)
    x_t = np.stack([q_sample(x0[i], int(t[i]), eps[i], s) for i in range(4)])
    error = [(e - 0.3 * x) for e, x in zip(eps.ravel(), x_t.ravel(), strict=True)]
    assert isinstance(loss, Tensor) and loss.shape == ()
    close(loss.item(), sum(e * e for e in error) / 24)
    seen_x, seen_t, seen_cond = network.seen
    close(seen_x, x_t)
    assert seen_t is t and seen_cond == "the condition"
    loss.backward()
    close(network.p.grad, [sum(-2 * e * x for e, x in zip(error, x_t.ravel(), strict=True)) / 24])


def test_eps_loss_is_zero_for_the_truth_and_one_for_silence():
    s, x0, eps = SCHEDULES["cosine"], draw(4, 500), draw(4, 500, seed=1)
    t = np.array([1, 10, 500, T])
    assert eps_loss(lambda x, t, c: Tensor(eps), x0, t, eps, None, s).item() == 0
    close(eps_loss(lambda x, t, c: Tensor(0 * x), x0, t, eps, None, s).item(), (eps**2).mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_asks_for_its_prediction(prediction):
    s, x0, eps = SCHEDULES["cosine"], draw(3, 5), draw(3, 5, seed=1)
    t = np.array([3, 400, T])
    a, b = (np.sqrt(v[t])[:, None] for v in (s.alpha_bar, 1 - s.alpha_bar))
    wanted = {"eps": eps, "x0": x0, "v": a * eps - b * x0}
    for name, target in wanted.items():
        x_t, asked = noised(x0, t, eps, s, prediction)
        loss = weighted_mse(Tensor(target), asked, None).item()
        assert (loss < 1e-25) == (name == prediction)
        close(x_t, a * x0 + b * eps)


def test_eps_loss_of_the_wrong_shape():
    with pytest.raises(ValueError, match="shapes"):
        eps_loss(lambda x, t, c: Tensor(x[:, :1]), draw(2, 3), 5, draw(2, 3), None, SCHEDULES["linear"])


# ---- guidance


def test_guidance_is_exact_at_0_and_1_and_linear_between():
    cond, uncond = draw(2, 3, 4, dtype=np.float32)
    for one in (1, 1.0, np.float32(1)):
        np.testing.assert_array_equal(classifier_free_guidance(cond, uncond, one), cond)
    for zero in (0, 0.0, -0.0):
        np.testing.assert_array_equal(classifier_free_guidance(cond, uncond, zero), uncond)
    broken = np.full_like(cond, np.nan)  # exactly the other one, even so
    np.testing.assert_array_equal(classifier_free_guidance(cond, broken, 1), cond)
    np.testing.assert_array_equal(classifier_free_guidance(broken, uncond, 0), uncond)
    for w in (-1.0, 0.25, 1 + 1e-6, 2.0, 7.5):
        guided = classifier_free_guidance(cond, uncond, w)
        assert guided.dtype == np.float32
        close(guided, w * cond.astype(float) + (1 - w) * uncond, rtol=1e-5, atol=1e-5)


class TextModel:
    """eps_theta = x_t * (1 + the mean of the unmasked tokens) + t, as a Tensor; counts its calls."""

    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, cond):
        assert t.shape == (len(x_t),)
        self.batches.append(len(x_t))
        tokens, mask = cond
        self.cond = cond
        mask = np.ones(tokens.shape[:2], bool) if mask is None else mask
        text = (tokens * mask[..., None]).sum(axis=(1, 2)) / mask.sum(axis=1)
        text = (1 + text).astype(x_t.dtype).reshape(-1, *(1,) * (x_t.ndim - 1))
        return Tensor(x_t * text + t.reshape(text.shape).astype(x_t.dtype))


def conditions(B=3, L=4, D=2, dtype=np.float64):
    mask = np.arange(L)[None, :] <= np.arange(B)[:, None]
    return (draw(B, L, D, seed=5, dtype=dtype), mask), (draw(B, L, D, seed=6, dtype=dtype), None)


def test_one_prediction_alone_needs_one_batch():
    x, s = draw(3, 2, 2, 1), SCHEDULES["linear"]
    cond, uncond = conditions()
    for w, wanted in ((1, cond), (0, uncond)):
        model = TextModel()
        expected = TextModel()(x, np.full(3, 7), wanted).data
        np.testing.assert_array_equal(guided_eps(model, x, 7, cond, uncond, w), expected)
        step = denoise_step(model, x, 7, cond, uncond, w, draw(*x.shape), s)
        np.testing.assert_array_equal(step.eps, expected)
        assert model.batches == [3, 3] and model.cond is wanted


@pytest.mark.parametrize("w", [-1.0, 0.5, 3.0])
def test_guidance_takes_both_from_one_batch(w):
    x, s = draw(3, 2, 2, 1), SCHEDULES["linear"]
    cond, uncond = conditions()
    t = np.array([7, 8, 9])
    both = [TextModel()(x, t, c).data for c in (cond, uncond)]
    assert abs(both[0] - both[1]).max() > 0.1
    model = TextModel()
    close(guided_eps(model, x, t, cond, uncond, w), w * both[0] + (1 - w) * both[1])
    close(guided_eps(model, x, 7, cond, uncond, w)[0], (w * both[0] + (1 - w) * both[1])[0])
    one = [TextModel()(x, np.full(3, 7), c).data for c in (cond, uncond)]
    close(denoise_step(model, x, 7, cond, uncond, w, draw(*x.shape), s).eps, w * one[0] + (1 - w) * one[1])
    assert model.batches == [6, 6, 6]


def test_a_model_without_text():
    x = draw(3, 2)
    seen = []
    eps = guided_eps(lambda x, t, c: seen.append((len(x), c)) or 2 * x, x, 7, None, None, 5.0)
    np.testing.assert_array_equal(eps, 2 * x)
    assert seen == [(3, None)]


@pytest.mark.parametrize("masked", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_conditions_are_joined(masked, wrap):
    (tokens_a, mask), (tokens_b, _) = conditions()
    masks = [mask if masked[0] else None, ~mask if masked[1] else None]
    tokens, joined = join_conditions((wrap(tokens_a), masks[0]), (wrap(tokens_b), masks[1]))
    np.testing.assert_array_equal(tokens, np.concatenate([tokens_a, tokens_b]))
    if masked == (False, False):
        assert joined is None
    else:
        assert joined.dtype == bool and joined.shape == (6, 4)
        for half, m in zip((joined[:3], joined[3:]), masks, strict=True):
            np.testing.assert_array_equal(half, np.ones((3, 4), bool) if m is None else m)


def test_guidance_records_no_graph():
    made = []

    def model(x, t, cond):
        made.append(Tensor(np.ones(1), requires_grad=True) * x)
        return made[-1]

    x, tokens = draw(2, 3), (draw(2, 1, 1), None)
    for w in (0, 1, 2.0):
        guided_eps(model, x, 3, tokens, tokens, w)
    assert all(y.node is None for y in made)
    assert record("y", x, (Tensor(x, requires_grad=True),), lambda dy: [dy]).node is not None


# ---- the reverse step


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
@pytest.mark.parametrize("kind", ["small", "large"])
def test_denoise_step_is_its_formula_and_its_parts_add_up(s, t, t_prev, kind):
    x_t, z = draw(3, 2, 2), draw(3, 2, 2, seed=1)
    cond, uncond = conditions()
    step = denoise_step(TextModel(), x_t, t, cond, uncond, 2.0, z, s, t_prev, kind)
    eps = guided_eps(TextModel(), x_t, t, cond, uncond, 2.0)
    noise = sigma(t, s, kind, t_prev) * z if t_prev > 0 else 0 * z
    expected = mu_theta(x_t, t, eps, s, t_prev) + noise
    close(step.x_prev, expected)
    assert step.x_t is x_t and step.cond is cond and step.t_emb is None
    close(step.eps, eps)
    close(step.added, noise)
    a, _ = step_factors(s, t, t_prev)
    close((step.x_t - step.removed) / a + step.added, step.x_prev)
    if t_prev == t - 1:
        default = denoise_step(TextModel(), x_t, t, cond, uncond, 2.0, z, s, sigma_kind=kind)
        np.testing.assert_array_equal(default.x_prev, step.x_prev)


@every_schedule
@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("t", [1, 2, 500])
def test_the_last_step_adds_no_noise(s, kind, t):
    x_t, z = draw(2, 3), draw(2, 3, seed=1)
    steps = [denoise_step(lambda x, t, c: x, x_t, t, None, None, 1, k * z, s, 0, kind) for k in (1, 1e6)]
    assert not steps[0].added.any()
    np.testing.assert_array_equal(steps[0].x_prev, steps[1].x_prev)
    if t > 1:
        assert denoise_step(lambda x, t, c: x, x_t, t, None, None, 1, z, s, 1, kind).added.all()


@every_schedule
@pytest.mark.parametrize(("t", "t_prev"), STEPS)
def test_denoise_step_clips_consistently(s, t, t_prev):
    """x_prev is the posterior's mean at the clipped x0, and eps is the noise that goes with it."""
    x_t, z = draw(3, 40), draw(3, 40, seed=1)
    step = denoise_step(lambda x, t, c: 0.3 * x, x_t, t, None, None, 1, z, s, t_prev, clip=0.5)
    x0 = np.clip(predict_x0(x_t, t, 0.3 * x_t, s), -0.5, 0.5)
    assert (abs(x0) == 0.5).any()
    tolerance = 1e-14 / jump(s, t)[0] + 1e-10
    close(predict_x0(x_t, t, step.eps, s), x0, rtol=0, atol=tolerance)
    mean, variance = posterior(x0, x_t, t, s, t_prev)
    close(step.x_prev, mean + np.sqrt(variance) * z, rtol=0, atol=tolerance)


def test_denoise_step_shows_the_time_embedding():
    class Model:
        def __call__(self, x_t, t, cond):
            return Tensor(x_t)

        def time_embedding(self, t):
            self.made = Tensor(np.array([1.0, 2.0]), requires_grad=True) * t[:, None].astype(np.float64)
            return self.made

    model = Model()
    step = denoise_step(model, draw(3, 2), 7, None, None, 1, draw(3, 2), SCHEDULES["linear"])
    np.testing.assert_array_equal(step.t_emb, [[7, 14]] * 3)
    assert model.made.node is None


# ---- shapes and dtypes, everywhere the same


def equations(x, y, t, t_prev, s):
    """Every equation that takes images and times."""
    return {
        "q_step": q_step(x, t, y, s, t_prev),
        "q_sample": q_sample(x, t, y, s),
        "posterior": posterior(x, y, t, s, t_prev)[0],
        "mu_theta": mu_theta(x, t, y, s, t_prev),
        "ddim_step": ddim_step(x, y, t, 0.5 * y, 0.7, s, t_prev),
        "predict_x0": predict_x0(x, t, y, s),
        "eps_from_x0": eps_from_x0(x, t, y, s),
        "clip_x0": clip_x0(x, t, y, s)[0],
        "clip_eps": clip_x0(x, t, y, s)[1],
        **{f"target_{p}": training_target(x, t, y, s, p) for p in PREDICTIONS},
        **{f"from_{p}": eps_from_prediction(y, x, t, s, p) for p in PREDICTIONS},
    }


@pytest.mark.parametrize("shape", [(), (3,), (4, 4, 3), (1, 1, 1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_time_for_each_sample(shape, dtype):
    s = SCHEDULES["linear"]
    x, y = draw(2, 5, *shape, dtype=dtype)
    t, t_prev = np.array([1, 2, 300, 999, T]), np.array([0, 1, 120, 3, 999])
    together = equations(x, y, t, t_prev, s)
    for i in range(5):
        alone = equations(x[i : i + 1], y[i : i + 1], int(t[i]), int(t_prev[i]), s)
        for name, value in alone.items():
            assert together[name].shape == x.shape and together[name].dtype == value.dtype == dtype, name
            close(together[name][i : i + 1], value, rtol=1e-6 if dtype == np.float32 else 1e-12)
    for kind in ("small", "large"):
        np.testing.assert_array_equal(
            sigma(t, s, kind, t_prev),
            [sigma(int(a), s, kind, int(b)) for a, b in zip(t, t_prev, strict=True)],
        )
    variance = posterior(x, y, t, s, t_prev)[1]
    close(variance, sigma(t, s, "small", t_prev) ** 2)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("t_prev", [None, 3, 0])
def test_denoise_step_keeps_float32(clip, t_prev):
    x, z = draw(2, 3, 4, 4, 1, dtype=np.float32)
    cond, uncond = conditions(dtype=np.float32)
    step = denoise_step(TextModel(), x, 7, cond, uncond, 3.0, z, SCHEDULES["cosine"], t_prev, "large", clip)
    for part in (step.eps, step.removed, step.added, step.x_prev):
        assert part.dtype == np.float32 and part.shape == x.shape
    loss = eps_loss(Scaled(0.5, np.float32), x, np.array([1, 5, T]), z, None, SCHEDULES["cosine"])
    assert loss.dtype == np.float32


def test_times_and_samples_must_match():
    s, x = SCHEDULES["linear"], draw(4, 2)
    t = np.array([1, 2, 3])
    calls = [
        lambda: q_step(x, t, x, s),
        lambda: q_sample(x, t, x, s),
        lambda: posterior(x, x, t, s),
        lambda: mu_theta(x, t, x, s),
        lambda: predict_x0(x, t, x, s),
        lambda: eps_from_x0(x, t, x, s),
        lambda: ddim_step(x, x, t, x, 0.5, s),
        lambda: eps_loss(Scaled(1.0), x, t, x, None, s),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="3 timesteps for 4 samples"):
            call()
    with pytest.raises(ValueError):
        guided_eps(lambda x, t, c: x, x, t, None, None, 1)


@pytest.mark.parametrize("t", [0, T + 1, 0.5, T + 0.5])
def test_times_out_of_range(t):
    s, x = SCHEDULES["linear"], draw(2, 2)
    for call in (q_step, mu_theta):
        with pytest.raises(ValueError, match="t"):
            call(x, t, x, s)
    with pytest.raises(ValueError, match="t"):
        sigma(t, s)


@pytest.mark.parametrize("convert", [training_target, eps_from_prediction])
def test_an_unknown_prediction_is_refused(convert):
    x = np.ones((1, 2))
    with pytest.raises(ValueError, match="'noise' is not one of eps, v, x0"):
        convert(x, x, 5, cosine(10), "noise") if convert is eps_from_prediction else convert(
            x, 5, x, cosine(10), "noise"
        )


def test_guidance_without_the_unconditional_input_is_refused():
    x = np.ones((1, 2))
    with pytest.raises(ValueError, match="needs the unconditional input"):
        guided_eps(lambda *args: x, x, 5, (x[:, None], None), None, 7.5)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="works on floats"):
        q_sample(np.ones((1, 2), int), 5, np.ones((1, 2)), cosine(10))


@pytest.mark.parametrize("t", [1, 50, 500, 1000])
def test_the_weight_makes_an_x0_loss_a_v_loss(t):
    """|| v - v_theta ||^2 = (1 + SNR) || x0 - x0_theta ||^2, when v_theta follows from x0_theta; up to the limit."""
    s, (x0, wrong, eps) = cosine(1000), np.random.default_rng(t).standard_normal((3, 1, 4))
    x_t = q_sample(x0, t, eps, s)
    v = training_target(x0, t, eps, s, "v")
    v_theta = training_target(wrong, t, eps_from_x0(x_t, t, wrong, s), s, "v")
    ratio = ((v - v_theta) ** 2).sum() / ((x0 - wrong) ** 2).sum()
    assert abs(x0_loss_weight(t, s, 1e9) / ratio - 1) < 1e-9
    assert x0_loss_weight(t, s, 3.0) == pytest.approx(min(ratio, 3.0))


def test_a_weighted_loss_is_the_mean_of_the_weighted_squares():
    x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4))
    t, weight = np.array([1, 5, 9]), np.array([1.0, 2.0, 7.0])
    target = noised(x0, t, eps, cosine(10), "x0")[1]
    loss = weighted_mse(Tensor(0 * x0), target, weight)
    assert loss.item() == pytest.approx((weight[:, None] * x0**2).mean())


@pytest.mark.usefixtures("kernels_kind")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_step_is_guidance_and_ddim(dtype, clip, eta, guided, rng):
    """Forty odd thousand numbers: more than one task's, and no whole vectors."""
    s, t, t_prev, w = linear(100), 60, 41, 3.5
    shapes = [(2, 21, 333, 3)] * 4
    x_t, cond, uncond, z = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    eps = cond + (w - 1) * (cond - uncond) if guided else cond
    x0 = predict_x0(x_t, t, eps, s)
    if clip is not None:
        x0, eps = clip_x0(x_t, t, eps, s, clip)
    wanted = ddim_step(x0, eps, t, z, eta, s, t_prev), x0, eps
    alpha_bar = s.alpha_bar_at(t)
    numbers = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), clip, *ddim_coefficients(t, eta, s, t_prev)
    numbers = [None if n is None else float(n) for n in numbers]
    arrays = (x_t, cond, uncond if guided else None, z if eta else None)
    got = reverse_step(*(None if a is None else placed(a) for a in arrays), w, *numbers)
    for actual, reference in zip(map(to_numpy, got), wanted, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, reference, atol=1e-5 if dtype == "float32" else 1e-13)


DRAWS = [Draw(3, [7], 2, Purpose.STEP_NOISE), Draw(2**40 + 1, range(5, 9), 1, Purpose.TRAIN_NOISE)]


@pytest.mark.usefixtures("kernels_kind")
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("shape", [(4, 5, 8), (3, 7), (1,)])
@pytest.mark.parametrize("z", DRAWS, ids=["one sample", "four samples"])
def test_a_step_may_draw_its_own_noise(z, shape, clip, rng):
    shape = (len(z.samples), *shape)
    x_t, cond, uncond = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    for numbers in [(3.5, 0.6, 0.8, clip, 0.7, 0.5, 0.5), (1.0, 0.6, 0.8, clip, 0.7, 0.5, 0.0)]:
        w, of_z = numbers[0], numbers[-1]
        wanted = reverse_step.reference(x_t, cond, uncond, normal.reference(*z, shape[1:]), *numbers)
        got = reverse_step_drawn(placed(x_t), placed(cond), placed(uncond), z, *numbers)
        for actual, reference in zip(map(to_numpy, got), wanted, strict=True):
            assert actual.dtype == np.float32 and actual.shape == shape
            np.testing.assert_allclose(actual, reference, atol=2e-5)
        assert (w == 1) == (of_z == 0)
    alone = reverse_step_drawn(placed(x_t), placed(cond), None, z, *numbers)
    np.testing.assert_allclose(
        to_numpy(alone[2]), reverse_step.reference(x_t, cond, None, None, *numbers)[2], atol=2e-5
    )


@pytest.mark.usefixtures("kernels_kind")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(4, 5, 8), (3, 7), (1,)])
@pytest.mark.parametrize("noise", DRAWS, ids=["one sample", "four samples"])
def test_training_may_draw_its_noise_on_the_way(noise, shape, prediction, rng):
    s, (B, *_) = cosine(T), (len(noise.samples),)
    x0, t = rng.standard_normal((B, *shape)).astype(np.float32), rng.integers(1, T + 1, B)
    eps = normal.reference(*noise, shape)
    drawn, given = noised(placed(x0), t, noise, s, prediction), noised(x0, t, eps, s, prediction)
    for got, wanted in zip(map(to_numpy, drawn), given, strict=True):
        assert got.dtype == np.float32 and got.shape == x0.shape
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.usefixtures("kernels_kind")
def test_more_samples_than_one_launch_draws(rng):
    z, (x0, signal, noise) = (
        Draw(1, range(700), 1, Purpose.TRAIN_NOISE),
        rng.standard_normal((3, 700)).astype(np.float32),
    )
    x_t, target = map(to_numpy, q_sample_drawn(placed(x0[:, None]), placed(signal), placed(noise), "v", z))
    eps = normal.reference(*z, (1,))[:, 0]
    np.testing.assert_allclose(x_t[:, 0], signal * x0 + noise * eps, atol=2e-5)
    np.testing.assert_allclose(target[:, 0], signal * eps - noise * x0, atol=2e-5)
