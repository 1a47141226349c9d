import numpy as np
import pytest
from test_train import config

from minidiff.config import SampleConfig
from minidiff.diffusion import sigma
from minidiff.sample import denoise, draw
from minidiff.train import new_state


@pytest.fixture(scope="module")
def model():
    """A random network; its zero-initialised layers too, so that the caption matters."""
    model = new_state(config()).model
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data = rng.normal(scale=0.3, size=p.shape).astype(np.float32)
    return model


CAPTIONS = ["a red circle", "a blue square", "a red circle above a blue square"]


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_a_picture_does_not_change_with_its_batch(model, sampler, eta):
    settings = SampleConfig(sampler, steps=4, guidance=2.0, eta=eta)
    together = draw(model, CAPTIONS, settings, seed=3)
    apart = draw(model, CAPTIONS, settings, seed=3, batch=1)
    assert together.shape == (3, 32, 32, 3) and np.isfinite(together).all()
    assert np.abs(together - apart).max() < 1e-4
    assert np.abs(together - draw(model, CAPTIONS, settings, seed=4)).max() > 0.1


def test_the_caption_and_the_guidance_matter(model):
    settings = SampleConfig(steps=4, guidance=2.0)
    red, blue = draw(model, ["a red circle"], settings), draw(model, ["a blue square"], settings)
    assert np.abs(red - blue).max() > 1e-3
    stronger = draw(model, ["a red circle"], SampleConfig(steps=4, guidance=8.0))
    assert np.abs(red - stronger).max() > 1e-3


@pytest.mark.parametrize("settings", [SampleConfig("ddpm", steps=6), SampleConfig("ddim", steps=6, eta=1.0)])
def test_every_step_has_its_own_noise_and_none_of_it_is_the_first(model, settings):
    """The noise that a step added, from its parts: x_prev - sqrt(alpha_bar_prev) x0 - sqrt(...) eps, standardised."""
    steps = list(denoise(model, ["a red circle"], settings, seed=1))
    start = steps[0].x_t.ravel()
    fresh = []
    for s in steps[:-1]:
        ab = model.schedule.alpha_bar_at(s.t_prev)
        std = sigma(s.t, model.schedule, "small", s.t_prev)
        rest = np.sqrt(ab) * s.x0 + np.sqrt(np.maximum(1 - ab - std**2, 0)) * s.eps
        fresh.append(((s.x_prev - rest) / std).ravel())
    assert all(abs(z.std() - 1) < 0.2 for z in fresh)
    for i, z in enumerate(fresh):
        for other in [start, *fresh[:i]]:
            assert abs(np.corrcoef(z, other)[0, 1]) < 0.2


def test_the_large_sigma_adds_more_noise(model):
    small, large = (draw(model, CAPTIONS, SampleConfig("ddpm", steps=4, sigma=kind)) for kind in ("small", "large"))
    assert np.abs(small - large).max() > 1e-3


def test_every_step_is_yielded(model):
    steps = list(denoise(model, CAPTIONS, SampleConfig(steps=5)))
    assert [s.t for s in steps] == [1000, 800, 600, 400, 200] and steps[-1].t_prev == 0
    assert steps[0].x_t.shape == (3, *model.latent_shape)
    assert model.decode(steps[0].x0).shape == (3, 32, 32, 3)
