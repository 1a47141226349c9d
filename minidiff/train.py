"""Training: a generator that takes one optimizer step at a time, and `fit`, which logs, samples, saves and resumes.

Everything random is a pure function of (seed, step), so a resumed run needs the step number alone and computes, on the
same machine and thread count, the same bits as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from tqdm import tqdm

from minidiff.backend import Array, to_numpy
from minidiff.checkpoint import FILE, PARTS, load_checkpoint, save_checkpoint
from minidiff.config import Config, TrainConfig, config_from_dict, config_to_dict, config_to_toml, with_overrides
from minidiff.data import DataConfig, Dataset, open_data
from minidiff.errors import UserError
from minidiff.files import remove_unfinished, whole_file
from minidiff.optim import OPTIMIZERS, AdamW, clip_factor, gradient_norm, learning_rate
from minidiff.random import Draw, Purpose, normal, uniform
from minidiff.tensor import accumulate
from minidiff.text_to_image import Question, TextToImage
from minidiff.threads import begin_thread, num_workers, parallel_map, peak_memory

LOG = "log.jsonl"


@dataclass
class TrainState:
    """A run in progress: what a checkpoint holds."""

    config: Config
    model: TextToImage
    optimizer: AdamW
    seconds: float = 0.0  # spent in training steps so far
    content: str = ""  # what the data is known by, once there is any

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.optimizer.step_number


_CALM = "lower the learning rate (--train.lr) or clip tighter (--train.clip)"


class Diverged(UserError):
    """The loss, a gradient or a parameter is not finite any more."""


@dataclass(frozen=True)
class StepLog:
    """What one optimizer step did."""

    step: int
    loss: float
    lr: float
    grad_norm: float  # before clipping
    images: int  # seen since the start
    minutes: float  # of training since the start
    images_per_second: float
    waited: float  # seconds of this step in which the data was not ready
    memory_gb: float  # the most that the process ever held


@dataclass(frozen=True)
class Batch:
    """Everything that goes into one forward pass."""

    images: np.ndarray  # (B, H, W, C) in [-1, 1]
    captions: list[str]  # some of them dropped to ""
    t: np.ndarray  # (B,) in 1..T
    eps: np.ndarray | Draw  # (B, *latent_shape); a GPU draws it itself


def data_of(config: Config) -> Dataset:
    """The data that the settings name, its captions cut to what the text encoder reads."""
    return open_data(config.data, config.train.seed, config.text.context - 2)


def new_state(config: Config, data: Dataset | None = None) -> TrainState:
    """A run at step 0, on its data (opened here if not given)."""
    data = data or data_of(config)
    state = _state(config, data.words, data.image_shape, seed=config.train.seed)
    state.content = data.content
    return state


def _state(config: Config, words: Any, image_shape: Any, seed: int | None) -> TrainState:
    try:
        model = _model(config, words, image_shape, seed)
    except ValueError as e:
        raise UserError(str(e)) from e
    try:
        model.to(config.train.device)
    except ValueError as e:
        raise UserError(f"train.device: {e}") from e
    c = config.train
    optimizer = OPTIMIZERS[c.optimizer](
        dict(model.named_parameters()), (c.beta1, c.beta2), weight_decay=c.weight_decay, ema_decay=c.ema_decay
    )
    resolved = replace(config, data=_located(config.data), unet=model.unet.config, text=model.text_encoder.config)
    return TrainState(resolved, model, optimizer)


def _located(data: DataConfig) -> DataConfig:
    """The settings with absolute folders: a resumed run finds them from wherever it is."""
    path, cache = (folder and os.path.abspath(os.path.expanduser(folder)) for folder in (data.path, data.cache))
    return replace(data, path=path, cache=cache)


def _model(config: Config, words: Any, image_shape: Any, seed: int | None) -> TextToImage:
    model = TextToImage(config.unet, config.text, config.diffusion, words, tuple(image_shape), seed)
    model.unet.checkpointing = config.train.checkpointing
    return model


def save_state(state: TrainState, path: Path) -> None:
    """Write the run to a checkpoint file, atomically."""
    o = state.optimizer
    about = {
        "step": state.step,
        "seconds": state.seconds,
        "content": state.content,
        "config": config_to_dict(state.config),
        "words": list(state.model.tokenizer.words),
        "image_shape": list(state.model.image_shape),
    }
    save_checkpoint(path, {"model": state.model.state(), "ema": o.ema, "optimizer.m": o.m, "optimizer.v": o.v}, about)


FIXED = ("train.optimizer", "train.seed", "train.batch", "train.accumulate")
"""Settings that cannot change in a run: the optimizer's memory or the order of the data hangs on them."""

MOVABLE = ("data.path", "data.cache")
"""Settings of the data that can: where it lies."""


def load_state(path: Path, overrides: dict[str, Any] | None = None) -> TrainState:
    """The run that a checkpoint file holds, with {"section.field": value} in place of its own settings.

    Raises UserError if it is damaged or does not fit its own config, and for a setting that cannot change any more.
    """
    parts, about = _load_run(path)
    config = config_from_dict(about["config"], str(path))
    for name in overrides or {}:
        if name in FIXED or not (name in MOVABLE or name.startswith(("train.", "sample."))):
            raise UserError(f"--{name} cannot change in a run that has begun; start another run with --out")
    config = with_overrides(config, overrides or {}, "the command line")
    state = _state(config, about["words"], about["image_shape"], seed=None)
    o = state.optimizer
    for arrays in (parts["ema"], parts["optimizer.m"], parts["optimizer.v"], parts["model"]):
        _load(state.model, arrays, path)  # each must fit; the model's own stay
    state.model.to(state.config.train.device)
    xp = state.model.array_module
    o.ema, o.m, o.v = ({k: xp.asarray(v) for k, v in parts[p].items()} for p in ("ema", "optimizer.m", "optimizer.v"))
    o.step_number, state.seconds, state.content = about["step"], about["seconds"], about.get("content", "")
    return state


def _load_run(path: Path, parts: tuple[str, ...] = PARTS) -> tuple[dict[str, Any], dict[str, Any]]:
    loaded, about = load_checkpoint(path, parts)
    missing = [key for key in ("step", "seconds", "config", "words", "image_shape") if key not in about]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r} in its metadata; restore it from a copy, or train again")
    return loaded, about


BUNDLED = Path(__file__).parent / "pretrained" / "shapes.safetensors"
"""The model in the box: `shapes`, trained for some hours and written by `minidiff export`; docs/box.md."""


def default_run() -> Path:
    """The demo's run if there is one in the working folder, else the model in the box."""
    demo = Path("runs/demo")
    return demo if (demo / FILE).is_file() else BUNDLED


def load_model(run: str | Path | None = None, weights: str = "ema", device: str = "cpu") -> tuple[TextToImage, Config]:
    """The model of a run folder or a file, with its averaged ("ema") or raw ("model") weights; None: `default_run`."""
    path = _file(default_run() if run is None else run)
    parts, about = _load_run(path, (weights,))
    config = config_from_dict(about["config"], str(path))
    config = replace(config, train=replace(config.train, device=device))
    state = _state(config, about["words"], about["image_shape"], seed=None)
    _load(state.model, parts[weights], path)
    state.model.to(device)
    return state.model, state.config


def _file(run: str | Path) -> Path:
    """The checkpoint of a run's folder, or the file itself."""
    path = Path(run)
    return path / FILE if path.is_dir() or not path.suffix else path


def export_model(run: str | Path, out: Path, overrides: dict[str, Any] | None = None) -> Path:
    """The averaged weights of a run, as float16 and with nothing that only training needs, for `load_model`.

    overrides: settings {"sample.field": value} that it shall draw with in place of the run's own.

    Raises UserError where `run` holds no checkpoint, and for an `out` that could be one that a run goes on with.
    """
    path = _file(run)
    parts, about = _load_run(path, ("ema",))
    if out.name == FILE:
        raise UserError(f"{out} is the name of a run's checkpoint, with which the run goes on; choose another --out")
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the file that is exported; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    config = with_overrides(config_from_dict(about["config"], str(path)), overrides or {}, "the command line")
    about["config"] = config_to_dict(config)
    for where in ("path", "cache"):  # folders of whoever trained it
        del about["config"]["data"][where]
    save_checkpoint(out, {"ema": {name: a.astype(np.float16) for name, a in parts["ema"].items()}}, about)
    return out


def _load(model: TextToImage, arrays: dict[str, np.ndarray], path: Path) -> None:
    try:
        model.load({name: a.astype(np.float32, copy=False) for name, a in arrays.items()}, str(path))
    except ValueError as e:
        raise UserError(str(e)) from e


@contextlib.contextmanager
def averaged_weights(state: TrainState) -> Iterator[TextToImage]:
    """Inside this block the run's model has its averaged weights."""
    raw = state.model.state()
    state.model.load(state.optimizer.ema)
    try:
        yield state.model
    finally:
        state.model.load(raw)


def draw_batch(state: TrainState, data: Dataset, step: int, part: int) -> Batch:
    """The batch of forward pass `part` of optimizer step `step`: a pure function of the seed and the two."""
    c, model = state.config.train, state.model
    number = (step - 1) * c.accumulate + part
    samples = range(part * c.batch, (part + 1) * c.batch)
    images, captions = data.batch(number, c.batch)
    dropped = uniform(c.seed, samples, step, Purpose.DROP_CAPTION)[:, 0] < c.drop_caption
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    noise = c.seed, samples, step, Purpose.TRAIN_NOISE
    eps = normal(*noise, model.latent_shape) if model.array_module is np else Draw(*noise)
    return Batch(images, captions, draw_timesteps(c, samples, step, model.schedule.T), eps)


def draw_timesteps(c: TrainConfig, samples: Sequence[int], step: int, T: int) -> np.ndarray:
    """The noise levels t (B,) in 1..T of a batch's samples: uniform, or T sigmoid(mean + std * normal).

    The second visits the middle more often than the two ends. Esser et al. 2024, arXiv 2403.03206.
    """
    if c.timesteps == "uniform":
        u = uniform(c.seed, samples, step, Purpose.TRAIN_TIMESTEP)[:, 0]
    else:
        z = normal(c.seed, samples, step, Purpose.TRAIN_TIMESTEP, (1,))[:, 0].astype(np.float64)
        u = 1 / (1 + np.exp(-(c.logit_mean + c.logit_std * z)))
    return np.minimum(1 + (u * T).astype(np.int64), T)


def train(state: TrainState, data: Dataset) -> Iterator[StepLog]:
    """Take optimizer steps until state.config.train.steps, yielding after each. The state is the caller's to save.

    Where `minutes` are given, they become `steps` on the way (state.config is replaced). The next step's data is
    prepared in a thread beside the current step. Raises Diverged if the loss or a gradient is not finite; the
    parameters are then those of the step before.
    """
    c = state.config.train
    measured = min(100, c.warmup)  # steps that show the speed; the warm-up does not ask how long the run will be
    durations: list[float] = []
    if c.minutes and state.step >= measured:
        _set_steps_from_minutes(state, state.seconds / state.step)

    def draw(step: int) -> list[Batch]:
        return [draw_batch(state, data, step, part) for part in range(c.accumulate)]

    take_step = captured_step(state) if c.capture else partial(step, clip=c.clip)
    threads = min(num_workers(state.model.array_module), c.accumulate)
    copy_of = state.config, state.model.tokenizer.words, state.model.image_shape
    models = [state.model, *(_model(*copy_of, seed=None) for _ in range(threads - 1))]
    with ThreadPoolExecutor(1, "data", begin_thread) as pool:
        upcoming = pool.submit(draw, state.step + 1)
        while state.config.train.minutes or state.step < state.config.train.steps:
            started = time.perf_counter()
            batches = upcoming.result()
            waited = time.perf_counter() - started
            upcoming = pool.submit(draw, state.step + 2)
            lr = learning_rate(state.step + 1, state.config.train.steps, c.lr, c.warmup)
            loss, norm = take_step(models, state.optimizer, batches, lr)
            seconds = time.perf_counter() - started
            state.seconds += seconds
            durations.append(seconds)
            if state.config.train.minutes and state.step >= measured:
                # the first steps are slower than the rest, and one may be held up: the median of the second half
                _set_steps_from_minutes(state, float(np.median(durations[len(durations) // 2 :])))
            n = c.batch * c.accumulate
            yield StepLog(
                state.step, loss, lr, norm, state.step * n, state.seconds / 60, n / seconds, waited, peak_memory() / 1e9
            )


def step(
    models: Sequence[TextToImage], optimizer: AdamW, batches: Sequence[Batch], lr: float, clip: float
) -> tuple[float, float]:
    """Take one optimizer step: the mean loss over the batches, and the norm of its gradient before clipping."""
    loss, grads = loss_and_gradients(models, batches)
    norm = float(gradient_norm(list(grads.values())))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Diverged(_not_finite(optimizer.step_number + 1, loss, grads))
    optimizer.step(lr, grads, float(clip_factor(norm, clip)))
    return loss, norm


def loss_and_gradients(models: Sequence[TextToImage], batches: Sequence[Batch]) -> tuple[float, dict[str, Any]]:
    """The mean loss over the batches, and its gradient by parameter.

    The first model is the one trained; any others are its copies, in which passes run beside each other. The passes are
    added in the order of the batches, so that the number of copies does not change the sum.
    """
    free = SimpleQueue[TextToImage]()
    for model in models:
        if model is not models[0]:
            model.load(models[0].state())
        free.put(model)

    def one_pass(batch: Batch) -> tuple[Array, dict[str, Any]]:
        model = free.get()
        try:
            return gradients(model, _question(model, batch), 1 / len(batches))
        finally:
            free.put(model)

    loss, grads = _added(parallel_map(one_pass, batches, len(models)))
    return float(loss), grads


def _question(model: TextToImage, batch: Batch) -> Question:
    return model.question(batch.images, batch.captions, batch.t, batch.eps)


def _added(passes: Iterable[tuple[Array, dict[str, Array]]]) -> tuple[Array, dict[str, Array]]:
    total: Any = 0.0
    grads: dict[str, Array] = {}
    for loss, part in passes:
        total = total + loss
        grads = {name: accumulate(grads[name], g) for name, g in part.items()} if grads else part
    return total, grads


def gradients(model: TextToImage, question: Question, weight: float) -> tuple[Array, dict[str, Array]]:
    """weight times the loss, and its gradient by parameter."""
    parameters = dict(model.named_parameters())
    with np.errstate(all="ignore"):  # what is not finite is noticed, and told, by `step`
        loss = model.answer_loss(question) * weight
        loss.backward()
    xp = model.array_module
    # a parameter that the loss does not reach (the text encoder of a U-Net without cross-attention) has none
    grads = {name: xp.zeros_like(p.data) if p.grad is None else p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return loss.data, grads


def captured_step(state: TrainState) -> Callable[..., tuple[float, float]]:
    """`step` as one CUDA graph: what Python does in it, it does once. For models on a GPU.

    Where the loss is not finite the parameters are left alone, as in `step`.
    """
    model, optimizer, clip = state.model, state.optimizer, state.config.train.clip
    if model.array_module is np:
        raise UserError("train.capture is for a GPU: --train.device cuda")
    from minidiff.cuda import Captured

    def whole(numbers: Array, *arrays: Array | None) -> tuple[Array, Array]:
        width = len(Question._fields)
        questions = [Question(*arrays[i : i + width]) for i in range(0, len(arrays), width)]
        loss, grads = _added(gradients(model, question, 1 / len(questions)) for question in questions)
        norm = gradient_norm(list(grads.values()))
        numbers[:, 0] *= clip_factor(norm, clip)
        optimizer.update(grads, numbers)
        return loss, norm

    graph = Captured(whole)

    def take_step(models: Any, optimizer: AdamW, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        arrays = [a for batch in batches for a in _question(model, batch)]
        numbers = optimizer.next_numbers(lr)
        if graph.graph is None:
            graph.capture(numbers * math.nan, *arrays)  # its rehearsal changes nothing
        loss, norm = map(float, graph(numbers, *arrays))
        if not math.isfinite(loss) or not math.isfinite(norm):
            optimizer.step_number -= 1
            raise Diverged(_not_finite(optimizer.step_number + 1, loss, {}))
        return loss, norm

    return take_step


def _not_finite(step: int, loss: float, grads: dict[str, Any]) -> str:
    bad = [name for name, g in grads.items() if not np.isfinite(to_numpy(g)).all()]
    where = f"the gradient of {bad[0]} and {len(bad) - 1} others is not finite" if bad else "the gradients overflow"
    return f"step {step}: the loss is {loss}, {where}; {_CALM}"


# ---- a whole run: folder, log, bar, sample grids, checkpoints, Ctrl-C


def fit(
    state: TrainState,
    folder: Path,
    on_sample: Callable[[TrainState, Dataset, Path], None] | None = None,
    data: Dataset | None = None,
) -> bool:
    """Train to the end, writing to the run's folder; returns whether it got there (False after Ctrl-C).

    on_sample(state, data, path) draws the sample grid of a step into a PNG file. data: the run's, opened here if not
    given; UserError if it is not what the run began with. A run that diverges keeps the checkpoint that it has, and
    Diverged says of which step it is.
    """
    data = data or data_of(state.config)
    if state.content and state.content != data.content:
        raise UserError(
            f"{folder}: its data have changed since the run began; go on with the same pictures and captions (--data), "
            "or begin another run with --out"
        )
    keep_log_until(folder / LOG, state.step)
    remove_unfinished(folder / FILE)
    stop = _StopFlag()
    written = None
    saved = state.step if (folder / FILE).exists() else -1

    def save() -> None:
        nonlocal saved
        if saved < state.step:
            _check_finite(state)
            save_state(state, folder / FILE)
            saved = state.step

    def write_config() -> None:
        nonlocal written
        if written is not state.config:
            (folder / "config.toml").write_text(config_to_toml(state.config))
            written = state.config

    write_config()
    save()
    with (
        stop,
        open(folder / LOG, "a", buffering=1) as log,
        tqdm(total=state.config.train.steps, initial=state.step, unit="step", dynamic_ncols=True) as bar,
    ):
        try:
            for record in train(state, data):
                log.write(json.dumps(asdict(record)) + "\n")
                bar.update()
                bar.set_postfix_str(f"loss {record.loss:.4f}, {record.images_per_second:.0f} images/s", refresh=False)
                write_config()
                bar.total = state.config.train.steps
                if record.step % state.config.train.save_every == 0 or stop:
                    save()
                every = state.config.train.sample_every
                if on_sample and every and record.step % every == 0:
                    path = folder / "samples" / f"step_{record.step:06d}.png"
                    try:
                        on_sample(state, data, path)
                    except (OSError, ValueError) as e:
                        bar.write(f"minidiff: no sample grid of step {record.step}: {e}", file=sys.stderr)
                if stop:
                    break
            save()
        except Diverged as e:
            raise Diverged(f"{e}; {folder / FILE} is of step {saved}, before that") from e
    return state.step >= state.config.train.steps


def _check_finite(state: TrainState) -> None:
    """A checkpoint never replaces good weights by ruined ones."""
    for arrays in (state.model.state(), state.optimizer.ema):
        for name, array in arrays.items():
            if not np.isfinite(to_numpy(array)).all():
                raise Diverged(f"step {state.step}: {name} is not finite; {_CALM}")


def _set_steps_from_minutes(state: TrainState, seconds_a_step: float) -> None:
    """Replace `minutes` by the number of steps that fit into them."""
    remaining = (60 * state.config.train.minutes - state.seconds) / seconds_a_step
    steps = max(state.step, state.config.train.warmup + 1, state.step + int(remaining))
    state.config = replace(state.config, train=replace(state.config.train, steps=steps, minutes=0.0))


def keep_log_until(path: Path, step: int) -> None:
    """Drop the log's records after `step` (and a torn last line): a resumed run writes them anew."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    with whole_file(path) as file:
        file.write_text("".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a line that a killed run left torn is passed over."""
    with open(folder / LOG) as f:
        return [json.loads(line) for line in f if _step_of(line) < math.inf]


class _StopFlag:
    """Ctrl-C (or SIGTERM) sets a flag that is read between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.set = False

    def __bool__(self) -> bool:
        return self.set

    def _handle(self, number: int, frame: Any) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True

    def __enter__(self) -> _StopFlag:
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
