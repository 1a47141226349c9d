"""Modules find their parameters, draw them from the seed alone, and refuse weights that do not fit."""

import math
import re

import numpy as np
import pytest

from minidiff.nn import Conv2d, Embedding, GroupNorm, LayerNorm, Linear, Module, Parameter
from minidiff.tensor import Tensor


class Net(Module):
    """One of each way to hold parameters."""

    def __init__(self):
        self.stem = Conv2d(3, 4)
        self.nothing = None
        self.blocks = [Linear(4, 5, bias=False), None, [LayerNorm(5), Module()]]
        self.width = 4
        self.scale = Parameter((2,), "ones")


NAMES = ["stem.weight", "stem.bias", "blocks.0.weight", "blocks.2.0.weight", "blocks.2.0.bias", "scale"]
SHAPES = [(3, 3, 3, 4), (4,), (4, 5), (5,), (5,), (2,)]


def test_parameters_are_named_by_their_path_in_order_of_definition():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES
    assert [p.wanted_shape for p in net.parameters()] == SHAPES
    assert [name for name, _ in net.named_parameters("model.")] == [f"model.{name}" for name in NAMES]
    assert all(p.requires_grad for p in net.parameters())


def test_initialise_gives_float32_of_the_wanted_shapes():
    net = Net()
    assert net.initialise(3) is net
    assert [p.shape for p in net.parameters()] == SHAPES
    assert {p.dtype for p in net.parameters()} == {np.dtype(np.float32)}


def test_first_values_are_a_pure_function_of_seed_and_number():
    first, second = Net().initialise(3).parameters(), Net().initialise(3).parameters()
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        alone = Parameter(a.wanted_shape, a.init)
        alone.initialise(3, number)
        assert np.array_equal(a.data, b.data) and np.array_equal(a.data, alone.data)


@pytest.mark.parametrize("init", [("uniform", 0.5), ("normal", 0.5)])
def test_other_seeds_and_numbers_give_independent_values(init):
    drawn = {}
    for seed, number in [(0, 0), (0, 1), (1, 0), (2**40, 0)]:
        parameter = Parameter((1000,), init)
        parameter.initialise(seed, number)
        drawn[seed, number] = parameter.data
    correlation = np.corrcoef(list(drawn.values()))
    assert np.abs(correlation - np.eye(4)).max() < 0.15, correlation


@pytest.mark.parametrize(
    "layer, inputs", [(Linear(50, 80), 50), (Conv2d(10, 20), 90), (Conv2d(30, 40, kernel=1, padding=0), 30)]
)
def test_weights_and_biases_begin_uniform_within_one_over_the_root_of_the_inputs(layer, inputs):
    bound = 1 / math.sqrt(inputs)
    layer.initialise(0)
    for p in layer.parameters():
        assert np.abs(p.data).max() <= np.float32(bound)
    values = layer.weight.data.ravel()
    assert values.min() < -0.99 * bound and values.max() > 0.99 * bound
    assert abs(values.mean()) < 4 * bound / math.sqrt(3 * values.size)
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_an_embedding_begins_normal():
    table = Embedding(100, 100, std=0.02).initialise(0).weight.data
    assert abs(table.mean()) < 8e-4
    assert table.std() == pytest.approx(0.02, rel=0.03)
    assert np.abs(table).max() > 3 * 0.02


@pytest.mark.parametrize("layer", [Linear(3, 4, zero=True), Conv2d(3, 4, zero=True)])
def test_zero_layers_begin_at_zero(layer):
    assert all(not p.data.any() for p in layer.initialise(0).parameters())


@pytest.mark.parametrize("layer", [GroupNorm(4, 2), LayerNorm(4)])
def test_norms_begin_with_weight_one_and_bias_zero(layer):
    layer.initialise(0)
    assert (layer.weight.data == 1).all() and (layer.bias.data == 0).all()


@pytest.mark.parametrize(
    "layer, shape, wanted",
    [
        (Linear(3, 4), (2, 5, 3), (2, 5, 4)),
        (Linear(3, 4, bias=False), (3,), (4,)),
        (Conv2d(3, 4), (2, 5, 7, 3), (2, 5, 7, 4)),
        (Conv2d(3, 4, stride=2, padding=((0, 1), (0, 1))), (2, 6, 8, 3), (2, 3, 4, 4)),
        (GroupNorm(4, 2), (2, 3, 5, 4), (2, 3, 5, 4)),
        (LayerNorm(4), (2, 3, 4), (2, 3, 4)),
    ],
)
def test_layers_give_the_promised_shape(layer, shape, wanted):
    layer.initialise(0)
    assert layer(Tensor(np.ones(shape, np.float32))).shape == wanted


def test_state_goes_round():
    first, second = Net().initialise(1), Net().initialise(2)
    state = first.state()
    assert list(state) == NAMES
    second.load(state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert np.array_equal(a.data, b.data)


def test_load_fills_a_module_that_was_never_initialised():
    net = Net()
    net.load(Net().initialise(1).state())
    assert [p.shape for p in net.parameters()] == SHAPES


def _faulty(*faults):
    state = Net().initialise(0).state()
    if "missing" in faults:
        del state["stem.bias"]
    if "extra" in faults:
        state["head.weight"] = np.zeros(3, np.float32)
    if "misshapen" in faults:
        state["blocks.0.weight"] = state["blocks.0.weight"].T
    return state


TOLD = {
    "missing": "missing: stem.bias",
    "extra": "not in the model: head.weight",
    "misshapen": "of another shape: blocks.0.weight (5, 4) instead of (4, 5)",
}


@pytest.mark.parametrize("faults", [["missing"], ["extra"], ["misshapen"], list(TOLD)])
def test_load_names_what_does_not_fit_in_one_sentence_and_changes_nothing(faults):
    net = Net().initialise(1)
    before = {name: array.copy() for name, array in net.state().items()}
    with pytest.raises(ValueError, match=r"^run/model\.safetensors do not fit the model") as caught:
        net.load(_faulty(*faults), source="run/model.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    for fault, told in TOLD.items():
        assert (told in message) == (fault in faults), message
    assert all(np.array_equal(array, before[name]) for name, array in net.state().items())


def test_load_names_ten_of_many():
    state = {**Net().initialise(0).state(), **{f"other.{i}": np.zeros(1) for i in range(12)}}
    told = (
        "not in the model: other.0, other.1, other.10, other.11, other.2, other.3, other.4, other.5, other.6, other.7"
    )
    with pytest.raises(ValueError, match=re.escape(f"({told} and 2 more)")):
        Net().load(state)
