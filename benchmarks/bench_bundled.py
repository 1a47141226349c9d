"""The model in the box: its score against the guidance scale 0..15 and against the number of sampling steps 1..1000.

    python benchmarks/bench_bundled.py [--run FILE] [--n 500]
    python benchmarks/bench_bundled.py --training FOLDER        # how it was made: the log of the run, thinned

The guidance scale is chosen on validation captions; everything else is measured on the held-out ones of the test split,
500 of them, none of whose pairs of objects was ever trained on. Writes results/bundled-DEVICE.json, .md and two plots;
of the run results/bundled_training-DEVICE.json and a plot of its loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import median, results_path, thinned, write_json

from minidiff import plotting
from minidiff.config import SampleConfig, config_to_dict
from minidiff.evaluate import evaluate
from minidiff.models import parameter_count
from minidiff.text_to_image import TextToImage
from minidiff.train import BUNDLED, load_model, read_log

GUIDANCE = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15)
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 35, 50, 100, 200, 500, 1000)
SCORES = {"all_right": "all right", "colours": "colours", "shapes": "shapes", "sizes": "sizes", "relation": "relation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=str(BUNDLED), help="a run, or a file that `minidiff export` wrote")
    parser.add_argument("--n", type=int, default=500, help="captions")
    parser.add_argument("--training", metavar="FOLDER", help="the run that made it")
    args = parser.parse_args()
    if args.training:
        return training(Path(args.training))

    model, config = load_model(args.run)
    drawn = replace(config.sample, sampler="ddim", steps=50)
    guided = [replace(drawn, guidance=float(w)) for w in GUIDANCE]
    val = scores(model, guided, args.n, "val")
    best = max(range(len(GUIDANCE)), key=lambda i: val[i]["all_right"])  # the first of equals: the least guidance
    w = GUIDANCE[best]
    test = scores(model, guided, args.n, "test")
    stepped = scores(model, [replace(drawn, guidance=float(w), steps=n) for n in STEPS], args.n, "test")

    plot("guidance", "guidance scale w", GUIDANCE, test, f"50 DDIM steps, held-out captions (n={args.n})", log="")
    plot("steps", "DDIM steps", STEPS, stepped, f"guidance {w:g}, held-out captions (n={args.n})", log="x")
    record = {
        "command": f"bench_bundled.py --n {args.n}",
        "bytes": Path(args.run).stat().st_size if Path(args.run).is_file() else None,
        "parameters": parameter_count(model),
        "n": args.n,
        "chosen_guidance": w,
        "scores": test[best],
        "guidance": [{"w": w, "val": v, "test": t} for w, v, t in zip(GUIDANCE, val, test, strict=True)],
        "steps": [{"steps": n, "test": t} for n, t in zip(STEPS, stepped, strict=True)],
    }
    write_json("bundled", record)
    rows = ["| guidance | validation | test |", "| --- | --- | --- |"]
    rows += [
        f"| {g:g} | {v['all_right']:.1%} | {t['all_right']:.1%} |" for g, v, t in zip(GUIDANCE, val, test, strict=True)
    ]
    rows += ["", "| DDIM steps | test |", "| --- | --- |"]
    rows += [f"| {n} | {t['all_right']:.1%} |" for n, t in zip(STEPS, stepped, strict=True)]
    results_path("bundled", "md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))
    print(f"chosen on validation captions: guidance {w:g}; test captions fully right: {test[best]['all_right']:.1%}")


def training(run: Path) -> None:
    """The log and the settings of the run that made the model."""
    log = read_log(run)
    plotting.save(
        plotting.loss_curve({"the model in the box": log}, x="images", title="the model in the box: training loss"),
        results_path("bundled_training", "png"),
    )
    write_json(
        "bundled_training",
        {
            "command": "bench_bundled.py --training FOLDER",
            "minutes": log[-1]["minutes"],
            "images": log[-1]["images"],
            "images_per_second": median([r["images_per_second"] for r in log]),
            "memory_gb": max(r["memory_gb"] for r in log),
            "config": config_to_dict(load_model(run)[1]),
            "log": thinned(log),
        },
    )


def scores(model: TextToImage, settings: Iterable[SampleConfig], n: int, split: str) -> list[dict[str, float]]:
    """What evaluate says at each of the settings."""
    found = []
    for s in settings:
        found.append(evaluate(model, s, n, split=split).scores)
        print(f"{split}: guidance {s.guidance:g}, {s.steps} steps: {found[-1]['all_right']:.1%}", flush=True)
    return found


def plot(name: str, xlabel: str, xs: Iterable[float], found: list[dict[str, float]], title: str, log: str) -> Any:
    """Every score against xs, into the results."""
    lines = {label: (list(xs), [100 * s[key] for s in found]) for key, label in SCORES.items()}
    figure = plotting.line_plot(lines, xlabel, "right (%)", title, marker="o", log=log)
    return plotting.save(figure, results_path("bundled", f"{name}.png"))


if __name__ == "__main__":
    main()
