"""From a caption to what the U-Net sees of it: tokenizer, text encoder, and the whole TextToImage model."""

import re
from dataclasses import replace

import numpy as np
import pytest

from minidiff.diffusion import guided_eps, q_sample
from minidiff.errors import UserError
from minidiff.models import TextEncoder, TextEncoderConfig, UNetConfig, parameter_count
from minidiff.tensor import Tensor, no_grad
from minidiff.text import WordTokenizer
from minidiff.text_to_image import DiffusionConfig, TextToImage, depth_to_space, space_to_depth

WORDS = ("a", "red", "blue", "circle", "2")
PAD, START, END, UNKNOWN, A, RED, BLUE, CIRCLE, TWO = range(9)


# ---- the tokenizer


def test_a_caption_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="'a red circle a blue circle' has 6 words; the model reads at most 5"):
        WordTokenizer(WORDS)(["a", "a red circle a blue circle"], 7)


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("", [START, END]),
        ("  ", [START, END]),
        ("a red circle", [START, A, RED, CIRCLE, END]),
        ("A RED, Circle!", [START, A, RED, CIRCLE, END]),
        ("red-blue_circle", [START, RED, BLUE, CIRCLE, END]),
        ("a green circle", [START, A, UNKNOWN, CIRCLE, END]),
        ("2 circles", [START, TWO, UNKNOWN, END]),
        ("<pad> <end>", [START, UNKNOWN, UNKNOWN, END]),
        ("a\n\tred\u00a0circle", [START, A, RED, CIRCLE, END]),
        ("re\u0301d cafe\u0301", [START, UNKNOWN, UNKNOWN, END]),
        ("ein Grüßchen 丸 🔴", [START, UNKNOWN, UNKNOWN, UNKNOWN, END]),
        ("a red circle a blue", [START, A, RED, CIRCLE, A, BLUE, END]),
    ],
)
def test_a_caption_becomes_tokens_between_start_and_end(caption, tokens):
    ids, mask = WordTokenizer(WORDS)([caption], 7)
    assert ids.tolist() == [tokens + [PAD] * (7 - len(tokens))]
    assert mask.tolist() == [[True] * len(tokens) + [False] * (7 - len(tokens))]
    assert ids.dtype == np.int64 and mask.dtype == bool


def test_captions_of_a_batch_are_padded_to_one_length():
    tokenizer = WordTokenizer(WORDS)
    ids, mask = tokenizer(["red", "", "a blue circle"], 5)
    assert ids.tolist() == [[1, RED, 2, 0, 0], [1, 2, 0, 0, 0], [1, A, BLUE, CIRCLE, 2]]
    assert mask.sum(axis=1).tolist() == [3, 2, 5]
    assert len(tokenizer) == 4 + len(WORDS)


def test_words_may_be_any_letters():
    ids, _ = WordTokenizer(("grün", "цвет", "丸"))(["GRÜN Цвет 丸"], 5)
    assert ids.tolist() == [[START, 4, 5, 6, END]]
    ids, _ = WordTokenizer(("grün", "café"))(["GRU\u0308N cafe\u0301 CAFÉ"], 5)  # accents by themselves
    assert ids.tolist() == [[START, 4, 5, 5, END]]


def test_unknown_words_are_named():
    assert WordTokenizer(WORDS).unknown("A green, red tri-angle!") == ["green", "tri", "angle"]
    assert WordTokenizer(WORDS).unknown("") == []


def test_a_word_given_twice_and_a_length_without_start_and_end_are_refused():
    with pytest.raises(ValueError, match="3 words has a word twice"):
        WordTokenizer(("red", "blue", "red"))
    with pytest.raises(ValueError, match="length of at least 2"):
        WordTokenizer(WORDS)(["red"], 1)


# ---- the text encoder


CONFIG = TextEncoderConfig(vocabulary=9, context=7, width=12, layers=2, heads=3)


def randomised(module, seed=0, dtype=np.float64):
    """Every parameter random, those that begin at 0 or 1 too."""
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        p.data = ((p.init == "ones") + rng.normal(0, 0.3, p.wanted_shape)).astype(dtype)
    return module


@pytest.mark.parametrize("length", (1, 4, 7))
@pytest.mark.parametrize("dtype", (np.int64, np.int32, np.uint8))
def test_every_token_becomes_a_vector(length, dtype):
    y = TextEncoder(CONFIG)(np.ones((3, length), dtype))
    assert y.shape == (3, length, 12) and y.dtype == np.float32 and np.isfinite(y.data).all()


def test_a_token_is_not_changed_by_later_ones_but_changes_them():
    encoder, ids = randomised(TextEncoder(CONFIG)), np.arange(1, 8)[None]
    before = encoder(ids).data[0]
    for place in range(7):
        changed = ids.copy()
        changed[0, place] = 8
        moved = np.abs(encoder(changed).data[0] - before).max(axis=-1)
        assert not moved[:place].any() and (moved[place:] > 1e-6).all()


def test_a_shorter_caption_is_the_beginning_of_a_longer_one():
    encoder, ids = randomised(TextEncoder(CONFIG)), np.arange(1, 8)[None]
    assert np.abs(encoder(ids[:, :4]).data - encoder(ids).data[:, :4]).max() <= 1e-12


def test_the_order_of_words_matters():
    encoder = randomised(TextEncoder(CONFIG))
    red_blue, blue_red = encoder(np.array([[START, RED, BLUE], [START, BLUE, RED]])).data
    assert np.abs(red_blue[1:] - blue_red[1:]).min(axis=-1).max() > 1e-6
    assert np.abs(red_blue[1] - blue_red[2]).max() > 1e-3


def test_every_parameter_of_the_encoder_has_a_gradient():
    """The keys' bias has none, and the tables only where they were looked up."""
    encoder, ids = randomised(TextEncoder(CONFIG)), np.array([[START, RED, BLUE, END], [START, A, END, PAD]])
    encoder(ids).backward(np.random.default_rng(1).normal(size=(2, 4, 12)))
    for name, p in encoder.named_parameters():
        assert np.isfinite(p.grad).all(), name
        assert (np.abs(p.grad).max() > 1e-4) != name.endswith("k_proj.bias"), name
    assert encoder.token_embedding.weight.grad.any(axis=1).tolist() == [i in ids for i in range(9)]
    assert encoder.position_embedding.weight.grad.any(axis=1).tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    "ids, error, told",
    [
        (np.ones((2, 8), np.int64), ValueError, "wanted ids (B, L) with L <= 7, got (2, 8)"),
        (np.ones(4, np.int64), ValueError, "wanted ids (B, L) with L <= 7, got (4,)"),
        (np.array([[1, 9]]), IndexError, "ids from 1 to 9 do not fit a table of 9 rows"),
        (np.array([[-1, 2]]), IndexError, "ids from -1 to 2 do not fit a table of 9 rows"),
        (np.ones((2, 4)), TypeError, "ids must be integers, got float64"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, error, told):
    with pytest.raises(error, match=re.escape(told)):
        TextEncoder(CONFIG)(ids)


def test_clips_text_encoder_has_its_number_of_parameters():
    config = TextEncoderConfig(vocabulary=49408, context=77, width=768, layers=12, heads=12)
    assert parameter_count(TextEncoder(config, seed=None)) == 123_060_480


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match=r"text\.width: 12 does not divide into 5 heads"):
        replace(CONFIG, heads=5)
    with pytest.raises(ValueError, match="into 0 heads"):
        replace(CONFIG, heads=0)


# ---- the whole model


def whole(prediction="eps", patch=2, image_shape=(8, 12, 3), seed=0):
    unet = UNetConfig(channels=(8,), attention=("cross",), heads=(2,), transformer_layers=(1,), blocks=1, norm_groups=4)
    text = TextEncoderConfig(context=6, width=8, layers=1, heads=2)
    diffusion = DiffusionConfig(schedule="cosine", T=100, prediction=prediction, patch=patch)
    return TextToImage(unet, text, diffusion, WORDS, image_shape, seed)


def pictures(B=3, dtype=np.float32):
    return np.random.default_rng(5).uniform(-1, 1, (B, 8, 12, 3)).astype(dtype)


@pytest.mark.parametrize("patch, latent_shape", [(1, (8, 12, 3)), (2, (4, 6, 12)), (4, (2, 3, 48))])
def test_encode_and_decode_lose_nothing(patch, latent_shape):
    model, images = whole(patch=patch), pictures()
    x = model.encode(images)
    assert x.shape == (3, *latent_shape) == (3, *model.latent_shape)
    assert np.array_equal(model.decode(x), images)
    assert np.array_equal(np.sort(x, axis=None), np.sort(images, axis=None))


def test_a_patch_becomes_the_channels_of_its_position():
    images = pictures()
    x = space_to_depth(images, 2)
    assert np.array_equal(x[1, 3, 5].reshape(2, 2, 3), images[1, 6:8, 10:12])
    assert np.array_equal(depth_to_space(x, 2), images)
    with pytest.raises(ValueError, match="images of 8x12 do not divide into patches of 3x3"):
        space_to_depth(images, 3)
    with pytest.raises(ValueError, match=r"diffusion\.patch: images of 6x4 do not divide"):
        whole(patch=4, image_shape=(6, 4, 3))


def test_the_parts_are_built_to_fit():
    model = whole(patch=2)
    assert model.text_encoder.config.vocabulary == len(WORDS) + 4
    config = model.unet.config
    assert (config.in_channels, config.out_channels, config.text_width) == (12, 12, 8)
    names = [name.split(".")[0] for name, _ in model.named_parameters()]
    assert names == sorted(names) and set(names) == {"text_encoder", "unet"}


def test_the_condition_is_the_tokens_and_which_of_them_count():
    tokens, mask = whole().condition(["a red circle", ""])
    assert tokens.shape == (2, 6, 8) and isinstance(tokens, Tensor)
    assert mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]


def test_the_caption_decides_the_answer_and_padding_does_not():
    model, t = randomised(whole()), np.array([40, 40, 40])
    x = np.repeat(model.encode(pictures(1)), 3, axis=0)
    captions = ["a red circle", "a blue circle", "A red circle."]  # with start and end five of six places
    with no_grad():
        before = model(x, t, model.condition(captions))
        model.text_encoder.position_embedding.weight.data[5] += 1
        after = model(x, t, model.condition(captions))
    red, blue, red_again = before
    assert np.abs(red - red_again).max() <= 1e-12 and np.abs(red - blue).max() > 1e-6
    assert np.array_equal(before, after)


@pytest.mark.parametrize("prediction", ("eps", "v", "x0"))
def test_the_answer_is_eps_whatever_the_network_predicts(prediction):
    """A network that answers with the truth, in its own terms, makes the model answer with the true noise."""
    model, images = whole(prediction), pictures(dtype=np.float64)
    t, x0 = np.array([1, 40, 99]), model.encode(images)
    eps = np.random.default_rng(6).normal(size=x0.shape)
    x_t = q_sample(x0, t, eps, model.schedule)
    a = np.sqrt(model.schedule.alpha_bar[t])[:, None, None, None]
    b = np.sqrt(1 - a**2)
    truth = {"eps": eps, "v": a * eps - b * x0, "x0": x0}[prediction]
    model.unet = lambda x, t, cond: Tensor(truth)
    assert np.abs(model(x_t, t, None) - eps).max() <= 1e-9
    assert model.loss(images, ["red"] * 3, t, eps).item() <= 1e-24


@pytest.mark.parametrize("prediction", ("eps", "v", "x0"))
def test_the_loss_is_a_scalar_and_its_gradient_reaches_the_text(prediction):
    model = randomised(whole(prediction))
    t, images = np.array([1, 50, 100]), pictures(dtype=np.float64)
    eps = np.random.default_rng(6).normal(size=(3, *model.latent_shape))
    loss = model.loss(images, ["a red circle", "", "2 blue"], t, eps)
    assert loss.shape == () and np.isfinite(loss.item()) and loss.item() > 0
    loss.backward()
    for name, p in model.named_parameters():
        assert np.isfinite(p.grad).all(), name
        assert p.grad.any() or name.endswith("k_proj.bias"), name


def test_the_loss_is_the_mean_over_all_elements():
    """Of a network at its beginning, which answers zero: the mean square of its target."""
    model, images = whole("eps"), pictures()
    eps = np.random.default_rng(6).normal(size=(3, *model.latent_shape)).astype(np.float32)
    loss = model.loss(images, [""] * 3, np.array([1, 50, 100]), eps)
    assert loss.item() == pytest.approx((eps**2).mean(), rel=1e-6) and loss.dtype == np.float32


def test_guidance_takes_the_whole_model():
    model, x = randomised(whole("v")), whole().encode(pictures(dtype=np.float64))
    with no_grad():
        cond, uncond = model.condition(["a red circle"] * 3), model.condition([""] * 3)
        c, u = model(x, np.array([7] * 3), cond), model(x, np.array([7] * 3), uncond)
    assert np.abs(guided_eps(model, x, 7, cond, uncond, 3.0) - (u + 3 * (c - u))).max() <= 1e-10


def test_the_seed_decides_the_model_and_the_time_embedding_is_the_unets():
    first, same, other = (whole(seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first.state()[k], same.state()[k]) for k in first.state())
    assert not all(np.array_equal(first.state()[k], other.state()[k]) for k in first.state())
    t = np.array([1, 50])
    assert np.array_equal(first.time_embedding(t).data, first.unet.time_embedding(t).data)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(schedule="square"), "diffusion.schedule: 'square' is not one of linear, scaled_linear, cosine"),
        (dict(prediction="noise"), "diffusion.prediction: 'noise' is not one of eps, v, x0"),
        (dict(patch=0), "diffusion.patch and diffusion.T must be at least 1"),
        (dict(T=0), "diffusion.patch and diffusion.T must be at least 1"),
    ],
)
def test_diffusion_configs_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        DiffusionConfig(**changes)
