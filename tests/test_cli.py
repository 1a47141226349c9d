"""The command line: help worth reading, and one clear sentence, status 1 and nothing lost on bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import TINY

from minidiff.cli import main
from minidiff.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    flags = [f"--{k}={v}" for k, v in {**TINY, "train.steps": 4, "train.sample_every": 2}.items()]
    assert main(["train", "shapes", "--out", str(folder), *flags]) == 0
    return folder


def fails(capsys, *arguments):
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minidiff: ") and err.count("\n") == 1, err
    return err


def test_a_run_folder_is_complete(run):
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.toml", "log.jsonl", "checkpoint.safetensors", "samples"}
    assert {p.name for p in (run / "samples").iterdir()} == {"step_000002.png", "step_000004.png"}


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["evaluate"], ["doctor"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as e:
        main([*command, "--help"])
    assert e.value.code == 0
    assert "minidiff" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train"], ["name a preset", "shapes"]),
        (["train", "shape"], ["unknown preset 'shape'", "did you mean"]),
        (["train", "shapes", "--train.stpes=3"], ["no option --train.stpes", "did you mean '--train.steps'"]),
        (["train", "shapes", "--train.steps=x"], ["train.steps wants a whole number"]),
        (["train", "--resume", "nowhere"], ["there is no checkpoint nowhere"]),
        (["train", "shapes", "--resume", "nowhere"], ["name neither a preset nor --out"]),
        (["sample", "a red circle", "--run", "nowhere"], ["there is no checkpoint nowhere"]),
        (["evaluate", "nowhere"], ["there is no checkpoint nowhere"]),
        (["evaluate", "--data.limit=3"], ["no option --data.limit=3 (did you mean '--data'?)"]),
        (["evaluate", "--sample.stpes=3"], ["did you mean '--sample.steps'"]),
        (["sample", "x", "--cuont", "3"], ["no option --cuont (did you mean '--count'?)", "minidiff sample --help"]),
        (["trian"], ["invalid choice: 'trian'"]),
        (["evaluate", "--n=two"], ["--n", "'two'"]),
        (["train", "shapes", "--unet.in_channels=7"], ["no option --unet.in_channels"]),
        (["train", "shapes", "--out=/dev/null/run", "--train.steps=1"], ["/dev/null/run"]),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    err = fails(capsys, *arguments)
    for word in words:
        assert word in err
    assert "mean '--data.limit'" not in err and not list(tmp_path.iterdir())


def test_settings_of_a_benchmark_may_follow_its_options(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import bench_training_curve

    monkeypatch.setattr("sys.argv", ["bench_training_curve.py", "train.steps=3", "--minutes", "1", "train.stpes=3"])
    with pytest.raises(UserError, match=r"no setting train\.stpes"):
        bench_training_curve.main()


def test_an_existing_folder_is_left_alone(capsys, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert "exists and is not empty" in fails(capsys, "train", "shapes", "--out", run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_truncated_checkpoint(capsys, run, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes((run / path.name).read_bytes()[:5000])
    for command in (["train", "--resume"], ["evaluate"], ["sample", "a red circle", "--run"]):
        assert f"{path} is truncated or damaged" in fails(capsys, *command, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_begun_run_cannot_change(capsys, run):
    assert "--unet.channels cannot change" in fails(capsys, "train", "--resume", run, "--unet.channels=8,8")


def test_a_finished_run_says_so(capsys, run):
    assert main(["train", "--resume", str(run)]) == 0
    assert "step 4 of 4 already" in capsys.readouterr().out


def test_sample_writes_a_grid_with_its_settings(capsys, run, tmp_path):
    out = tmp_path / "grid.png"
    command = ["sample", "a red circle", "", "--run", run, "--sample.steps=3", "--count=2", "--out", out, "--seed=5"]
    assert main(list(map(str, command))) == 0
    text = Image.open(out).text
    assert text["prompt"] == "a red circle; a red circle; ; " and text["seed"] == "5" and text["steps"] == "3"
    assert "exists; remove it or choose another --out" in fails(capsys, *command)


def test_sample_writes_separate_pictures(run, tmp_path):
    out = tmp_path / "pictures"
    command = ["sample", "a red circle", "a blue square", "--run", run, "--sample.steps=3", "--sample.guidance=2.5"]
    command += ["--out", out]
    assert main(list(map(str, command))) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png"]
    picture = Image.open(out / "0001.png")
    assert picture.size == (32, 32) and picture.text["prompt"] == "a blue square" and picture.text["guidance"] == "2.5"
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a pink circle"], ["does not know 'pink'", "its words: a, above"]),
        (["a red circle", "--sample.steps=1001"], ["sampling steps must be in 1..1000"]),
        (["a red circle", "--sample.steps=0"], ["sample.steps must be at least 1"]),
        (["a red circle", "--count=0"], ["--count must be at least 1"]),
        (["a red circle", "--out=x.jpg"], ["a .png file or a folder"]),
        (["a red circle", f"--seed={2**64}"], ["--seed in 0..2^64 - 1"]),
        (["a red circle", "--sample.guidance=nan"], ["sample.guidance wants a finite number"]),
        (["a red circle " * 4], ["has 12 words; the model reads at most 10"]),
        (["a red circle", "--out=/dev/null/x.png"], ["/dev/null"]),
    ],
)
def test_sample_refuses(capsys, run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    err = fails(capsys, "sample", *arguments, "--run", run)
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_evaluate_ends_with_the_share_that_is_right(capsys, run):
    assert main(["evaluate", str(run), "--n=8", "--sample.steps=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out captions fully right: 0.0% (n=8)")
    assert {"captions.png", "filmstrip.png", "guidance.png", "loss.png"} <= {p.name for p in run.iterdir()}
    report = json.loads((run / "evaluation.json").read_text())
    assert report["n"] == 8 and report["split"] == "test" and report["sample"]["steps"] == 3


def test_evaluate_passes_over_a_torn_log_line_and_takes_the_file_itself(capsys, run, tmp_path):
    for name in ("checkpoint.safetensors", "log.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    assert main(["evaluate", str(tmp_path / "checkpoint.safetensors"), "--n=2", "--sample.steps=2"]) == 0
    assert (tmp_path / "loss.png").exists() and (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("weights, part", [("ema", "ema"), ("raw", "model")])
def test_the_weights_that_are_asked_for_draw(run, tmp_path, weights, part):
    """The other set is ruined; only the one that is asked for may be read."""
    from minidiff.checkpoint import load_checkpoint, save_checkpoint

    parts, about = load_checkpoint(run / "checkpoint.safetensors")
    for other in {"ema", "model"} - {part}:
        parts[other] = {name: np.full_like(array, np.nan) for name, array in parts[other].items()}
    save_checkpoint(tmp_path / "checkpoint.safetensors", parts, about)
    command = ["sample", "a red circle", "--run", str(tmp_path), "--out", str(tmp_path / "a.png")]
    assert main([*command, "--sample.steps=2", f"--weights={weights}"]) == 0


def test_export_writes_what_sample_draws_with(capsys, run, tmp_path):
    from minidiff.train import load_model

    out = tmp_path / "new" / "small.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert out.stat().st_size < (run / "checkpoint.safetensors").stat().st_size / 6
    wanted, got = (dict(load_model(path)[0].named_parameters()) for path in (run, out))
    for name, p in wanted.items():
        assert got[name].data.dtype == np.float32
        np.testing.assert_allclose(got[name].data, p.data, rtol=1e-3, atol=1e-6)
    command = ["sample", "a red circle", "--run", str(out), "--out", str(tmp_path / "a.png"), "--sample.steps=2"]
    assert main(command) == 0
    assert main(["export", str(run), "--out", str(out), "--sample.guidance", "3.5"]) == 0
    assert load_model(out)[1].sample == replace(load_model(run)[1].sample, guidance=3.5)
    assert "must be a .safetensors file or a folder" in fails(capsys, "export", run, "--out", tmp_path / "x.npz")
    assert "is the file that is exported" in fails(capsys, "export", out, "--out", out)
    before = (run / "checkpoint.safetensors").read_bytes()
    for where in (run, tmp_path):
        err = fails(capsys, "export", run, "--out", where / "checkpoint.safetensors")
        assert "is the name of a run's checkpoint" in err
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert "no checkpoint" in fails(capsys, "export", tmp_path / "nowhere", "--out", out)


def test_without_a_run_the_model_in_the_box_draws(run, tmp_path, monkeypatch):
    from minidiff.train import BUNDLED, default_run

    monkeypatch.chdir(tmp_path)
    assert default_run() == BUNDLED
    assert main(["sample", "a red circle", "--sample.steps=2", "--out=a.png"]) == 0
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    assert default_run() == BUNDLED
    (demo / "checkpoint.safetensors").write_bytes((run / "checkpoint.safetensors").read_bytes())
    assert default_run().resolve() == demo


def test_the_model_in_the_box_draws_what_captions_say():
    from minidiff.data import shapes
    from minidiff.sample import draw
    from minidiff.train import BUNDLED, load_model

    model, config = load_model(BUNDLED)
    assert BUNDLED.stat().st_size <= 8e6
    captions = shapes.held_out_captions(160)
    right = shapes.judge(draw(model, captions, replace(config.sample, steps=50)), captions)
    assert sum(v.all_right for v in right) >= 0.95 * 160


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NumPy" in out and "kernels: reference" in out and "presets: cifar10, coco, folder, shapes" in out
