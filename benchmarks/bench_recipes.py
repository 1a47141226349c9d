"""Which recipe learns `shapes` best: each is trained on the same number of images, then scored.

    python benchmarks/bench_recipes.py [NAME ...] --images 100000
    python benchmarks/bench_recipes.py --speed           images a second of each recipe, on an idle machine

A recipe is the preset with a few settings changed. Scores are those of validation captions (the test captions are
kept for the model that is chosen), from the averaged weights, at the best of several guidance scales. Results already
written are kept: name recipes to measure them again. Writes results/recipes-DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
from common import results_path, write_json

from minidiff.config import load_config
from minidiff.data import open_data
from minidiff.data.shapes import SCORES
from minidiff.evaluate import evaluate
from minidiff.models import parameter_count
from minidiff.train import averaged_weights, new_state, train

GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0)
FIRST = {  # what the preset was when most of these were compared; the names say what was changed in it
    "diffusion.schedule": "linear", "diffusion.weight_limit": "5", "unet.time_scale_shift": "true",
}  # fmt: skip
RECIPES: dict[str, dict[str, str]] = {
    "preset": {},
    "preset, weight limit 5": {"diffusion.weight_limit": "5"},
    "preset, linear schedule": {"diffusion.schedule": "linear"},
    "preset, timestep scales and shifts": {"unet.time_scale_shift": "true"},
    "preset, channels 64, 64": {"unet.channels": "64,64"},
    "preset, AdamW alone": {"train.optimizer": "adamw"},
    "first": FIRST,
    "first, AdamW alone": {**FIRST, "train.optimizer": "adamw"},
    "first, both objects as often first": {**FIRST, "data.ahead_first": "0.5"},
    "first, timestep added, no scale": {**FIRST, "unet.time_scale_shift": "false"},
    "first, logit-normal timesteps": {**FIRST, "train.timesteps": "logit_normal", "train.logit_mean": "-0.3"},
    "first, all weights 1": {**FIRST, "diffusion.weight_limit": "1"},
    "first, eps": {**FIRST, "diffusion.prediction": "eps"},
    "first, v": {**FIRST, "diffusion.prediction": "v"},
    "first, cosine schedule": {**FIRST, "diffusion.schedule": "cosine"},
    "first, 16x16, patch 2": {**FIRST, "data.size": "16", "diffusion.patch": "2"},
    "first, narrower: 32, 64": {**FIRST, "unet.channels": "32,64"},
    "first, wider: 64, 96": {**FIRST, "unet.channels": "64,96"},
    "first, attention at 8x8 too": {**FIRST, "unet.attention": "cross,cross"},
    "first, text width 128": {**FIRST, "text.width": "128"},
    "first, lr 2e-3": {**FIRST, "train.lr": "2e-3"},
    "first, lr 3e-4": {**FIRST, "train.lr": "3e-4"},
    "first, batch 64": {**FIRST, "train.batch": "64"},
    "first, EMA 0.99": {**FIRST, "train.ema_decay": "0.99"},
}


def measure(changes: dict[str, str], images: int, n: int) -> dict[str, Any]:
    """Train the recipe, and score it at each guidance scale."""
    batch = int(changes.get("train.batch", load_config("shapes").train.batch))
    config = load_config("shapes", {**changes, "train.steps": images // batch})
    state = new_state(config)
    losses = []
    for log in train(state, open_data(config.data, config.train.seed)):
        losses.append(log.loss)
    with averaged_weights(state) as model:
        settings = {w: replace(config.sample, guidance=w, steps=25) for w in GUIDANCE}
        scores = {w: evaluate(model, settings[w], n, split="val").scores for w in GUIDANCE}
    best = max(scores, key=lambda w: (scores[w]["all_right"], sum(scores[w][name] for name in SCORES)))
    return {
        "changes": changes,
        "parameters": parameter_count(state.model),
        "images": log.images,
        "loss": float(np.mean(losses[-200:])),
        "guidance": best,
        "n": n,
        **{name: scores[best][name] for name in SCORES},
    }


def speed(changes: dict[str, str], steps: int = 60) -> float:
    """Images a second in training, without the first 20 steps."""
    state = new_state(load_config("shapes", {**changes, "train.steps": steps}))
    logs = list(train(state, open_data(state.config.data, state.config.train.seed)))
    return (logs[-1].images - logs[19].images) / (60 * (logs[-1].minutes - logs[19].minutes))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, the best first."""
    names = ["recipe", "images/s", "parameters", "w", *(name.replace("_", " ") for name in SCORES)]
    lines = [" | ".join(["", *names, ""]).strip(), "|" + " --- |" * len(names)]
    for name, r in sorted(rows.items(), key=lambda item: -item[1]["all_right"]):
        fast = f"{r['images_per_second']:.0f}" if "images_per_second" in r else ""
        cells = [name, fast, f"{r['parameters'] / 1e6:.1f} M"]
        cells += [f"{r['guidance']:g}", *(f"{r[s]:.1%}" for s in SCORES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, RECIPES))}")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument(
        "--speed", action="store_true", help="only measure the images a second of the results there are"
    )
    parser.add_argument("--n", type=int, default=200, help="validation captions")
    args = parser.parse_args()
    path = results_path("recipes", "json")
    rows = json.loads(path.read_text())["recipes"] if path.exists() else {}
    for name in args.names or [name for name in RECIPES if (name in rows) == args.speed]:
        if args.speed:
            rows[name]["images_per_second"] = speed(RECIPES[name])
        else:
            rows[name] = measure(RECIPES[name], args.images, args.n)
        print(name, json.dumps(rows[name]), flush=True)
        command = f"bench_recipes.py --images {args.images}, and --speed"
        write_json("recipes", {"command": command, "recipes": rows})
        results_path("recipes", "md").write_text(table(rows))


if __name__ == "__main__":
    main()
