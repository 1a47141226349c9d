"""What kernels ask of a device besides their arrays: memory to work in, and shared memory for each block."""

import importlib
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import strict_cupy
from rungs import climbed, every_rung, standing_on, wrong

from minidiff.backend import MODULES, REFERENCE

if "emulated" not in MODULES:
    pytest.skip("the emulated kernels are not built here; see: minidiff doctor", allow_module_level=True)

_emulated = importlib.import_module("minidiff._emulated")
REFERENCES = SimpleNamespace(**REFERENCE)


@pytest.fixture(autouse=True)
def as_it_was():
    """The emulator's settings, streams and rungs put back afterwards."""
    yield
    _emulated.set_options()
    _emulated.set_stream(0)
    for name in _emulated.ladders():
        _emulated.choose(name, 0)


def naive(tokens, width=1):
    """Attention that stores all its scores: tokens^2 floats of workspace."""
    _emulated.choose("attention", 1)
    q = np.ones((1, tokens, width), np.float32)
    y = np.empty_like(q)
    _emulated.attention_forward(y, None, q, q, q, None, 1, 1.0, False)
    return y


def on_a_new_stream():
    """A stream that has no workspace yet."""
    on_a_new_stream.last += 256
    _emulated.set_stream(on_a_new_stream.last)


on_a_new_stream.last = 1 << 20


def leave(floats):
    """Pretend that the device has so much memory left."""
    _emulated.set_options(memory_bytes=_emulated.device_bytes() + 4 * floats)


# ---- memory


def test_a_workspace_that_cannot_grow_stays_as_it_was():
    on_a_new_stream()
    naive(10)
    leave(100**2 - 1)
    with pytest.raises(MemoryError, match="attention_forward: the GPU has no 40000 bytes left to work in"):
        naive(100)
    assert np.allclose(naive(10), 1)
    leave(100**2)
    assert np.allclose(naive(100), 1)


def test_a_workspace_doubles_only_where_there_is_room():
    on_a_new_stream()
    naive(10)
    leave(121)
    assert np.allclose(naive(11), 1)


def test_streams_do_not_share_a_workspace():
    on_a_new_stream()
    before = _emulated.device_bytes()
    naive(20)
    naive(20)
    assert _emulated.device_bytes() == before + 1600
    on_a_new_stream()
    naive(20)
    assert _emulated.device_bytes() == before + 3200


def test_threads_do_not_mix_their_launches():
    """One stream, one workspace: an op's kernels run without another's between them."""
    _emulated.choose("attention", 1)
    wrong = []

    def work(value):
        q, v = np.ones((1, 12, 8), np.float32), np.full((1, 12, 8), value, np.float32)
        q[0, :, 0] = np.arange(12)
        wanted, _ = REFERENCES.attention_forward(q, q, v + q, 1, value, None, False)
        for _ in range(200):
            y = np.empty_like(q)
            _emulated.attention_forward(y, None, q, q, v + q, None, 1, value, False)
            if not np.allclose(y, wanted, rtol=1e-4):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (0.1, 0.2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_cupy_gives_memory_back_when_a_kernel_finds_none(monkeypatch):
    """And only then is there an error."""
    for name in ("cupy", "minidiff._cuda", "minidiff.cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is there now comes back
    for table in (MODULES, importlib.import_module("minidiff.backend").missing):
        monkeypatch.setitem(table, "cuda", None)
    cupy = strict_cupy.install(sys.modules)
    freed = []

    class Pool:
        def free_all_blocks(self):
            freed.append(1)
            leave(10**4 if len(freed) == 1 else 0)

    cupy.get_default_memory_pool = Pool
    on_a_new_stream()
    _emulated.choose("attention", 1)
    leave(100)
    q = cupy.asarray(np.ones((1, 100, 1), np.float32))
    y, _ = MODULES["cuda"].attention_forward(q, q, q, 1, 1.0, None, False)
    assert np.allclose(y.get(), 1) and freed == [1]
    q = cupy.asarray(np.ones((1, 200, 1), np.float32))
    with pytest.raises(MemoryError, match="attention_forward"):
        MODULES["cuda"].attention_forward(q, q, q, 1, 1.0, None, False)
    assert len(freed) == 2


# ---- shared memory

DEVICES = [(75, 64), (86, 99), (120, 99), (80, 163), (90, 227)]
"""Compute capability, and KiB of shared memory that a block may have."""


@pytest.mark.parametrize("width", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("capability, shared", DEVICES)
def test_attention_fits_every_device(capability, shared, width, rng):
    """Where there is no room for a rung's tiles the next lower one computes."""
    _emulated.set_options(compute_capability=capability, shared_bytes=shared << 10)
    q, k, v, dy = (rng.standard_normal((1, n, width), dtype=np.float32) for n in (5, 7, 7, 5))
    y, lse = REFERENCES.attention_forward(q, k, v, 1, width**-0.5, None, False)
    wanted = [y, *REFERENCES.attention_backward(dy, y, lse, q, k, v, 1, width**-0.5, None, False)[:3]]
    for rung, (_, _, needs, operands) in enumerate(_emulated.ladders()["attention"], 1):
        if needs > capability:
            continue
        _emulated.choose("attention", rung)
        on = MODULES["emulated"]
        y, lse = on.attention_forward(q, k, v, 1, width**-0.5, None, False)
        got = [y, *on.attention_backward(dy, y, lse, q, k, v, 1, width**-0.5, None, False)[:3]]
        for a, b in zip(got, wanted, strict=True):
            assert np.abs(a - b).max() <= (2e-5 if operands == "fp32" else 2e-2) * np.abs(b).max(), rung


@pytest.mark.parametrize("capability, shared", [(75, 64), (120, 99)])
def test_every_rung_fits_the_devices_with_the_least(capability, shared):
    _emulated.set_options(compute_capability=capability, shared_bytes=shared << 10)
    for case, rung in every_rung(_emulated):
        if all(rungs[min(rung, len(rungs)) - 1][2] <= capability for rungs in climbed(_emulated, case).values()):
            assert wrong(case, "emulated", standing_on(_emulated, case, rung)) <= 1, (case, rung)
            standing_on(_emulated, case, 0)
