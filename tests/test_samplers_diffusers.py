"""Our samplers are diffusers' schedulers, step by step: the same levels, the same noise, the same numbers.

Both walk from the same scheduler_config.json, driven by the exact answer of a network for a Gaussian mixture, as a
function of x_t and alpha_bar. Diffusers computes its tables in float32, ours are float64.

What diffusers does otherwise, and is noted here instead of copied:
- DDIM steps to t - T // steps, wherever the next level is: with linspace, and where steps do not divide T, its steps do
  not link up.
- DDIM clips x0 and leaves eps as it was, unless asked (use_clipped_model_output).
- DDPM with the large sigma adds noise in the last step too, unless that starts at timestep 0.
- DPM-Solver++ and UniPC with Karras's levels tell the model a rounded timestep; so does DPM-Solver++ a truncated one.
- Zero terminal SNR stops at alpha_bar = 2^-24 in all but DDPM and DDIM.
- Where two of its levels are the same, the step between them is a call of the model that changes nothing.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers import import_or_skip

from minidiff.pretrained.scheduler import MULTISTEP, SAMPLER_OF, SIGMA_SPACE, read_scheduler
from minidiff.samplers import SAMPLERS, ddim
from minidiff.schedule import SPACINGS, Schedule

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLASSES = {sampler: name for name, sampler in reversed(SAMPLER_OF.items())}
STEPS = [1, 2, 5, 20, 50]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SHAPE = (2, 3, 5)

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
each_spacing = pytest.mark.parametrize("spacing", SPACINGS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def config(sampler, **settings):
    """A scheduler_config.json; Stable Diffusion's noise schedule unless told otherwise."""
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    clip = {"clip_sample": False} if sampler in ("ddpm", "ddim", "heun") else {}
    return {"_class_name": CLASSES[sampler], "num_train_timesteps": 1000, **schedule, **clip, **settings}


def their_scheduler(settings):
    return getattr(diffusers, settings["_class_name"]).from_config(settings)


def z(i):
    return np.random.default_rng([5, i]).standard_normal(SHAPE)


START = 12345  # the number of the noise that a walk begins with


def answer(x, alpha_bar, prediction):
    """What a perfect network of the mixture 0.6 N(-1, 0.5^2) + 0.4 N(0.8, 0.3^2) predicts at x_t."""
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    modes = []
    for p, m, d in ((0.6, -1.0, 0.5), (0.4, 0.8, 0.3)):
        variance = alpha_bar * d**2 + 1 - alpha_bar
        weight = p * np.exp(-((x - a * m) ** 2) / (2 * variance)) / np.sqrt(variance) + 1e-30
        modes.append((weight, m + a * d**2 / variance * (x - a * m), s * (x - a * m) / variance))
    total = modes[0][0] + modes[1][0]
    x0, eps = (sum(mode[0] * mode[i] for mode in modes) / total for i in (1, 2))
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[prediction]


def our_walk(sampling, prediction, x_t, timesteps, first=0, **options):
    def model(x, t, cond):
        return answer(x, sampling.schedule.alpha_bar_at(t).reshape(-1, 1, 1), prediction)

    return list(
        SAMPLERS[sampling.sampler](
            model, x_t, None, None, 1, timesteps, sampling.schedule, lambda i: z(i + first),
            clip=sampling.clip, prediction=sampling.prediction, **sampling.options, **options,
        )
    )  # fmt: skip


def their_walk(scheduler, prediction, steps, monkeypatch, **options):
    """(timestep, x_t, x_prev) of every step, in our variables."""
    sampler = SAMPLER_OF[type(scheduler).__name__]
    draws = (torch.from_numpy(z(i)) for i in itertools.count())
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(draws), raising=False)

    def sigma_sq(i):
        return float(scheduler.sigmas[i]) ** 2

    def ours(x, i):
        return x.double().numpy() / (np.sqrt(1 + sigma_sq(i)) if sampler in SIGMA_SPACE else 1)

    if sampler == "ddim":
        options["use_clipped_model_output"] = True
    scheduler.set_timesteps(steps)
    x, calls = torch.from_numpy(z(START)) * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t).double().numpy()
        alpha_bar = 1 / (1 + sigma_sq(i)) if hasattr(scheduler, "sigmas") else float(scheduler.alphas_cumprod[t])
        told = torch.from_numpy(answer(seen, alpha_bar, prediction))
        before, x = x, scheduler.step(told, t, x, return_dict=False, **options)[0]
        calls.append((float(t), ours(before, i), ours(x, i + 1)))
    if sampler == "heun":  # two calls a step
        calls = [(*calls[i][:2], calls[min(i + 1, len(calls) - 1)][2]) for i in range(0, len(calls), 2)]
    return calls


def off(actual, reference):
    """The largest difference, relative to the largest value where that is above 1; NaN is not small."""
    assert np.isfinite(reference).all()
    return np.abs(actual - reference).max() / max(1.0, np.abs(reference).max())


def check(settings, steps, monkeypatch, first=0, last=None, t_tolerance=0.01, schedule=None, **options):
    """The walks agree in every t, x_t and x_prev; what theirs has beyond ours are steps that go nowhere.

    first: the step where ours sets out, from their x_t. last: where the comparison ends, if not at the end.
    t_tolerance: fractional levels are the same noise, for which t differs by how it is interpolated.
    """
    sampling, prediction = read_scheduler(settings), settings.get("prediction_type", "epsilon")
    if schedule is not None:
        sampling = replace(sampling, schedule=schedule)
    theirs = their_walk(their_scheduler(settings), prediction, steps, monkeypatch, **options)
    timesteps = sampling.timesteps(steps)
    x_t = theirs[first][1] if first else sampling.start(z(START), timesteps)
    ours = our_walk(sampling, prediction, x_t, timesteps[first:], first, **options)
    for step, (t, x_t, x_prev) in list(zip(ours, theirs[first:], strict=False))[:last]:
        assert abs(step.t - 1 - t) <= t_tolerance, (step.t, t)
        for actual, reference in ((step.x_t, x_t), (step.x_prev, x_prev)):
            difference = off(actual, reference)
            assert difference <= 1e-5, f"from t = {step.t} to {step.t_prev}: off by {difference:.1e}"
    for _, x_t, x_prev in theirs[first + len(ours) :]:
        assert off(x_prev, x_t) < 1e-6


def check_linked(settings, steps, monkeypatch, **options):
    """`check`; of DDIM each step alone, to where diffusers goes, if its steps do not link up."""
    linked = settings["timestep_spacing"] != "linspace" and 1000 % steps == 0
    if settings["_class_name"] != "DDIMScheduler" or linked:
        return check(settings, steps, monkeypatch, **options)
    sampling, prediction = read_scheduler(settings), settings.get("prediction_type", "epsilon")
    theirs = their_walk(their_scheduler(settings), prediction, steps, monkeypatch)
    assert [t for t, _, _ in theirs][: steps - 1] == [t - 1 for t in sampling.timesteps(steps)[: steps - 1]]
    for t, x_t, x_prev in theirs:
        alpha_bar = sampling.schedule.alpha_bar_at(t + 1)
        ends = t + 1, max(t + 1 - 1000 // steps, sampling.final)
        if ends[0] == ends[1]:
            assert off(x_prev, x_t) < 1e-6
            continue
        walk = ddim(lambda x, *_, a=alpha_bar: answer(x, a, prediction), x_t, None, None, 1, ends, sampling.schedule,
                    clip=sampling.clip, prediction=sampling.prediction)  # fmt: skip
        assert off(next(walk).x_prev, x_prev) <= 1e-5


@each_sampler
@each_spacing
@each_prediction
@pytest.mark.parametrize("steps", STEPS)
def test_every_spacing_and_prediction(sampler, spacing, prediction, steps, monkeypatch):
    if (sampler, prediction) == ("euler_a", "sample"):
        pytest.skip("diffusers' EulerAncestralDiscreteScheduler has no sample prediction")
    settings = config(sampler, timestep_spacing=spacing, prediction_type=prediction, steps_offset=1)
    check_linked(settings, steps, monkeypatch)


@each_sampler
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [5, 20])
def test_other_schedules(sampler, schedule, steps, monkeypatch):
    """The cosine schedule ends at sigma = 20,000: there, in sigma space, float32 has no digits left for x0."""
    settings = {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"}
    for spacing in SPACINGS:
        far = schedule != "linear" and sampler in SIGMA_SPACE and spacing != "leading"
        check_linked(config(sampler, timestep_spacing=spacing, **settings), steps, monkeypatch, first=int(far))


@each_sampler
@each_spacing
@pytest.mark.parametrize("offset", [0, 3])
def test_offsets_and_trained_betas(sampler, spacing, offset, monkeypatch):
    betas = list(np.geomspace(0.001, 0.02, 1000))
    settings = config(sampler, timestep_spacing=spacing, steps_offset=offset, trained_betas=betas)
    check_linked(settings, 5, monkeypatch)


@pytest.mark.parametrize("sampler", ["euler", "heun", *MULTISTEP])
@each_spacing
@pytest.mark.parametrize("steps", STEPS)
def test_karras_levels(sampler, spacing, steps, monkeypatch):
    settings = config(sampler, timestep_spacing=spacing, use_karras_sigmas=True, steps_offset=1)
    check(settings, steps, monkeypatch, t_tolerance=0.5 if sampler in MULTISTEP else 0.01)


@pytest.mark.parametrize("sampler", ["ddim", "euler", *MULTISTEP])
@each_spacing
@pytest.mark.parametrize("steps", [*STEPS, 14, 15])
def test_walks_that_end_before_the_image(sampler, spacing, steps, monkeypatch):
    final = {"set_alpha_to_one": False} if sampler == "ddim" else {"final_sigmas_type": "sigma_min"}
    settings = config(sampler, timestep_spacing=spacing, **final)
    if read_scheduler(settings).spacing != "trailing" and steps == 1 and sampler in ("ddim", "euler"):
        with pytest.raises(ValueError, match="begins where it ends"):
            read_scheduler(settings).timesteps(1)
        return
    check_linked(settings, steps, monkeypatch)


@each_sampler
def test_what_a_file_leaves_open(sampler, monkeypatch):
    check({"_class_name": CLASSES[sampler], "prediction_type": "v_prediction"}, 20, monkeypatch)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping(sampler, prediction, monkeypatch):
    for limit in (0.3, 1.0):
        settings = config(sampler, timestep_spacing="leading", prediction_type=prediction)
        settings.update(clip_sample=True, clip_sample_range=limit)
        check(settings, 20, monkeypatch)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise(eta, prediction, monkeypatch):
    for steps in STEPS:
        settings = config("ddim", timestep_spacing="leading", steps_offset=1, prediction_type=prediction)
        check(settings, steps, monkeypatch, eta=eta)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large"])
@each_spacing
def test_ddpm_variances(kind, spacing, monkeypatch):
    for prediction in PREDICTIONS:
        settings = config("ddpm", timestep_spacing=spacing, prediction_type=prediction, variance_type=kind)
        check(settings, 20, monkeypatch, last=-1 if (kind, spacing) == ("fixed_large", "trailing") else None)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "heun"])
@each_spacing
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(sampler, spacing, prediction, monkeypatch):
    if (sampler, prediction) == ("euler_a", "sample"):
        pytest.skip("diffusers' EulerAncestralDiscreteScheduler has no sample prediction")
    settings = config(sampler, timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=True)
    schedule = read_scheduler(settings).schedule
    assert schedule.alpha_bar[-1] == 0
    if sampler in ("ddpm", "ddim"):
        return check_linked(settings, 20, monkeypatch)
    theirs = Schedule(np.append(schedule.betas[:-1], 1 - 2**-24 / schedule.alpha_bar[-2]))
    far = sampler in SIGMA_SPACE and spacing != "leading"  # sigma = 4096, in float32
    check(settings, 20, monkeypatch, first=int(far), schedule=theirs)


@each_sampler
@pytest.mark.parametrize("folder", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_another_sampler_than_the_folders(sampler, folder, monkeypatch):
    """What `from_config` of the scheduler that is asked for makes of Stable Diffusion's file."""
    settings = config("ddim", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None)
    given = getattr(diffusers, folder).from_config({**settings, "_class_name": folder})
    wanted = getattr(diffusers, CLASSES[sampler]).from_config(given.config)
    ours = read_scheduler({**settings, "_class_name": folder}, sampler)
    wanted.set_timesteps(10)
    timesteps = wanted.timesteps[::2] if sampler == "heun" else wanted.timesteps
    assert np.abs(np.array(ours.timesteps(10)[:-1]) - 1 - timesteps.numpy()).max() < 0.01
    np.testing.assert_allclose(ours.schedule.alpha_bar[1:], wanted.alphas_cumprod.numpy(), rtol=1e-5)
    assert ours.timesteps(10)[-1] == (sampler == "ddim") and ours.clip is None
