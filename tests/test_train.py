import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from minidiff.checkpoint import FILE
from minidiff.config import load_config
from minidiff.data import open_data
from minidiff.errors import UserError
from minidiff.optim import OPTIMIZERS
from minidiff.train import (
    LOG,
    draw_batch,
    draw_timesteps,
    fit,
    load_model,
    load_state,
    loss_and_gradients,
    new_state,
    read_log,
    save_state,
    train,
)

TINY = {
    "unet.channels": "8,16", "unet.norm_groups": "4", "unet.heads": "2,2", "text.width": "16", "text.layers": "1",
    "train.batch": "4", "train.accumulate": "1", "train.minutes": "0",
    "train.steps": "8", "train.warmup": "2", "train.save_every": "3",
    "train.sample_every": "0",
}  # fmt: skip


def config(**changes):
    return load_config("shapes", {**TINY, **{k.replace("__", "."): str(v) for k, v in changes.items()}})


def run(state):
    return list(train(state, open_data(state.config.data, state.config.train.seed)))


def same_bits(a, b):
    arrays = [(s.model.state(), s.optimizer.ema, s.optimizer.m, s.optimizer.v) for s in (a, b)]
    return all(x[k].tobytes() == y[k].tobytes() for x, y in zip(*arrays, strict=True) for k in x)


def test_the_loss_falls():
    logs = run(new_state(config(train__steps=60, train__batch=16, train__lr=3e-3)))
    losses = [r.loss for r in logs]
    assert [r.step for r in logs] == list(range(1, 61))
    assert logs[-1].images == 60 * 16
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    a, b, c = new_state(config()), new_state(config()), new_state(config(train__seed=1))
    assert [r.loss for r in run(a)] == [r.loss for r in run(b)]
    assert same_bits(a, b)
    run(c)
    assert not same_bits(a, c)


@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_is_bit_identical(tmp_path, cut):
    whole = new_state(config())
    run(whole)
    state = new_state(config())
    for record in train(state, open_data(state.config.data, 0)):
        if record.step == cut:
            break
    save_state(state, tmp_path / FILE)
    resumed = load_state(tmp_path / FILE)
    assert resumed.step == cut
    run(resumed)
    assert same_bits(whole, resumed)


def test_accumulation_is_the_mean_over_its_parts():
    """Two forward passes of 4 have the gradient of the mean of their losses."""
    state = new_state(config(train__accumulate=2))
    data = open_data(state.config.data, 0)
    parts = [draw_batch(state, data, 1, part) for part in range(2)]
    loss, grads = loss_and_gradients([state.model], parts)
    halves = [loss_and_gradients([state.model], [part]) for part in parts]
    assert loss == pytest.approx(np.mean([h[0] for h in halves]))
    for name, g in grads.items():
        mean = (halves[0][1][name] + halves[1][1][name]) / 2
        assert np.abs(g - mean).max() <= 1e-5 * max(np.abs(mean).max(), 1e-3), name
    assert not (parts[0].eps == parts[1].eps).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpointing", (False, True))
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch, optimizer, checkpointing):
    """Passes that run beside each other keep their tapes, gradients and recording apart."""
    runs = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("MINIDIFF_NUM_THREADS", threads)
        runs.append(
            new_state(config(train__accumulate=5, train__optimizer=optimizer, train__checkpointing=checkpointing))
        )
        with threadpool_limits(1):
            run(runs[-1])
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


def test_captions_are_dropped_a_tenth_of_the_time():
    state = new_state(config(train__batch=2000))
    batch = draw_batch(state, open_data(state.config.data, 0), 1, 0)
    assert 0.08 < np.mean([c == "" for c in batch.captions]) < 0.12
    assert batch.t.min() == 1 and batch.t.max() == state.model.schedule.T
    assert abs(batch.t.mean() - 500) < 30


def test_logit_normal_timesteps_have_their_distribution():
    c = config(train__timesteps="logit_normal", train__logit_mean=-0.5, train__logit_std=0.8).train
    t = draw_timesteps(c, range(20000), 3, 1000)
    assert t.min() >= 1 and t.max() <= 1000
    z = np.log((t - 0.5) / (1000.5 - t))
    assert abs(z.mean() + 0.5) < 0.03 and abs(z.std() - 0.8) < 0.03
    assert draw_timesteps(replace(c, logit_mean=100.0), range(5), 3, 1000).tolist() == [1000] * 5
    assert draw_timesteps(replace(c, logit_mean=-100.0), range(5), 3, 1000).tolist() == [1] * 5


def test_checkpointing_blocks_changes_nothing():
    plain, thrifty = new_state(config()), new_state(config(train__checkpointing=True))
    # the gradients of what several blocks share are added in another order, so the last bits may differ
    assert [r.loss for r in run(plain)] == pytest.approx([r.loss for r in run(thrifty)], rel=1e-5)


def test_nan_stops_before_the_parameters_are_touched():
    state = new_state(config())
    data = open_data(state.config.data, 0)
    steps = train(state, data)
    next(steps)
    poisoned = state.model.unet.conv_in.weight
    poisoned.data[0, 0, 0, 0] = np.nan
    before = {k: v.copy() for k, v in state.model.state().items()}
    with pytest.raises(UserError, match=r"step 2: the loss is nan; the gradient of .* is not finite.*--train\.lr"):
        next(steps)
    assert state.step == 1
    assert all(np.array_equal(before[k], v, equal_nan=True) for k, v in state.model.state().items())


def test_fit_writes_the_run_and_a_resume_goes_on_with_its_log(tmp_path):
    state = new_state(config())
    assert fit(state, tmp_path)
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 9))
    assert load_state(tmp_path / FILE).step == 8
    again = load_state(tmp_path / FILE)
    again.config = replace(again.config, train=replace(again.config.train, steps=10))
    with open(tmp_path / LOG, "a") as f:  # a killed run's leavings: a later record, and a torn line
        f.write(json.dumps({"step": 9, "loss": -1}) + "\n" + '{"step": 1')
    assert fit(again, tmp_path)
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 11))
    assert all(r["loss"] > 0 for r in read_log(tmp_path))


def test_minutes_become_steps_once(tmp_path):
    state = new_state(config(train__minutes=0.02, train__steps=5))
    assert fit(state, tmp_path)
    c = load_state(tmp_path / FILE).config.train
    assert c.minutes == 0 and c.steps == state.step > c.warmup


def test_weights_are_chosen_by_name(tmp_path):
    state = new_state(config())
    run(state)
    save_state(state, tmp_path / FILE)
    for weights, expected in (("ema", state.optimizer.ema), ("model", state.model.state())):
        model, _ = load_model(tmp_path, weights)
        assert all((v == expected[k]).all() for k, v in model.state().items())


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    from minidiff.checkpoint import load_checkpoint, save_checkpoint

    save_state(new_state(config()), tmp_path / FILE)
    parts, about = load_checkpoint(tmp_path / FILE)
    about["config"]["unet"]["channels"] = [8, 24]
    save_checkpoint(tmp_path / FILE, parts, about)
    with pytest.raises(UserError, match=r"do not fit the model .*of another shape"):
        load_state(tmp_path / FILE)


# ---- as a process: killed, interrupted


def start(*arguments):
    command = [sys.executable, "-m", "minidiff", "train", *map(str, arguments)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err


def flags(**changes):
    settings = {**TINY, **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return [f"--{k}={v}" for k, v in settings.items()]


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        log = folder / LOG
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"never got to step {step}: {process.communicate()}")


def test_kill_9_at_random_moments_loses_only_the_steps_since_the_checkpoint(tmp_path):
    steps, every = 60, 5
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start("shapes", "--out", whole, *flags(train__steps=steps, train__save_every=every))
    finish(process)

    moments = random.Random(0)
    arguments = ["shapes", "--out", killed, *flags(train__steps=steps, train__save_every=every)]
    for _ in range(4):
        process = start(*arguments)
        before = load_state(killed / FILE).step if (killed / FILE).exists() else 0
        wait_for_step(process, killed, min(before + moments.randint(6, 14), steps - 1))
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        logged = len((killed / LOG).read_text().splitlines())
        assert load_state(killed / FILE).step >= min(logged, steps) - every
        arguments = ["--resume", killed]
    process = start("--resume", killed)
    finish(process)
    assert same_bits(load_state(whole / FILE), load_state(killed / FILE))
    assert [r["loss"] for r in read_log(whole)] == [r["loss"] for r in read_log(killed)]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = start("shapes", "--out", folder, *flags(train__steps=100000, train__save_every=100000))
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    step = load_state(folder / FILE).step
    assert step >= 3
    assert f"stopped after step {step}, saved; to go on: minidiff train --resume {folder}" in err
