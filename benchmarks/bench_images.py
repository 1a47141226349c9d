"""A training run on real pictures, looked at on the way: a grid of samples, and how a classifier judges them.

    python benchmarks/bench_images.py PRESET --data FOLDER [--minutes 120] [--marks 10,60,120] [SECTION.SETTING=X ...]

The run is an ordinary one in --out: interrupted, the same command goes on with it. Its first steps show how many steps
--minutes are; --marks are shares of these. Only training counts as minutes; looking does not. The learning rate falls
to zero over the whole run, so a grid from its middle is worse than that of a run that was planned to end there.
Pictures with classes are judged by the classifier of `minidiff evaluate`. Where there are captions of other pictures,
as of COCO's validation set, the left half of a grid is of captions that were trained on, the right half of those. The
grid is compared with the set: copies lie much nearer to its pictures than these lie to each other.
Writes results/images_PRESET-DEVICE.json, .md, .loss.png, a grid for each mark and .progress.png, a row of each; where
the data has a SOURCES.md, .sources.md; and in the run's folder nearest.png, the samples that are nearest to a picture
of the set, each beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from common import median, results_path, summary, thinned, write_json

from minidiff import plotting
from minidiff.checkpoint import FILE
from minidiff.classifier import open_classifier
from minidiff.config import TrainConfig, config_to_dict, load_config
from minidiff.data import Dataset
from minidiff.data.pictures import scaled, some_of
from minidiff.evaluate import MOST, evaluate_classes, nearest_pictures
from minidiff.models import parameter_count
from minidiff.sample import draw
from minidiff.train import TrainState, averaged_weights, data_of, fit, load_state, new_state, read_log

LOOK_EVERY = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("settings", nargs="*", metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--marks", default="10,60,120", help="when to look, in minutes of --minutes")
    parser.add_argument("--n", type=int, default=500, help="pictures for the classifier")
    parser.add_argument("--out", metavar="FOLDER", help="the run (default: runs/images_PRESET)")
    args = parser.parse_intermixed_args()

    folder = Path(args.out or f"runs/images_{args.preset}")
    state, data = begin(args, folder)
    marks = [float(m) for m in args.marks.split(",")]
    judge = open_classifier(state.config.data, state.config.text.context - 2) if getattr(data, "classes", ()) else None
    done = folder / "marks.json"

    def reached(mark: float, c: TrainConfig) -> bool:
        return not c.minutes and state.step >= round(c.steps * mark / args.minutes)

    def look(state: TrainState, data: Dataset, path: Path) -> None:
        records = json.loads(done.read_text()) if done.exists() else []
        if len(records) < len(marks) and reached(marks[len(records)], state.config.train):
            records.append(looked(args, state, data, judge, marks[len(records)], folder))
            done.write_text(json.dumps(records, indent=2))

    if fit(state, folder, look, data):
        look(state, data, folder)  # the last step may not have been looked at
        write_results(args, state, data, folder, json.loads(done.read_text()))


def begin(args: argparse.Namespace, folder: Path) -> tuple[TrainState, Any]:
    """The run in the folder, or a new one."""
    if (folder / FILE).exists():
        state = load_state(folder / FILE)
        return state, data_of(state.config)
    settings = {"data.path": args.data, "train.minutes": args.minutes, **dict(s.split("=", 1) for s in args.settings)}
    config = load_config(args.preset, {**settings, "train.sample_every": LOOK_EVERY})
    data = data_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    return new_state(config, data), data


def looked(
    args: argparse.Namespace, state: TrainState, data: Any, judge: Any, mark: float, folder: Path
) -> dict[str, Any]:
    """Draw a grid into the results; what the classifier says of n pictures, where there is one."""
    captions, columns, known = asked(data)
    images_seen, minutes = state.step * state.config.train.batch * state.config.train.accumulate, state.seconds / 60
    with averaged_weights(state) as model:
        images = draw(model, captions, state.config.sample)
        scores = {}
        if judge:
            result = evaluate_classes(model, state.config.sample, *judge, args.n)
            scores = {"agreement": result.scores, "chance": result.chance["all"], "n": args.n, "real": judge[1]}
            print(result.headline)
    near = distances(images, data, known, folder / "nearest.png")
    np.save(folder / f"{mark:g}-minutes.npy", plotting.to_uint8(images[:columns]))
    title = f"{args.preset} after {minutes:.0f} minutes, {images_seen:,} images"
    grid = plotting.image_grid(images, captions, columns, title=title)
    plotting.save(grid, results_path(f"images_{args.preset}", f"{mark:g}-minutes.png"))
    return {"mark": mark, "minutes": minutes, "step": state.step, "images": images_seen, "nearest": near, **scores}


def asked(data: Any) -> tuple[list[str], int, np.ndarray]:
    """The captions of a grid, how many are in a row, and which of them (n,) were trained on."""
    prompts, trained_on = list(data.prompts), {text for texts in data.captions for text in texts}
    n = min(len(data), len(prompts)) // 4 * 4
    if n and not trained_on.issuperset(prompts):
        known = [data.captions[i][0] for i in some_of(len(data), n)]
        captions = [text for i in range(0, n, 4) for text in (*known[i : i + 4], *prompts[i : i + 4])]
        return captions, 8, np.arange(2 * n) % 8 < 4
    prompts = prompts[:MOST]
    captions = prompts * max(1, MOST // len(prompts))
    columns = len(prompts) if 5 <= len(prompts) <= 10 else min(8, len(captions))
    return captions, columns, np.full(len(captions), True)


def distances(images: np.ndarray, data: Any, known: np.ndarray, path: Path) -> dict[str, dict[str, float]]:
    """How far the samples are from the nearest picture of the set, and as many of these from theirs; draws the nearest.

    known: which samples are of captions that were trained on; the others are counted by themselves. The drawing holds
    pictures of the set, which may not be free: it is not for the results.
    """
    twins, far = nearest_pictures(images, data)
    some = some_of(len(data), len(images))
    _, apart = nearest_pictures(scaled(data.images[data.rows[some]]), data, but=some)
    first = np.argsort(far)[:8]
    pairs = np.stack([images[first], scaled(data.images[data.rows[twins[first]]])], axis=1)
    texts = [text for d in far[first] for text in ("drawn", f"nearest picture: {d:.2f}")]
    plotting.save(plotting.image_grid(pairs.reshape(-1, *images.shape[1:]), texts, 8), path)
    of = {"samples": far[known], "samples of other captions": far[~known], "pictures": apart}
    return {name: {**summary(d), "least": float(d.min())} for name, d in of.items() if len(d)}


def write_results(args: argparse.Namespace, state: TrainState, data: Any, folder: Path, records: list[dict]) -> None:
    log = read_log(folder)
    loss = plotting.loss_curve({args.preset: log}, x="minutes", title=f"{args.preset}: training loss")
    plotting.save(loss, results_path(f"images_{args.preset}", "loss.png"))
    plotting.save(progress(args.preset, data, folder, records), results_path(f"images_{args.preset}", "progress.png"))
    rate, seconds = [r["images_per_second"] for r in log], 60 * log[-1]["minutes"]
    config = config_to_dict(state.config)
    config["data"] |= {"path": "FOLDER", "cache": ""}
    settings = [setting for setting in args.settings if not setting.startswith("data.cache=")]
    facts = {
        "command": f"bench_images.py {args.preset} --data FOLDER --minutes {args.minutes:g} --marks {args.marks} "
        + " ".join([f"--n {args.n}", *settings]),
        "pictures": len(data),
        "parameters": parameter_count(state.model),
        "images_per_second": {"median": median(rate), "mean": log[-1]["images"] / seconds},
        "share_of_time_waited_for_data": sum(r["waited"] for r in log) / seconds,
        "memory_gb": log[-1]["memory_gb"],
        "marks": records,
        "loss": thinned(log),
        "config": config,
    }
    write_json(f"images_{args.preset}", facts)
    results_path(f"images_{args.preset}", "md").write_text(table(facts))
    if (sources := Path(args.data) / "SOURCES.md").is_file():
        shutil.copy(sources, results_path(f"images_{args.preset}", "sources.md"))


def progress(preset: str, data: Any, folder: Path, records: list[dict]) -> plotting.Chart:
    """The first row of every mark's grid, which all begin with the same noise, one below the other."""
    rows = np.stack([scaled(np.load(folder / f"{m['mark']:g}-minutes.npy")) for m in records])
    times = [f"{m['minutes']:.0f} minutes" for m in records]
    return plotting.progress(rows, asked(data)[0][: rows.shape[1]], times, title=f"{preset}: from the same noise")


def table(facts: dict[str, Any]) -> str:
    """What the marks showed, in Markdown, and how fast the run was."""
    judged = "agreement" in facts["marks"][0]
    others = "samples of other captions" in facts["marks"][0]["nearest"]
    head = ["after", "images", "epochs", *(["agreement (chance)"] if judged else []), "to the nearest picture"]
    head += ["with captions of other pictures"] if others else []
    lines = [head, ["---"] * len(head)]
    for m in facts["marks"]:
        near, apart = (f"{m['nearest'][of]['median']:.2f}" for of in ("samples", "pictures"))
        epochs = m["images"] / facts["pictures"]
        line = [
            f"{m['minutes']:.0f} minutes",
            f"{m['images']:,}",
            f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}",
        ]
        if judged:
            share, chance = m["agreement"]["all"], m["chance"]
            error = (share * (1 - share) / m["n"]) ** 0.5
            line.append(f"{share:.1%} ± {error:.1%} ({chance:.0%})")
        line.append(f"{near} ({apart})")
        lines.append([*line, f"{m['nearest']['samples of other captions']['median']:.2f}"] if others else line)
    rate, waited = facts["images_per_second"], facts["share_of_time_waited_for_data"]
    said = (
        f"{facts['pictures']:,} pictures, {facts['parameters'] / 1e6:.1f} million weights; {rate['mean']:.1f} images a "
        f"second (median {rate['median']:.1f}), {waited:.2%} of the time spent waiting for data, "
        f"{facts['memory_gb']:.1f} GB."
    )
    if judged:
        last = facts["marks"][-1]
        said += f" Of unseen real pictures the classifier names {last['real']:.1%} rightly; n = {last['n']}."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{said}\n"


if __name__ == "__main__":
    main()
