import itertools
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

from minidiff import kernels
from minidiff.checkpoint import FILE
from minidiff.config import load_config
from minidiff.data import open_data, shapes
from minidiff.errors import UserError
from minidiff.evaluate import draw_training_grid
from minidiff.optim import OPTIMIZERS, learning_rate
from minidiff.train import (
    LOG,
    Diverged,
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
        with threadpool_limits(1), kernels("reference"):  # compiled kernels have threads of their own: test_cpu.py
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
    with pytest.raises(Diverged, match=r"step 2: the loss is nan, the gradient of .* is not finite.*--train\.lr"):
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


def timed(minutes):
    settings = {k: v for k, v in TINY.items() if k not in ("train.steps", "train.minutes")}
    return load_config("shapes", {**settings, "train.minutes": minutes})


def test_minutes_become_steps_once(tmp_path, monkeypatch):
    clock = itertools.count()  # every look at it is a hundredth of a second later
    monkeypatch.setattr("minidiff.train.time.perf_counter", lambda: next(clock) / 100)
    state = new_state(timed(0.02))
    assert fit(state, tmp_path)
    c = load_state(tmp_path / FILE).config.train
    assert c.minutes == 0 and c.steps == state.step > c.warmup
    assert load_config(str(tmp_path / "config.toml")).train == c
    assert 0.9 < state.seconds / (60 * 0.02) < 1.1


def test_minutes_count_from_the_beginning_of_the_run(tmp_path):
    state = new_state(config())
    assert fit(state, tmp_path)
    again = load_state(tmp_path / FILE, {"train.minutes": 0.02})
    assert fit(again, tmp_path) and again.step > 8
    assert load_state(tmp_path / FILE).config.train.steps == again.step
    enough = load_state(tmp_path / FILE, {"train.minutes": 0.001})
    assert fit(enough, tmp_path) and enough.step == again.step


def test_a_resumed_run_has_the_settings_that_it_records(tmp_path):
    save_state(new_state(config()), tmp_path / FILE)
    given = {"train.ema_decay": 0.5, "train.weight_decay": 0.25, "train.beta1": 0.8, "train.checkpointing": True}
    state = load_state(tmp_path / FILE, given)
    assert (state.optimizer.ema_decay, state.optimizer.weight_decay, state.optimizer.betas[0]) == (0.5, 0.25, 0.8)
    assert state.model.unet.checkpointing
    assert all(getattr(state.config.train, name.partition(".")[2]) == value for name, value in given.items())
    for name in ("train.optimizer", "train.seed", "train.batch", "train.accumulate", "unet.blocks"):
        with pytest.raises(UserError, match=f"--{name} cannot change"):
            load_state(tmp_path / FILE, {name: "1"})


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    assert fit(new_state(config()), tmp_path)
    before = (tmp_path / FILE).read_bytes()
    wild = load_state(tmp_path / FILE, {"train.steps": 40, "train.lr": 1e30, "train.save_every": 100})
    with pytest.raises(Diverged, match=r"--train\.lr.*checkpoint\.safetensors is of step 8, before that"):
        fit(wild, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    tame = load_state(tmp_path / FILE, {"train.steps": 10})
    assert fit(tame, tmp_path) and tame.step == 10


def test_ruined_weights_are_not_saved(tmp_path):
    assert fit(new_state(config()), tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def ruin(state, data, path):
        state.optimizer.ema["unet.conv_in.bias"][0] = np.nan

    again = load_state(tmp_path / FILE, {"train.steps": 9, "train.sample_every": 9, "train.save_every": 100})
    with pytest.raises(Diverged, match=r"step 9: unet\.conv_in\.bias is not finite.* is of step 8"):
        fit(again, tmp_path, ruin)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_sample_grid_that_fails_does_not_stop_the_run(tmp_path, capsys):
    def on_sample(state, data, path):
        raise ValueError("no picture")

    state = new_state(config(train__sample_every=2))
    assert fit(state, tmp_path, on_sample)
    assert capsys.readouterr().err.count("no sample grid of step") == 4


def test_a_sample_grid_changes_no_bit(tmp_path):
    plain, drawn = new_state(config()), new_state(config(train__sample_every=2))
    for name in "ab":
        (tmp_path / name).mkdir()
    assert fit(plain, tmp_path / "a")
    assert fit(drawn, tmp_path / "b", draw_training_grid)
    assert len(list((tmp_path / "b" / "samples").iterdir())) == 4
    assert same_bits(plain, drawn)


def test_every_step_and_part_has_its_own_scenes_times_and_noise():
    state = new_state(config(train__accumulate=2))
    data = open_data(state.config.data, 0)
    batches = [draw_batch(state, data, step, part) for step in (1, 2) for part in range(2)]
    for i, a in enumerate(batches):
        for b in batches[:i]:
            assert (a.t != b.t).any() and a.captions != b.captions
            assert np.abs(a.images - b.images).max() > 0.1 and np.abs(a.eps - b.eps).min() > 0
    again = draw_batch(state, data, 2, 1)
    assert again.captions == batches[3].captions and (again.eps == batches[3].eps).all()


def test_training_never_sees_a_held_out_pair():
    data = open_data(config().data, 0)
    seen, held_out = set(), {"val": set(), "test": set()}

    def pair(caption):
        objects = shapes.parse(caption).phrases
        return frozenset((p.colour, p.shape) for p in objects) if len(objects) == 2 else None

    for step in range(60):
        seen |= {pair(caption) for caption in data.batch(step, 64)[1]} - {None}
    for split in held_out:
        held_out[split] = {pair(caption) for caption in shapes.held_out_captions(1000, 0, split)}
    assert len(seen) > 100 and not seen & (held_out["val"] | held_out["test"])
    assert not held_out["val"] & held_out["test"]


def test_the_learning_rate_and_the_clipped_gradient_reach_the_optimizer(monkeypatch):
    state = new_state(config(train__clip=1e-3, train__lr=0.01))
    norms, rates = [], []
    plain = type(state.optimizer).step

    def step(self, lr, grads, factor):
        norms.append(factor * np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))
        rates.append(lr)
        plain(self, lr, grads, factor)

    monkeypatch.setattr(type(state.optimizer), "step", step)
    logs = run(state)
    assert norms == pytest.approx([1e-3] * 8, rel=1e-4) and all(r.grad_norm > 1e-3 for r in logs)
    assert rates == [r.lr for r in logs] == [learning_rate(i, 8, 0.01, 2) for i in range(1, 9)]
    assert rates[1] == 0.01 and rates[0] == 0.005 and rates[-1] < 1e-3


def test_a_network_without_cross_attention_trains():
    state = new_state(config(unet__attention="none,none", unet__mid_attention="none"))
    assert len(run(state)) == 8


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


def test_a_checkpoint_without_its_facts_is_refused(tmp_path):
    from minidiff.checkpoint import load_checkpoint, save_checkpoint

    save_state(new_state(config()), tmp_path / FILE)
    parts, about = load_checkpoint(tmp_path / FILE)
    del about["words"]
    save_checkpoint(tmp_path / FILE, parts, about)
    for load in (load_state, load_model):
        with pytest.raises(UserError, match="has no 'words' in its metadata"):
            load(tmp_path / FILE)


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
        wait_for_step(process, killed, min(before + moments.randint(1, 14), steps - 1))
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


def test_a_run_killed_before_its_first_checkpoint_goes_on(tmp_path):
    folder = tmp_path / "run"
    process = start("shapes", "--out", folder, *flags(train__steps=100000, train__save_every=100000))
    wait_for_step(process, folder, 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert load_state(folder / FILE).step == 0
    (folder / f".{FILE}.123.tmp").write_bytes(b"half")  # as if it had been killed while it saved
    finish(start("--resume", folder, "--train.steps=5"))
    assert {p.name for p in folder.iterdir()} == {FILE, LOG, "config.toml"}
    assert [r["step"] for r in read_log(folder)] == [1, 2, 3, 4, 5]


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
