"""Whole pipelines: from the same folder, prompt and starting noise, the pictures that diffusers gives."""

import json
import warnings

import numpy as np
import pytest
from folders import SCHEDULER, TEXT, UNET, VAE_
from helpers import import_or_skip
from test_bpe import learned, write_folder

from minidiff.diffusion import Guidance
from minidiff.pretrained import load_pipeline, read_scheduler

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")
transformers = import_or_skip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a photo of the red cat", "a painting of a small house in the mountains, 2 dogs!"]
NEGATIVES = ["", "the other cat"]
CLASSES = {
    "ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler",
}  # fmt: skip
MODELS = {
    "Stable Diffusion 1": ({}, {}, {}),
    "Stable Diffusion 2": (
        {"use_linear_projection": True, "attention_head_dim": [1, 2], "upcast_attention": True},
        {"hidden_act": "gelu", "num_hidden_layers": 3},
        {"prediction_type": "v_prediction"},
    ),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        with torch.no_grad():
            p.copy_(0.7 * noise / p[0].numel() ** 0.5 if p.ndim > 1 else (p == 1) + 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A pipeline of theirs, saved by them."""
    unet, text, scheduler = MODELS[request.param]
    place = tmp_path_factory.mktemp("folder")
    config = {"model_max_length": TEXT["max_position_embeddings"], "pad_token": "<|endoftext|>"}
    write_folder(place / "words", learned(), {**config, "tokenizer_class": "CLIPTokenizer"})
    pipe = diffusers.StableDiffusionPipeline(
        vae=randomise(diffusers.AutoencoderKL(**without_class(VAE_)), 3),
        text_encoder=randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, **text})), 2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(place / "words"),
        unet=randomise(diffusers.UNet2DConditionModel(**without_class({**UNET, **unet})), 1),
        scheduler=diffusers.DDIMScheduler.from_config({**SCHEDULER, **scheduler}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(place / "model")
    return place / "model"


def without_class(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.fixture(scope="module")
def pipes(folder):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs, load_pipeline(folder)


def latents():
    return np.random.default_rng(5).normal(size=(2, 8, 12, 4)).astype(np.float32)


def first(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def their_answer(pipe, sampler, steps, monkeypatch, output="latent", fresh=None, **given):
    """Their latents, channels last; `fresh`: the noise that a stochastic sampler draws, one array a step."""
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, CLASSES[sampler]).from_config(pipe.scheduler.config))
    drawn = iter(fresh or ())
    for place in ("scheduling_ddpm", "scheduling_euler_ancestral_discrete", "scheduling_euler_discrete",
                  "scheduling_heun_discrete", "scheduling_dpmsolver_multistep"):  # fmt: skip
        module = getattr(diffusers.schedulers, place)
        if fresh is not None and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first(next(drawn)))
    start = first(latents())
    x = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=7.5, negative_prompt=NEGATIVES, latents=start,
             height=16, width=24, output_type=output, **given).images  # fmt: skip
    return x.numpy().transpose(0, 2, 3, 1) if output == "latent" else x


def off(ours, theirs):
    assert np.isfinite(theirs).all() and np.isfinite(ours).all() and ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{error:.1e}")
    return error


DETERMINISTIC = [name for name in CLASSES if name not in ("ddpm", "euler_a")]


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers(sampler, steps, pipes, monkeypatch):
    theirs, ours = pipes
    wanted = their_answer(theirs, sampler, steps, monkeypatch)
    found = ours(PROMPTS, steps, 7.5, NEGATIVES, sampler=sampler, latents=latents(), output="latent", progress=False)
    assert found.dtype == np.float32 and off(found, wanted) <= 1e-4


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("sampler", ["ddpm", "euler_a"])
def test_stochastic_samplers_with_their_noise(sampler, steps, pipes, monkeypatch):
    theirs, ours = pipes
    fresh = [np.random.default_rng([7, i]).normal(size=(2, 8, 12, 4)).astype(np.float32) for i in range(steps)]
    wanted = their_answer(theirs, sampler, steps, monkeypatch, fresh=fresh)
    found = ours(PROMPTS, steps, 7.5, NEGATIVES, sampler=sampler, latents=latents(), noise=lambda i: fresh[i],
                 output="latent", progress=False)  # fmt: skip
    assert off(found, wanted) <= 1e-4


def test_pictures_and_guidance_rescaled(pipes, monkeypatch):
    theirs, ours = pipes
    wanted = their_answer(theirs, "ddim", 5, monkeypatch, output="np", guidance_rescale=0.7)
    found = ours(PROMPTS, 5, Guidance(7.5, rescale=0.7), NEGATIVES, latents=latents(), output="array", progress=False)
    assert off(found.clip(-1, 1) / 2 + 0.5, wanted) <= 1e-4
    pictures = ours(PROMPTS, 5, Guidance(7.5, rescale=0.7), NEGATIVES, latents=latents(), progress=False)
    assert np.abs(np.stack(pictures) - np.rint(wanted * 255)).max() <= 1


def test_without_guidance_and_without_a_negative_prompt(pipes):
    theirs, ours = pipes
    for w in (1.0, 3.0):
        wanted = theirs(PROMPTS[0], num_inference_steps=3, guidance_scale=w, latents=first(latents()[:1]),
                        height=16, width=24, output_type="latent").images  # fmt: skip
        found = ours(PROMPTS[0], 3, w, latents=latents()[:1], output="latent", progress=False)
        assert off(found, wanted.numpy().transpose(0, 2, 3, 1)) <= 1e-4


def test_a_prompt_that_is_too_long_is_cut_as_theirs_and_named(pipes):
    theirs, ours = pipes
    prompt = "a photo of the red cat; " * 4 + "mountains"
    wanted = theirs(prompt, num_inference_steps=2, guidance_scale=2.0, latents=first(latents()[:1]), height=16,
                    width=24, output_type="latent").images  # fmt: skip
    with pytest.warns(UserWarning, match="longer than the 16 tokens read; cut off: .*mountains"):
        found = ours(prompt, 2, 2.0, latents=latents()[:1], output="latent", progress=False)
    assert off(found, wanted.numpy().transpose(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_shards(dtype, folder, pipes, tmp_path):
    """Saved by them as float16 or bfloat16, in shards; as float32 again, both give the same."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20kB", variant="fp16" if dtype == torch.float16 else None)
    assert any("-of-" in file.name for file in tmp_path.glob("unet/*"))
    theirs = theirs.to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(PROMPTS[0], num_inference_steps=2, guidance_scale=2.0, latents=first(latents()[:1]), height=16,
                    width=24, output_type="latent").images  # fmt: skip
    found = load_pipeline(tmp_path)(PROMPTS[0], 2, 2.0, latents=latents()[:1], output="latent", progress=False)
    assert off(found, wanted.numpy().transpose(0, 2, 3, 1)) <= 1e-4


def test_replaced_samplers_are_named(folder, tmp_path, pipes, monkeypatch):
    """A folder's PNDM is drawn by DPM-Solver++, and it is said."""
    theirs, _ = pipes
    ours = load_pipeline(folder)
    ours.scheduler = {**ours.scheduler, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    wanted = their_answer(theirs, "dpm++2m", 5, monkeypatch)
    with pytest.warns(UserWarning, match=r"PNDMScheduler is not here; dpm\+\+2m draws in its place"):
        found = ours(PROMPTS, 5, 7.5, NEGATIVES, latents=latents(), output="latent", progress=False)
    assert off(found, wanted) <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(PROMPTS[0], 2, sampler="ddim", output="latent", progress=False)


def test_pixels_of_a_ddpm(tmp_path):
    """UNet2DModel and its scheduler, the noise given; drawn without words."""
    unet = randomise(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, norm_eps=1e-6,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
        ),
        1,
    )  # fmt: skip
    theirs = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type="fixed_large"))
    theirs.save_pretrained(tmp_path)
    ours = load_pipeline(tmp_path)
    z = [np.random.default_rng([9, i]).normal(size=(2, 8, 8, 3)).astype(np.float32) for i in range(6)]
    scheduler, x = theirs.scheduler, first(z[5])
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: first(z[i]))
                x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    found = ours(count=2, steps=5, latents=z[5], noise=lambda i: z[i], output="array", progress=False)
    assert off(found, x.numpy().transpose(0, 2, 3, 1)) <= 1e-4
    assert read_scheduler(json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())).sampler == "ddpm"
