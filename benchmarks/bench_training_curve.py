"""Scores on held-out captions against minutes of training: one run, stopped at given minutes to be scored.

    python benchmarks/bench_training_curve.py --minutes 60 [SECTION.SETTING=VALUE ...]

MINIDIFF_KERNELS=reference trains on NumPy; there two passes a step, train.batch=16 train.accumulate=2, use two cores.

Only training steps count as minutes; scoring does not. The learning rate falls to zero over the whole run, so a point
in its middle scores less than a run that was planned to end there. Writes results/training_curve-DEVICE.json and .png.
"""

from __future__ import annotations

import argparse
import time

from common import device, results_path, write_json

from minidiff import plotting
from minidiff.backend import active_kernels
from minidiff.config import config_to_dict, load_config
from minidiff.data import open_data
from minidiff.evaluate import evaluate, summary
from minidiff.models import parameter_count
from minidiff.train import averaged_weights, new_state, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--preset", default="shapes")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--marks", default="1,2,3,5,7,10,15,20,30,40,50,60", help="minutes at which to score")
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_intermixed_args()

    config = load_config(args.preset, {**dict(s.split("=") for s in args.settings), "train.minutes": args.minutes})
    state = new_state(config)
    marks = [float(m) for m in args.marks.split(",") if float(m) <= args.minutes]
    records = []
    started = time.time()
    for log in train(state, open_data(config.data, config.train.seed)):
        done = log.step == state.config.train.steps
        if done or (marks and log.minutes >= marks[0]):
            marks = [m for m in marks if m > log.minutes]
            with averaged_weights(state) as model:
                result = evaluate(model, config.sample, args.n)
            records.append({"minutes": log.minutes, "images": log.images, "step": log.step, **result.scores})
            print(f"{log.minutes:.1f} minutes, {log.images} images, {time.time() - started:.0f} s\n{summary(result)}")
            record = {
                "command": f"bench_training_curve.py --minutes {args.minutes:g} {' '.join(args.settings)}",
                "n": args.n,
                "parameters": parameter_count(state.model),
                "config": config_to_dict(state.config),
                "scores": records,
                "chance": result.chance,
            }
            write_json("training_curve", record)
            title = (
                f"Held-out two-object captions (n={args.n}), {device()['cores']} CPU cores, {active_kernels()} kernels"
            )
            figure = plotting.score_curve(records, result.chance, title=title)
            plotting.save(figure, results_path("training_curve", "png"))


if __name__ == "__main__":
    main()
