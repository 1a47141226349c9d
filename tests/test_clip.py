"""CLIP's text towers: transformers' CLIPTextModel with random weights is our TextEncoder, as a whole and by layers."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import import_or_skip, in_our_layout
from test_pretrained_configs import SD1, SD2

from minidiff.models import TextEncoder, TextEncoderConfig
from minidiff.pretrained.configs import text_config
from minidiff.pretrained.weights import clip_keys
from minidiff.tensor import Tensor, no_grad


@pytest.mark.parametrize("changes", [dict(hidden=-1), dict(gelu="tanh")])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=f"text.{next(iter(changes))}"):
        TextEncoderConfig(**changes)


# ---- the mask, and layers left out

SMALL = TextEncoderConfig(vocabulary=11, context=9, width=16, layers=3, heads=2, hidden=40, gelu="exact", norm_eps=1e-3)


def randomised(config, seed=0, dtype=np.float64):
    encoder, rng = TextEncoder(config, seed=None), np.random.default_rng(seed)
    for p in encoder.parameters():
        p.data = ((p.init == "ones") + rng.normal(0, 0.3, p.wanted_shape)).astype(dtype)
    return encoder


def test_hidden_tokens_are_seen_by_nobody_else():
    encoder, ids = randomised(SMALL), np.array([[1, 2, 3, 4, 5], [1, 6, 7, 8, 9]])
    mask = np.array([[True, True, False, True, False], [True] * 5])
    before, others = encoder(ids, mask).data, ids.copy()
    others[0, [2, 4]] = 10
    moved = np.abs(encoder(others, mask).data - before).max(axis=-1)
    assert not moved[0, [0, 1, 3]].any() and not moved[1].any() and (moved[0, [2, 4]] > 1e-3).all()
    assert np.abs(before[1] - encoder(ids[1:]).data[0]).max() <= 1e-12


def test_layers_are_left_out_from_the_end():
    encoder, ids = randomised(SMALL), np.array([[1, 2, 3, 4]])
    for skip in range(4):
        shorter = randomised(dataclasses.replace(SMALL, layers=3 - skip))
        kept = {name: value for name, value in encoder.state().items() if name in shorter.state()}
        shorter.load(kept)
        assert np.array_equal(encoder(ids, skip=skip).data, shorter(ids).data)
    for skip in (-1, 4):
        with pytest.raises(ValueError, match=f"skip must be in 0..3, the number of layers, got {skip}"):
            encoder(ids, skip=skip)


def test_masks_that_do_not_fit_are_refused():
    encoder, ids = randomised(SMALL), np.ones((2, 4), np.int64)
    with pytest.raises(ValueError, match="hides a first token"):
        encoder(ids, np.array([[True] * 4, [False] + [True] * 3]))
    for mask in (np.ones((2, 4), np.int64), np.ones((2, 5), bool), np.ones(4, bool)):
        with pytest.raises(ValueError, match="mask must be booleans of shape"):
            encoder(ids, mask)


def test_every_parameter_has_a_gradient_with_a_mask_too():
    encoder, ids = randomised(SMALL), np.arange(1, 9).reshape(2, 4)
    mask = np.array([[True, True, True, False], [True] * 4])
    encoder(ids, mask).backward(np.random.default_rng(1).normal(size=(2, 4, 16)))
    for name, p in encoder.named_parameters():
        assert np.isfinite(p.grad).all() and (np.abs(p.grad).max() > 1e-6) != name.endswith("k_proj.bias"), name


# ---- the same numbers as transformers'

TOWERS = {
    "ViT-L/14": {**SD1, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4,
                 "vocab_size": 40, "eos_token_id": 39},
    "OpenCLIP-H": {**SD2, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2, "num_hidden_layers": 3,
                   "vocab_size": 40, "eos_token_id": 39, "layer_norm_eps": 1e-3},
}  # fmt: skip


def pair(config, dtype):
    """Their model, every number random and of a size that moves the result, and ours with the same weights."""
    torch, transformers = import_or_skip("torch"), import_or_skip("transformers")
    torch.set_num_threads(1)
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise * (0.5 if p.ndim == 1 or "embedding" in name else 1.5 * p.shape[-1] ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    ours = TextEncoder(text_config(json.loads(theirs.config.to_json_string())), seed=None)
    ours.load(clip_keys(in_our_layout(theirs.state_dict())))
    return theirs, ours


def theirs_on(model, ids, mask=None):
    """Their last hidden state and the inputs and results of their layers."""
    torch = import_or_skip("torch")
    mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=mask, output_hidden_states=True)
    return out.last_hidden_state.numpy(), [h.numpy() for h in out.hidden_states]


def assert_near(ours, theirs, tolerance, name):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    assert np.isfinite(ours).all() and np.isfinite(theirs).all() and np.abs(theirs).max() > 0.1, name
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"{name}: off by {error:.1e} of the largest value, allowed {tolerance:.0e}"


def inputs(length):
    """Token ids (3, L) and a mask: one full row, one padded, one with nothing but its start."""
    ids = np.random.default_rng(length).integers(0, 40, (3, length))
    return ids, np.arange(length) < np.array([[length], [length // 2 + 1], [1]])


TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # of the largest value; the bar in float32 is 1e-4


@pytest.mark.parametrize("length", [1, 2, 16, 77])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_is_transformers(tower, dtype, length, kernels_kind):
    theirs, ours = pair(TOWERS[tower], dtype)
    ids, mask = inputs(length)
    for given in (None, mask):
        wanted, hidden = theirs_on(theirs, ids, given)
        with no_grad():
            assert_near(ours(ids, given).data, wanted, TOLERANCE[dtype], "the last hidden state")
            ids_ = ids.astype(np.int32)
            penultimate = ours.final_layer_norm(Tensor(hidden[-2])).data  # what diffusers' clip_skip=1 takes
            assert_near(ours(ids_, given, skip=1).data, penultimate, TOLERANCE[dtype], "the penultimate, normalised")


@pytest.mark.parametrize("tower", TOWERS)
def test_each_layer_is_transformers(tower, kernels_kind):
    """From their input to each layer: a failure names the layer and its part."""
    torch = import_or_skip("torch")
    theirs, ours = pair(TOWERS[tower], "float32")
    ids, mask = inputs(12)
    _, hidden = theirs_on(theirs, ids, mask)
    parts = getattr(theirs, "text_model", theirs)
    with no_grad(), torch.no_grad():
        x = ours.token_embedding(ids) + ours.position_embedding.weight[:12]
        assert_near(x.data, hidden[0], 1e-6, "embeddings")
        for i, (layer, their_layer) in enumerate(zip(ours.layers, parts.encoder.layers, strict=True)):
            x, h = Tensor(hidden[i]), torch.from_numpy(hidden[i])
            normed = their_layer.layer_norm1(h)
            assert_near(layer.layer_norm1(x).data, normed.numpy(), 1e-5, f"layers.{i}.layer_norm1")
            zeros = Tensor(np.zeros_like(hidden[i]))
            assert_near(layer.mlp(x, zeros).data, their_layer.mlp(h).numpy(), 1e-5, f"layers.{i}.mlp")
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear = getattr(their_layer.self_attn, name)(h).numpy()
                assert_near(getattr(layer.self_attn, name)(x).data, linear, 1e-5, f"layers.{i}.self_attn.{name}")
            assert_near(layer(x, mask).data, hidden[i + 1], 1e-5, f"layers.{i}")
        last = parts.final_layer_norm(torch.from_numpy(hidden[-1])).numpy()
        assert_near(ours.final_layer_norm(Tensor(hidden[-1])).data, last, 1e-5, "final_layer_norm")


@pytest.mark.parametrize("tower", TOWERS)
def test_the_gradients_are_transformers(tower, kernels_kind):
    torch = import_or_skip("torch")
    theirs, ours = pair(TOWERS[tower], "float64")
    ids, mask = inputs(9)
    dy = np.random.default_rng(5).normal(size=(3, 9, ours.config.width))
    theirs(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))).last_hidden_state.backward(
        torch.from_numpy(dy)
    )
    ours(ids, mask).backward(dy)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, wanted in clip_keys(in_our_layout({n: p.grad for n, p in theirs.named_parameters()})).items():
        scale = max(np.abs(wanted).max(), 1e-3)  # the keys' biases have none
        assert np.abs(gradients.pop(name) - wanted).max() <= 1e-11 * scale, name
    assert not gradients


def test_a_config_that_transformers_saved_is_read(tmp_path):
    transformers = import_or_skip("transformers")
    import_or_skip("torch")
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TOWERS["OpenCLIP-H"])).save_pretrained(str(tmp_path))
    config = text_config(json.loads((tmp_path / "config.json").read_text()))
    assert config == TextEncoderConfig(40, 77, 32, 3, 2, 80, "exact", 1e-3)
