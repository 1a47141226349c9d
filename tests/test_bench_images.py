"""The benchmark that makes the committed runs on real pictures, on sets of a few pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data import CAPTIONS, SIDE, write_captions, write_classes, write_coco
from test_train import TINY

from minidiff.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
UNSEEN = {f"{i}.png": [f"a cat on {i} mats"] for i in range(4)}
HEAD = "after | images | epochs"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(PRESET, FOLDER) runs it with its results in tmp_path/results; gives its record, and its files by suffix."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_images
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")

    def run(preset, data):
        settings = {**TINY, "train.steps": 40, "train.minutes": 0, "train.batch": 4, "sample.steps": 2}
        settings |= {"data.size": SIDE, "data.cache": tmp_path / "cache"}
        command = ["bench_images.py", preset, "--data", data, "--minutes", "2", "--marks", "1,2", "--n", "4"]
        command += ["--out", tmp_path / "run", *(f"{k}={v}" for k, v in settings.items())]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        bench_images.main()
        found = {p.name.split(".", 1)[1]: p for p in (tmp_path / "results").iterdir()}
        assert {p.name.split("-")[0] for p in found.values()} == {f"images_{preset}"}
        return json.loads(found["json"].read_text()), found

    return run


def test_classes_are_judged(bench, tmp_path):
    write_classes(tmp_path / "data", 20)
    record, found = bench("folder", tmp_path / "data")
    assert set(found) == {"json", "md", "loss.png", "progress.png", "1-minutes.png", "2-minutes.png"}
    assert [(m["step"], m["images"]) for m in record["marks"]] == [(20, 80), (40, 160)]
    assert all(set(m["agreement"]) == {"all", "cat", "red fox"} and m["chance"] == 0.5 for m in record["marks"])
    assert set(record["marks"][0]["nearest"]) == {"samples", "pictures"}
    assert record["pictures"] == 40 and str(tmp_path) not in json.dumps(record)
    assert found["md"].read_text().startswith(f"| {HEAD} | agreement (chance) | to the nearest picture |\n")
    assert (tmp_path / "run" / "nearest.png").is_file()


def test_captions_of_other_pictures_stand_beside_those_of_training(bench, tmp_path):
    (tmp_path / "data").mkdir()
    write_coco(tmp_path / "data")
    write_coco(tmp_path / "data", UNSEEN, split="val")
    (tmp_path / "data" / "SOURCES.md").write_text("where from")
    record, found = bench("coco", tmp_path / "data")
    assert found["sources.md"].read_text() == "where from"
    for mark in record["marks"]:
        assert set(mark["nearest"]) == {"samples", "samples of other captions", "pictures"}
    head = f"| {HEAD} | to the nearest picture | with captions of other pictures |\n"
    assert found["md"].read_text().startswith(head)


def test_the_captions_of_a_grid(bench, tmp_path):
    from bench_images import asked

    from minidiff.data import DataConfig, open_data

    def of(name):
        return asked(
            open_data(DataConfig(name=name, path=str(tmp_path / name), size=SIDE, cache=str(tmp_path / "c")), 0)
        )

    (tmp_path / "coco").mkdir()
    write_coco(tmp_path / "coco")
    write_coco(tmp_path / "coco", UNSEEN, split="val")
    first = [texts[0] for texts in CAPTIONS.values()]
    captions, columns, known = of("coco")
    assert captions == first + [texts[0] for texts in UNSEEN.values()] and columns == 8
    assert np.array_equal(known, [True] * 4 + [False] * 4)
    write_captions(tmp_path / "folder")
    captions, columns, known = of("folder")
    assert captions == first * 10 and columns == 8 and known.all()


def test_a_finished_run_is_not_made_again(bench, tmp_path):
    write_captions(tmp_path / "data")
    first, _ = bench("folder", tmp_path / "data")
    again, _ = bench("folder", tmp_path / "data")
    assert again["marks"] == first["marks"] and len(again["marks"]) == 2


def test_a_missing_folder_is_a_sentence(bench, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        bench("folder", tmp_path / "nowhere")
