"""Stable Diffusion at full size, every weight random, against diffusers: the same pictures, time, and memory.

    python benchmarks/bench_pretrained.py [NAME ...] --samples 5    (needs: pip install -e '.[compare]')

diffusers makes a folder of random weights (4 to 5 GB, in the temporary folder), and each side loads it in a process of
its own, which waits while another is asked. First the results are compared: text tokens, the U-Net's answer, decoded
images, and the latents after two steps with guidance. Then, in turns: a step of the reverse process (two conditions, so
two samples in the U-Net), and decoding to 512 x 512 pixels. Memory is the most that a process ever had in use, after
loading, after drawing latents, and after decoding. --samples 0 only compares. Writes results/pretrained-DEVICE.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import PYTORCH, THREADS, Worker, in_turns, results_path, serve, spread, timed, write_json

from minidiff.threads import peak_memory

PROMPT, NEGATIVE, GUIDANCE, SAMPLER, STEPS = "a photo of the red cat in a small house", "dogs", 7.5, "ddim", 3
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": {
        "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "text": dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            hidden_act="quick_gelu",
        ),
        "scheduler": dict(prediction_type="epsilon"),
    },
    "Stable Diffusion 2.1": {
        "unet": dict(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
        ),
        "text": dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        ),
        "scheduler": dict(prediction_type="v_prediction"),
    },
}  # fmt: skip
WORST = 1e-4  # of the largest number of a result; latents after several steps: 1e-3


def latents() -> np.ndarray:
    """The starting noise: 64 x 64 latents, 512 x 512 pixels."""
    return np.random.default_rng(0).standard_normal((1, 64, 64, 4), dtype=np.float32)


def write_folder(name: str, folder: Path) -> None:
    """A pipeline of diffusers with random weights."""
    import diffusers
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import test_bpe

    torch.manual_seed(0)
    sizes = SIZES[name]
    words = {"model_max_length": 77, "pad_token": test_bpe.END, "tokenizer_class": "CLIPTokenizer"}
    test_bpe.write_folder(folder / "words", test_bpe.learned(), words)
    text = transformers.CLIPTextConfig(vocab_size=49408, bos_token_id=49406, eos_token_id=49407, **sizes["text"])
    scheduler = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False, **sizes["scheduler"],
    )  # fmt: skip
    levels = [128, 256, 512, 512]
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=levels, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, sample_size=512,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        unet=diffusers.UNet2DConditionModel(**sizes["unet"]),
        scheduler=diffusers.DDIMScheduler(**scheduler),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip


# ---- the sides: each loads the folder and returns its commands


def ours(folder: Path) -> dict[str, Callable[[], Any]]:
    """minidiff's pipeline."""
    from minidiff import no_grad
    from minidiff.pretrained import load_pipeline

    pipe = load_pipeline(folder)
    given = dict(negative_prompt=NEGATIVE, latents=latents(), sampler=SAMPLER, progress=False)

    def step() -> float:
        walk = pipe.denoise(PROMPT, STEPS, GUIDANCE, NEGATIVE, latents=latents(), sampler=SAMPLER)
        return between([time.perf_counter() for _ in walk])

    def results() -> dict[str, np.ndarray]:
        tokens, _ = pipe.condition([PROMPT])
        with no_grad():
            answer = pipe.unet(latents(), 500, (tokens, None)).data
        return {"tokens": tokens, "answer": answer, "images": pipe.decode(latents()), "latents": draw()}

    def draw() -> np.ndarray:
        return np.asarray(pipe(PROMPT, STEPS, GUIDANCE, output="latent", **given))

    return {"step": step, "decode": lambda: timed(lambda: pipe.decode(latents())), "results": results, "draw": draw}


def theirs(folder: Path, way: str) -> dict[str, Callable[[], Any]]:
    """diffusers' pipeline. way: contiguous, channels last, compiled."""
    import diffusers
    import torch

    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if way == "channels last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    elif way == "compiled":
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    start = torch.from_numpy(latents().transpose(0, 3, 1, 2).copy())

    def draw(at_end: Any = None) -> np.ndarray:
        x = pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, negative_prompt=NEGATIVE, latents=start,
            output_type="latent", height=512, width=512, callback_on_step_end=at_end,
        ).images  # fmt: skip
        return x.numpy().transpose(0, 2, 3, 1)

    def step() -> float:
        ends: list[float] = []
        draw(lambda _pipe, _i, _t, given: ends.append(time.perf_counter()) or given)
        return between(ends)

    def decoded() -> Any:
        with torch.inference_mode():
            return pipe.vae.decode(start / pipe.vae.config.scaling_factor).sample

    def results() -> dict[str, np.ndarray]:
        with torch.inference_mode():
            tokens, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
            answer = pipe.unet(start, 499, tokens).sample
        last = {"answer": answer, "images": decoded()}
        return {
            "tokens": tokens.numpy(),
            "latents": draw(),
            **{k: v.numpy().transpose(0, 2, 3, 1) for k, v in last.items()},
        }

    return {"step": step, "decode": lambda: timed(decoded), "results": results, "draw": draw}


def between(ends: list[float]) -> float:
    """Seconds of the last step: from the end of the one before to its own."""
    return ends[-1] - ends[-2]


class Side:
    """A worker's state: a pipeline, and how much memory the process had at most when it was loaded."""

    def __init__(self, side: str, folder: str):
        self.side, self.folder = side, Path(folder)
        self.commands: dict[str, Callable[[], Any]] = {}

    def __call__(self, command: str, name: str = "", file: str = "") -> Any:
        """Seconds of a command; of "memory" the most bytes ever in use."""
        if command == "folder":
            return write_folder(name, self.folder)
        if command == "memory":
            return peak_memory()
        if command == "load":
            place = self.folder / "model"
            started = time.perf_counter()
            self.commands = ours(place) if self.side == "ours" else theirs(place, self.side)
            return time.perf_counter() - started
        if command == "results":
            return np.savez(file, **self.commands["results"]())
        answer = self.commands[command]()
        return answer if isinstance(answer, float) else None


def measure(name: str, samples: int, ways: list[str]) -> dict[str, Any]:
    """Compare, then time in turns; memory in fresh processes."""
    with tempfile.TemporaryDirectory() as tmp:
        maker = Worker("folder", tmp)
        maker.ask(command="folder", name=name)
        maker.close()
        ways = ways if samples else ways[:1]
        memory = {side: peaks(side, tmp) for side in ("ours", ways[0]) if samples}
        workers = {side: Worker(side, tmp) for side in ("ours", *ways)}
        try:
            load = {side: worker.ask(command="load") for side, worker in workers.items()}
            errors = compared(workers["ours"], workers[ways[0]], Path(tmp))
            record: dict[str, Any] = {"errors": errors}
            if not samples:
                return record
            record |= {"peak bytes": memory, "load seconds": load}
            for what in ("step", "decode"):
                ask = {side: (lambda w=w, c=what: w.ask(command=c)) for side, w in workers.items()}
                for warm_up in ask.values():
                    warm_up()
                seconds = in_turns(ask, samples)
                best = min(ways, key=lambda way: seconds[way]["median"])
                ratio = seconds[best]["median"] / seconds["ours"]["median"]
                record[what] = {"seconds": seconds, "best rival": best, "ratio": ratio}
            return record
        finally:
            for worker in workers.values():
                worker.close()


def peaks(side: str, folder: str) -> dict[str, int]:
    """The most memory of a process, in bytes, up to each point of drawing one picture."""
    worker = Worker(side, folder)
    found = {}
    for command in ("load", "draw", "decode"):
        worker.ask(command=command)
        found[command] = worker.ask(command="memory")
    worker.close()
    return found


def compared(one: Worker, other: Worker, tmp: Path) -> dict[str, float]:
    """The largest differences of the results, relative to the largest number of each."""
    files = {}
    for side, worker in (("ours", one), ("theirs", other)):
        files[side] = tmp / f"{side}.npz"
        worker.ask(command="results", file=str(files[side]))
    with np.load(files["ours"]) as found, np.load(files["theirs"]) as wanted:
        errors = {
            key: float(np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max()) for key in wanted.files
        }
    bad = {key: e for key, e in errors.items() if not e <= WORST * (10 if key == "latents" else 1)}
    if bad:
        raise RuntimeError(f"the results differ: {bad}")
    return errors


def table(records: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = ["model", "what", "ours (ms)", "diffusers (ms)", "its best way", "diffusers / ours"]
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    timed = {name: r for name, r in records.items() if "step" in r}
    for name, r in timed.items():
        for what, told in (("step", "a step, 64 x 64 latents, guidance"), ("decode", "latents to 512 x 512 pixels")):
            s, best = r[what]["seconds"], r[what]["best rival"]
            cells = [name, told, spread(s["ours"]), spread(s[best]), best, f"{r[what]['ratio']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | most memory after | ours (GB) | diffusers (GB) |", "| --- | --- | --- | --- |"]
    for name, r in timed.items():
        mine, other = r["peak bytes"].values()
        for what, told in (("load", "loading"), ("draw", f"{STEPS} steps"), ("decode", "decoding")):
            lines.append(f"| {name} | {told} | {mine[what] / 1e9:.2f} | {other[what] / 1e9:.2f} |")
    lines += ["", "Largest differences, relative to the largest number of a result:", ""]
    for name, r in records.items():
        lines.append(f"- {name}: {', '.join(f'{key} {e:.1e}' for key, e in sorted(r['errors'].items()))}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, SIZES))}")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes, and 5 GB more of memory)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(Side(*args.serve))
    path = results_path("pretrained", "json")
    records = json.loads(path.read_text())["models"] if path.exists() and args.names else {}
    rivals = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    for name in args.names or SIZES:
        records[name] = measure(name, args.samples, [w for w in PYTORCH if args.compile or w != "compiled"])
        print(name, json.dumps(records[name], indent=1), flush=True)
        records = {n: records[n] for n in SIZES if n in records}
        records[name]["command"] = f"bench_pretrained.py {name!r} --samples {args.samples}"
        write_json("pretrained", {"rivals": rivals, "models": records})
        results_path("pretrained", "md").write_text(table(records))


if __name__ == "__main__":
    main()
