"""Our trained model in diffusers and transformers: the same words, tokens and noise from the folder that we write."""

import warnings

import numpy as np
import pytest
from helpers import import_or_skip

from minidiff.pretrained import export_folder
from minidiff.tensor import no_grad
from minidiff.train import BUNDLED, load_model

torch = import_or_skip("torch")
diffusers = import_or_skip("diffusers")
transformers = import_or_skip("transformers")

CAPTIONS = ["a red circle above a blue square", "", "a small Green triangle", "a  yellow_square left of 2 circles"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The model in the box, which was trained as `make demo` trains, and the folder it is written to."""
    model, _ = load_model(BUNDLED)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_folder(model, folder)
    return model, folder


def test_the_same_ids_and_masks(both):
    model, folder = both
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    captions = [*CAPTIONS, *(word.upper() for word in model.tokenizer.words), "a CIRCLE, (red)!", "nobody knows this"]
    found = theirs(captions, padding="max_length", truncation=True, return_tensors="np")
    ids, mask = model.tokenizer(captions, model.text_encoder.config.context)
    assert np.array_equal(found["input_ids"], ids) and np.array_equal(found["attention_mask"] != 0, mask)


def test_the_same_eps(both):
    """From the caption to eps: each part loaded by its own library."""
    model, folder = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    np.testing.assert_allclose(scheduler.alphas_cumprod, model.schedule.alpha_bar[1:], rtol=1e-4, atol=1e-7)
    ids, mask = model.tokenizer(CAPTIONS, model.text_encoder.config.context)
    x_t = np.random.default_rng(0).normal(size=(len(CAPTIONS), *model.latent_shape)).astype(np.float32)
    t = np.array([1, 250, 700, 950])
    with torch.no_grad():
        tokens = text_encoder(torch.from_numpy(ids)).last_hidden_state
        answer = unet(
            torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t - 1), tokens,
            encoder_attention_mask=torch.from_numpy(mask),
        ).sample.numpy().transpose(0, 2, 3, 1)  # fmt: skip
    with no_grad():
        ours = model.condition(CAPTIONS)
        close(tokens.numpy(), ours[0].data, "tokens")
        close(answer, model.unet(x_t, t, ours).data, "the U-Net's answer")
        eps = model(x_t, t, ours)
    alpha_bar = model.schedule.alpha_bar[t][:, None, None, None]
    assert scheduler.config.prediction_type == "sample"
    close((x_t - alpha_bar**0.5 * answer) / (1 - alpha_bar) ** 0.5, eps, "eps")


def close(theirs, ours, name):
    """A sample at a time: eps at t = 1 is large, for it is what x0 is off by, times a hundred."""
    for b, (a, wanted) in enumerate(zip(theirs, ours, strict=True)):
        assert np.isfinite(a).all() and np.isfinite(wanted).all()
        error = np.abs(a - wanted).max() / np.abs(wanted).max()
        print(f"{name} {b}: {error:.1e}")
        assert error <= 1e-4, f"{name}, sample {b}: off by {error:.1e}"
