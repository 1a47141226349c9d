"""Pretrained folders: loading, drawing, what is refused, and our own models written as such; against diffusers
itself: test_pipeline_diffusers.py."""

import importlib.util
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from folders import PIXELS, SCHEDULER, edit_json, pixel_model, randomise, stable_diffusion, write_json
from PIL import Image
from safetensors.numpy import load_file, save_file

from minidiff import backend
from minidiff.cli import main
from minidiff.config import SampleConfig
from minidiff.diffusion import Guidance
from minidiff.errors import UserError, UserNotice
from minidiff.models import TextEncoderConfig, UNetConfig
from minidiff.pretrained import export_folder, load_pipeline
from minidiff.samplers import SAMPLERS
from minidiff.tensor import no_grad
from minidiff.text_to_image import DiffusionConfig, TextToImage
from minidiff.train import BUNDLED, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def draw(pipe, prompt="a photo of the red cat", steps=3, **given):
    return pipe(prompt, steps, **{"output": "latent", "progress": False, **given})


# ---- drawing


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_pictures(sampler, pipe):
    for steps in (1, 4):
        try:
            (picture,) = draw(pipe, steps=steps, sampler=sampler, output="image")
        except UserError as e:
            assert (sampler, steps) == ("ddim", 1) and "begins where it ends" in str(e)
            continue
        assert picture.size == (16, 16) and picture.mode == "RGB"


def test_outputs_are_the_same_picture(pipe):
    latents = draw(pipe)
    assert latents.shape == (1, 8, 8, 4) and latents.dtype == np.float32
    images = draw(pipe, output="array")
    assert images.shape == (1, 16, 16, 3) and np.array_equal(images, pipe.decode(latents))
    (picture,) = draw(pipe, output="image")
    assert np.abs(np.asarray(picture) - (images[0].clip(-1, 1) + 1) * 127.5).max() <= 0.51


def test_samples_depend_on_the_seed_and_their_number_alone(pipe):
    both = draw(pipe, ["a photo", "the red cat"])
    again = draw(pipe, ["a photo", "isn't that a small house"])
    np.testing.assert_allclose(both[0], again[0], atol=2e-5)
    assert np.abs(both[1] - again[1]).max() > 1e-2
    four = draw(pipe, "a photo", count=4)
    np.testing.assert_allclose(four[0], both[0], atol=2e-5)
    assert np.abs(draw(pipe, "a photo", seed=1) - four[:1]).max() > 1e-2
    for sampler in ("ddim", "ddpm"):  # parts of a batch, with their own starting noise and their own noise in each step
        whole = draw(pipe, "a photo", sampler=sampler, count=3)
        parts = [draw(pipe, "a photo", sampler=sampler, count=n, first=first) for first, n in ((0, 2), (2, 1))]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-5)


def test_sizes(pipe, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    edit_json(tmp_path / "model" / "unet" / "config.json", sample_size=None)
    unsaid = load_pipeline(tmp_path / "model")
    assert unsaid.size is None and draw(unsaid, size=np.int64(16)).shape == (1, 8, 8, 4)
    with pytest.raises(UserError, match="does not say how large its pictures are: give a size"):
        draw(unsaid)
    assert draw(pipe, size=24).shape == (1, 12, 12, 4)
    assert draw(pipe, size=(16, 32)).shape == (1, 8, 16, 4)
    assert draw(pipe, latents=np.zeros((1, 4, 6, 4))).shape == (1, 4, 6, 4)


def test_the_generator_yields_every_step_and_has_a_length(pipe):
    walk = pipe.denoise("a photo", 5, sampler="euler")
    assert len(walk) == 5
    steps = list(walk)
    assert len(steps) == 5 and steps[-1].t_prev == 0
    for before, after in pairwise(steps):
        assert np.array_equal(before.x_prev, after.x_t)
    assert np.array_equal(steps[-1].x_prev, draw(pipe, "a photo", 5, sampler="euler"))


def test_guidance(pipe):
    plain, guided = draw(pipe, guidance=1.0), draw(pipe, guidance=7.5)
    assert np.abs(plain - guided).max() > 1e-2
    negative = draw(pipe, guidance=7.5, negative_prompt="the other cat")
    assert np.abs(negative - guided).max() > 1e-2
    assert np.abs(draw(pipe, guidance=7.5, negative_prompt="a photo of the red cat") - plain).max() < 1e-3
    nowhere = draw(pipe, guidance=Guidance(7.5, interval=(1000, 1000)), sampler="euler_a")
    np.testing.assert_allclose(nowhere, draw(pipe, guidance=1.0, sampler="euler_a"), atol=1e-4)


def test_one_negative_prompt_for_each_prompt(pipe):
    prompts = ["a photo", "the red cat"]
    both = draw(pipe, prompts, negative_prompt=["dogs", "a house"], count=2)
    one = draw(pipe, [prompts[1]], negative_prompt="a house", latents=pipe_noise(pipe, 4)[2:3])
    np.testing.assert_allclose(both[2:3], one, atol=2e-5)
    for texts, negatives, count in ((prompts, 3, 1), (prompts, 3, 3), (prompts * 2, 2, 1), (prompts[:1], 2, 4)):
        with pytest.raises(UserError, match=f"one for each prompt; got {negatives} for {len(texts)}"):
            draw(pipe, texts, negative_prompt=["a"] * negatives, count=count)


def pipe_noise(pipe, n):
    return pipe._noise(None, 0, range(n), (n, 8, 8, 4))


@pytest.mark.parametrize("given", [dict(sampler="ddpm"), dict(sampler="euler_a"), dict(sampler="ddim", eta=1.0)])
def test_noise_of_our_own(given, pipe):
    zeros = np.zeros((1, 8, 8, 4), np.float32)
    drawn, own = draw(pipe, **given), draw(pipe, **given, noise=lambda i: zeros)
    assert np.abs(own - drawn).max() > 1e-2
    assert np.array_equal(drawn, draw(pipe, **given))
    doubles = draw(pipe, **given, noise=lambda i: np.zeros((1, 8, 8, 4)))
    assert doubles.dtype == np.float32 and np.array_equal(doubles, own)
    with pytest.raises(UserError, match=r"noise must be \(B, h, w, c\) = \(1, 8, 8, 4\) .*, got \(8, 8, 4\)"):
        draw(pipe, **given, noise=lambda i: zeros[0])


def test_long_prompts_are_cut_and_the_words_named(pipe):
    with pytest.warns(UserNotice, match=r"cut off: .*mountains"):
        draw(pipe, "a photo of the red cat; " * 4 + "mountains")


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(steps=0), "steps must be in 1..1000, got 0"),
        (dict(steps=1001), "steps must be in 1..1000, got 1001"),
        (dict(size=22), "divide by 4, got 22x22"),
        (dict(size=(16, 18)), "got 16x18 (height x width); try 16x16"),
        (dict(size=0), "got 0x0 (height x width); try 4x4"),
        (dict(size=-4), "got -4x-4"),
        (dict(latents=np.zeros((2, 8, 8, 4))), "latents must be (B, h, w, c) = (1, 8, 8, 4)"),
        (dict(latents=np.zeros((1, 8, 8, 3))), "latents must be (B, h, w, c) = (1, 8, 8, 4)"),
        (dict(latents=np.zeros((1, 7, 8, 4))), "divide by 4, got 14x16"),
        (dict(latents=np.zeros((8, 8, 4))), "latents must be an array (B, h, w, c), got (8, 8, 4)"),
        (dict(latents=[[0.0]]), "latents must be an array (B, h, w, c), got list"),
        (dict(latents=np.zeros((1, 8, 8, 4)), seed=-1), "the seed must be in"),
        (dict(seed=1.5), "the seed must be in 0..2^64 - 1, got 1.5"),
        (dict(size="16"), "size must be pixels, one number or (height, width), got '16'"),
        (dict(size=(16, 16, 3)), "size must be pixels"),
        (dict(size=16.0), "size must be pixels"),
        (dict(size=2**20), "sizes go up to 16384 pixels a side"),
        (dict(steps=3.0), "steps must be a whole number, got 3.0"),
        (dict(steps="3"), "steps must be a whole number, got '3'"),
        (dict(eta=2.0), "eta must be in 0..1, got 2.0"),
        (dict(eta=float("nan")), "eta must be in 0..1, got nan"),
        (dict(guidance=float("nan")), "guidance must be a number or a Guidance, got nan"),
        (dict(guidance="7"), "guidance must be a number or a Guidance, got '7'"),
        (dict(latents=np.zeros((1, 8, 8, 4)), size=16), "the size or the latents, not both"),
        (dict(sampler="pndm"), "'pndm' is not one of ddpm, ddim"),
        (dict(sampler="euler", eta=0.5), "eta is ddim's; euler has none"),
        (dict(prompt=[]), "nothing to draw: 0 prompts"),
        (dict(count=0), "nothing to draw: 1 prompts, 0 times"),
        (dict(first=-1), "first, a sample's number, must not be negative, got -1"),
        (dict(seed=-1), "the seed must be in 0..2^64 - 1"),
        (dict(negative_prompt=[]), "give one negative prompt"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(given, told, pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *_: pytest.fail("the U-Net was asked"))
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        draw(pipe, **given)
    assert "\n" not in str(caught.value)


def test_outputs_that_are_none(pipe):
    with pytest.raises(ValueError, match="output must be image, array or latent, got 'pil'"):
        draw(pipe, output="pil")


# ---- pixels, without words


def test_a_model_of_pixels(tmp_path):
    pipe = load_pipeline(pixel_model(tmp_path))
    assert pipe.size == (8, 8) and pipe.vae is None
    pictures = pipe(count=2, steps=3, progress=False)
    assert [p.size for p in pictures] == [(8, 8), (8, 8)]
    for given in (dict(prompt="a cat"), dict(negative_prompt="a dog")):
        with pytest.raises(UserError, match="this model knows no words"):
            pipe(steps=2, **given)


def test_pixels_need_as_many_channels_out_as_in(tmp_path):
    pixel_model(tmp_path)
    edit_json(tmp_path / "config.json", out_channels=6)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = np.concatenate([tensors[name]] * 2)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="3 channels in and 6 out; one that also predicts a variance"):
        load_pipeline(tmp_path)


# ---- loading


def test_another_sampler_draws_where_the_folders_own_cannot(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    changes = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    edit_json(tmp_path / "model" / "scheduler" / "scheduler_config.json", **changes)
    pipe = load_pipeline(tmp_path / "model")
    assert draw(pipe, sampler="ddim").shape == (1, 8, 8, 4)
    with pytest.raises(UserError, match=r"algorithm_type = 'sde-dpmsolver\+\+'.*; name another sampler"):
        draw(pipe)


def test_a_device_that_is_not_here(folder):
    if importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is here")
    with pytest.raises(UserError, match="'cuda' needs CuPy"):
        load_pipeline(folder, "cuda")


def test_weights_are_float32_whatever_they_were(folder, tmp_path, pipe):
    half = load_pipeline(stable_diffusion(tmp_path, np.float16))
    for (name, p), q in zip(pipe.unet.named_parameters(), half.unet.parameters(), strict=True):
        assert q.data.dtype == np.float32 and np.array_equal(p.data.astype(np.float16), q.data), name


def remove(*path):
    return lambda f: f.joinpath(*path).unlink() if f.joinpath(*path).is_file() else shutil.rmtree(f.joinpath(*path))


def edit(*path, **changes):
    return lambda f: edit_json(f.joinpath(*path), **changes)


def weights(change, *path):
    def apply(f):
        tensors = load_file(f.joinpath(*path))
        change(tensors)
        save_file(tensors, f.joinpath(*path))

    return apply


def truncate(*path):
    return lambda f: f.joinpath(*path).write_bytes(f.joinpath(*path).read_bytes()[:-5])


UNET_FILE = ("unet", "diffusion_pytorch_model.safetensors")
FAULTS = {
    "no index": (remove("model_index.json"), "cannot read .*model_index.json: No such file"),
    "an index that is not JSON": (lambda f: (f / "model_index.json").write_text("{"), "index.json is not valid JSON"),
    "another pipeline": (edit("model_index.json", _class_name="FluxPipeline"), "has no 'FluxPipeline', only Sta"),
    "no class": (edit("model_index.json", _class_name=None), "minidiff has no None"),
    "no VAE in the index": (edit("model_index.json", vae=[None, None]), "model_index.json names no vae"),
    "a part of no meaning": (edit("model_index.json", controlnet=["diffusers", "X"]), "names controlnet, of which"),
    "no U-Net": (remove("unet"), r"model has no unet/; download the folder again"),
    "no U-Net config": (remove("unet", "config.json"), "cannot read .*unet/config.json: No such file"),
    "no U-Net weights": (remove(*UNET_FILE), r"unet has no diffusion_pytorch_model\.safetensors"),
    "no text weights": (remove("text_encoder", "model.safetensors"), r"text_encoder has no model\.safetensors"),
    "no tokenizer": (remove("tokenizer", "merges.txt"), "merges.txt: No such file"),
    "no scheduler": (remove("scheduler"), r"model has no scheduler/; download"),
    "no scheduler file": (remove("scheduler", "scheduler_config.json"), "cannot read .*scheduler_config.json"),
    "truncated weights": (truncate(*UNET_FILE), "is missing, truncated or damaged"),
    "a weight missing": (weights(lambda t: t.pop("conv_in.bias"), *UNET_FILE), r"unet: .*missing: conv_in\.bias"),
    "a weight too many": (weights(lambda t: t.update(x=t["conv_in.bias"]), *UNET_FILE), "not in the model: x"),
    "a weight of another shape": (
        weights(lambda t: t.update({"conv_in.bias": np.zeros(3, np.float32)}), *UNET_FILE),
        r"of another shape: conv_in.bias \(3,\) instead of \(8,\)",
    ),
    "a config of another size": (edit("unet", "config.json", block_out_channels=[8, 24]), "of another shape"),
    "a U-Net of no known kind": (edit("unet", "config.json", act_fn="relu"), r"act_fn = 'relu' \(only 'silu'\)"),
    "an inpainting U-Net": (edit("vae", "config.json", latent_channels=9), "a picture or a mask beside the noise"),
    "a wider text encoder": (edit("text_encoder", "config.json", hidden_size=32), "are 32 wide, the U-Net wants 16"),
    "too small a vocabulary": (edit("text_encoder", "config.json", vocab_size=700), "another shape: token_embedding"),
    "a sample size of text": (edit("unet", "config.json", sample_size="8"), "sample_size should be a whole number"),
    "a huge sample size": (edit("unet", "config.json", sample_size=10**9), "sample_size should be .* up to 16384"),
    "a huge width": (edit("unet", "config.json", block_out_channels=[10**30, 16]), "not know block_out_channels = "),
    "too many layers": (edit("unet", "config.json", layers_per_block=10**8), "not know layers_per_block = 100000000"),
    "a huge epsilon": (edit("unet", "config.json", norm_eps=10**400), "does not know norm_eps = 1000"),
    "a huge shift": (edit("unet", "config.json", freq_shift=10**400), "does not know freq_shift = 1000"),
    "a shift that divides by 0": (edit("unet", "config.json", freq_shift=4), "freq_shift should be below 4"),
    "a text encoder too deep": (edit("text_encoder", "config.json", num_hidden_layers=10**8), "num_hidden_layers = 1"),
    "a huge scale": (edit("vae", "config.json", scaling_factor=10**400), "does not know scaling_factor"),
    "a U-Net without words": (
        lambda f: write_json(f / "unet" / "config.json", PIXELS), "'UNet2DModel', which does not fit model_index"
    ),
    "more channels out than in": (edit("unet", "config.json", out_channels=8), "another shape: conv_out"),
    "words of textual inversion": (
        lambda f: write_json(f / "tokenizer" / "added_tokens.json", {"<cat-toy>": 714}), "adds tokens .*'<cat-toy>'"
    ),
    "a scheduler of no meaning": (
        edit("scheduler", "scheduler_config.json", _class_name="X"), "scheduler_config.json: 'X' is not one of"
    ),
    "a scheduler that lies": (edit("scheduler", "scheduler_config.json", beta_end=7), "beta_end should be between"),
    "betas of nothing": (edit("scheduler", "scheduler_config.json", beta_start=1e-17), "and make some noise"),
    "zero terminal SNR": (edit("scheduler", "scheduler_config.json", rescale_betas_zero_snr=True), "not epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folders_are_one_sentence(fault, folder, tmp_path):
    break_it, told = FAULTS[fault]
    shutil.copytree(folder, tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(UserError, match=told) as caught:
        load_pipeline(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_words_than_the_text_encoder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    vocabulary = tmp_path / "model" / "tokenizer" / "vocab.json"
    edit_json(vocabulary, **{"more</w>": 10**6})
    with pytest.raises(UserError, match="the tokenizer has an id 1000000, but the text encoder only"):
        load_pipeline(tmp_path / "model")


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors", "nowhere"])
def test_what_is_not_a_folder(name, tmp_path):
    if "." in name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="is not a folder; name a model in diffusers' layout"):
        load_pipeline(tmp_path / name)


# ---- our own models in that layout


def trained(prediction="x0", patch=2, attention=("none", "cross")):
    unet = UNetConfig(
        channels=(8, 16), blocks=1, attention=attention, heads=(2, 2), transformer_layers=(1, 1), norm_groups=4
    )
    text = TextEncoderConfig(context=8, width=16, layers=2, heads=2)
    words = ["red", "blue", "circle", "über", "2", "a"]
    return randomise(TextToImage(unet, text, DiffusionConfig(prediction=prediction, patch=patch), words, (16, 24, 3)))


@pytest.mark.parametrize("prediction, patch", [("x0", 2), ("eps", 1), ("v", 4)])
def test_what_we_write_we_read(prediction, patch, tmp_path):
    """The same weights, words, schedule and pictures."""
    model = trained(prediction, patch)
    export_folder(model, tmp_path / "out", SampleConfig(steps=11, guidance=2.5))
    pipe = load_pipeline(tmp_path / "out")
    assert (pipe.steps, pipe.guidance) == (11, 2.5) and len(pipe.denoise("a red circle")) == 11
    for part, ours in ((pipe.unet, model.unet), (pipe.text_encoder, model.text_encoder)):
        for (name, p), q in zip(part.named_parameters(), ours.parameters(), strict=True):
            assert np.array_equal(p.data, q.data), name
    assert pipe.tokenizer.words == model.tokenizer.words and pipe.size == (16, 24) and pipe.masked
    x_T = pipe_noise_like(model)
    found = pipe("a red circle", 4, 2.0, sampler="ddim", latents=x_T, output="array", progress=False)
    with no_grad():
        cond, uncond = (model.condition([text]) for text in ("a red circle", ""))
    walk = SAMPLERS["ddim"](model.unet, x_T, cond, uncond, 2.0, [1000, 750, 500, 250, 0], model.schedule,
                            clip=1.0, prediction=prediction)  # fmt: skip
    *_, last = walk
    assert np.abs(found - model.decode(last.x_prev)).max() <= 1e-4
    with pytest.raises(UserError, match="does not know 'green', 'square'"):
        pipe("a green square", 2)


def pipe_noise_like(model):
    return np.random.default_rng(3).normal(size=(1, *model.latent_shape)).astype(np.float32)


def test_what_diffusers_has_not_is_not_written(tmp_path):
    with pytest.raises(UserError, match="diffusers' conditional U-Net has cross-attention in the middle"):
        export_folder(trained(attention=("self", "cross")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; remove it or choose another folder"):
        export_folder(trained(), tmp_path / "out")
    monkeypatch.setattr("minidiff.pretrained.export.tokenizer_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_folder(trained(), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "change", [lambda v: v.update(red=99), lambda v: v.pop("<end>"), lambda v: v.update(red="x"), lambda v: v.clear()]
)
def test_a_word_list_that_lies(change, tmp_path):
    export_folder(trained(), tmp_path / "out")
    file = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content["model"]["vocab"])
    write_json(file, content)
    with pytest.raises(UserError, match=r"tokenizer\.json: its words are not those of a tokenizer that minidiff wrote"):
        load_pipeline(tmp_path / "out")


# ---- the command line


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_the_command_draws_one_picture_pixel_for_pixel(folder, tmp_path, capsys):
    out = tmp_path / "cat.png"
    status, told, _ = run(capsys, "sample", "the red cat", "--pretrained", folder, "--out", out, "--size", "16x24",
                          "--sample.steps", 2, "--sample.sampler", "dpm++2m", "--negative", "dogs",
                          "--seed", 3)  # fmt: skip
    assert status == 0 and told.strip() == str(out)
    picture = Image.open(out)
    assert picture.size == (24, 16)
    text = picture.text
    assert text["prompt"] == "the red cat" and text["sampler"] == "dpm++2m" and text["negative"] == "dogs"
    assert (text["clip"], text["spacing"], text["steps"], text["guidance"]) == ("None", "leading", "2", "7.5")
    (again,) = load_pipeline(folder)("the red cat", 2, 7.5, "dogs", 3, "dpm++2m", (16, 24), progress=False)
    assert np.array_equal(np.asarray(picture), np.asarray(again))


def test_the_command_draws_several_into_a_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, told, _ = run(capsys, "sample", "a cat", "a dog", "--count", 2, "--pretrained", folder, "--sample.steps", 2)
    assert (status, told) == (0, "sample-001\n")
    pictures = sorted((tmp_path / "sample-001").iterdir())
    assert [Image.open(p).text["prompt"] for p in pictures] == ["a cat", "a cat", "a dog", "a dog"]
    assert [Image.open(p).text["sampler"] for p in pictures] == ["ddim"] * 4
    monkeypatch.setattr("minidiff.cli.TOGETHER", 3)  # in two parts: the same pictures, and every notice once
    long = "a cat " * 40
    several = run(capsys, "sample", "a cat", "a dog", "--count", 2, "--pretrained", folder, "--sample.steps", 2)
    assert several[:2] == (0, "sample-002\n")
    for one, other in zip(pictures, sorted((tmp_path / "sample-002").iterdir()), strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 1
    status, _, notes = run(capsys, "sample", long, "--count", 4, "--pretrained", folder, "--sample.steps", 1)
    assert status == 0 and notes.count("cut off") == 1


def test_the_command_says_what_is_done_otherwise(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    write_json(
        tmp_path / "model" / "scheduler" / "scheduler_config.json", {**SCHEDULER, "_class_name": "PNDMScheduler"}
    )
    prompt = "a photo of the red cat; " * 4 + "mountains"
    status, _, told = run(capsys, "sample", prompt, "--pretrained", tmp_path / "model", "--out", tmp_path / "a.png",
                          "--sample.steps", 2)  # fmt: skip
    lines = [line for line in told.splitlines() if line.startswith("minidiff: ")]
    assert status == 0 and lines[0] == "minidiff: PNDMScheduler is not here; dpm++2m draws in its place"
    assert lines[1].startswith("minidiff: the text is longer than the 16 tokens read; cut off: ") and len(lines) == 2


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--sample.clip", "true"], "--sample.clip: a pretrained model's own scheduler_config.json decides it"),
        (["--run", "runs/demo"], "--run and --pretrained both name a model"),
        (["--size", "big"], "--size must be pixels, like 512 or 512x768"),
        (["--size", "16x16x3"], "--size must be pixels"),
        (["--size", "18"], "divide by 4, got 18x18"),
        (["--size", "1048576"], "sizes go up to 16384"),
        (["--weights", "raw"], "--weights is for runs of our own"),
        (["--pretrained", "nowhere"], "nowhere is not a folder"),
        (["--sample.steps", "1001"], "steps"),
        (["--sample.sampler", "pndm"], "sample.sampler: 'pndm' is not one of"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_leaves_nothing(arguments, told, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, "sample", "a cat", "--pretrained", folder, *arguments)
    assert status == 1 and told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_pictures_go_where_there_is_no_folder_yet_or_nothing_is_drawn(folder, tmp_path, capsys):
    command = ["sample", "a cat", "--pretrained", folder, "--sample.steps", 2, "--out"]
    assert run(capsys, *command, tmp_path / "new" / "x.png")[0] == 0 and (tmp_path / "new" / "x.png").exists()
    (tmp_path / "file").write_text("")
    status, _, told = run(capsys, *command, tmp_path / "file" / "x.png")
    assert status == 1 and "nothing can be written into" in told
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "x.png"]


def test_what_an_exported_folder_keeps(tmp_path, capsys):
    status, _, told = run(capsys, "export", BUNDLED, "--out", tmp_path / "a", "--sample.sampler", "ddpm")
    assert status == 1 and "--sample.sampler is not kept in a folder, only --sample.clip, --sample.guidance" in told
    assert run(capsys, "export", BUNDLED, "--out", tmp_path / "a", "--sample.steps", 3)[0] == 0
    command = ["sample", "a red circle", "--pretrained", tmp_path / "a", "--out", tmp_path / "x.png"]
    assert run(capsys, *command)[0] == 0
    told = Image.open(tmp_path / "x.png").text
    assert (told["steps"], told["guidance"]) == ("3", str(load_model(BUNDLED)[1].sample.guidance))


def test_flags_of_pretrained_models_alone(capsys):
    for flag in ("--negative", "--size"):
        status, _, error = run(capsys, "sample", "a red circle", flag, "16")
        assert status == 1 and "--negative and --size are for --pretrained models" in error


def test_arrays_stay_where_they_are(pipe):
    assert pipe.array_module is np and pipe.to("cpu") is pipe
    assert backend.array_module(pipe.condition(["a cat"])[0]) is np
    assert PIXELS["sample_size"] == 8
