"""Figures: bytes, errors, metadata, crisp pixels, and labels that keep off each other and inside the page."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from minidiff import plotting

rng = np.random.default_rng(0)
LONG = "a small yellow circle to the left of a supercalifragilisticexpialidocious $x$ square " * 2


def images(*shape):
    return rng.uniform(-1, 1, (*shape, 32, 32, 3)).astype(np.float32)


def scores(n):
    return [
        {
            "minutes": 2.0 * i,
            "step": 10 * i,
            "colours": 1 - 0.5**i,
            "shapes": 1 - 0.52**i,
            "sizes": 1 - 0.49**i,
            "relation": None if i == 1 else 0.9,
            "all_right": 0.0,
        }
        for i in range(n)
    ]


def log(n, loss=0.1):
    return [{"step": i, "images": 64 * i, "minutes": i / 9, "loss": loss + 3 / (i + 1)} for i in range(n)]


FIGURES = {
    "one image": lambda: plotting.image_grid(images(1), [LONG], verdicts=[False], title=LONG),
    "64 images": lambda: plotting.image_grid(images(64), ["a red circle", LONG] * 32, verdicts=[True] * 64),
    "five images": lambda: plotting.image_grid(images(5), columns=3, title="no captions"),
    "filmstrip": lambda: plotting.filmstrip(images(6) * 3, images(6), [999, 800, 600, 400, 200, 0], LONG),
    "sweep": lambda: plotting.guidance_sweep(images(2, 3), [LONG, "short"], [1, 2.5, 7], np.eye(2, 3) > 0),
    "wide sweep": lambda: plotting.guidance_sweep(images(2, 12), [LONG * 3] * 2, range(12)),
    "progress": lambda: plotting.progress(images(3, 8), [LONG, "short"] * 4, ["8 minutes", "1 hour", LONG], LONG),
    "loss": lambda: plotting.loss_curve({"one": log(300), "two": log(200, 0.101)}, x="images", title="Loss"),
    "one loss": lambda: plotting.loss_curve({"one": log(1)}),
    "scores": lambda: plotting.score_curve(scores(9), {"colours": 0.25, "shapes": 0.25, "all_right": 0.01}),
    "schedule": lambda: plotting.schedule_plot(
        {"cosine": np.cos(np.linspace(0, np.pi / 2, 101)) ** 2, "linear": np.linspace(1, 0, 101)}
    ),
    "bars": lambda: plotting.bars(
        [f"32x 32x32, {64 * i} -> 64" for i in range(5)],
        {"ours": [500.0, 410.5, 3.2, 611, 90], "theirs": [200, 0.0, 1.5, 300, 95], "slow": [10] * 5},
        "GFLOP/s",
        ("ceiling", 560.0),
        "convolution",
    ),
    "shares": lambda: plotting.stacked_shares(
        {"one\nstep": {"conv": 400.0, "linear": 210, "rest": 2}, "two": {"linear": 600.0, "norm": 90}}, "ms", "Where"
    ),
    "coalesced": lambda: plotting.memory_accesses([(0, t, 4 * t) for t in range(64)], 4, False, title="coalesced"),
    "conflicts": lambda: plotting.memory_accesses([(0, t, 128 * t) for t in range(32)], 4, True, title="a column"),
    "lines": lambda: plotting.line_plot({f"line {i}": ([0, 1], [0, 1e-3 * i]) for i in range(9)}, "x", "y"),
}


def overlaps(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_overlap_and_stay_on_the_page(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    texts = [t for axes in figure.axes for t in axes.texts]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label] if axes.axison else []
    # Text's own method, because an annotation's box includes its leader line.
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts if t.get_text()]
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        assert not overlaps(a, b), (one, two)
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


@pytest.mark.parametrize("name", FIGURES)
def test_saved_png_holds_description_metadata_and_no_debris(name, tmp_path):
    figure = FIGURES[name]()
    path = plotting.save(figure, tmp_path / "new" / "figure.png", {"prompt": "großer Kreis ✓", "seed": "3"})
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    with Image.open(path) as image:
        assert image.text["Description"] == figure.alt_text and len(figure.alt_text) > 10
        assert image.text["prompt"] == "großer Kreis ✓" and image.text["seed"] == "3"
        assert image.info["dpi"][0] >= 150 - 0.1
        assert image.size == tuple(figure.bbox.size)


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    with pytest.raises((TypeError, AttributeError)):
        plotting.save(FIGURES["lines"](), path, {"seed": 3})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="png"):
        plotting.save(FIGURES["lines"](), tmp_path / "figure.jpg")


@pytest.mark.parametrize("n, columns", [(1, None), (7, 3), (64, None)])
def test_each_pixel_is_a_crisp_square(n, columns, tmp_path):
    batch = images(n)
    path = plotting.save(plotting.image_grid(batch, ["a caption"] * n, columns), tmp_path / "a.png")
    page = np.asarray(Image.open(path).convert("RGB"))
    scale = 320 // 32 if n < 64 else 160 // 32
    first = plotting.to_uint8(batch[0]).repeat(scale, axis=0).repeat(scale, axis=1)
    np.testing.assert_array_equal(page[24 : 24 + 32 * scale, 24 : 24 + 32 * scale], first)


def test_to_uint8_values_shapes_and_dtype():
    values = np.array([-5, -1, -0.999, 0, 0.5, 1, 5]).reshape(1, 7, 1)
    pixels = plotting.to_uint8(values)
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 7, 3)
    assert pixels[0, :, 2].tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert plotting.to_uint8(images(2, 5)).shape == (2, 5, 32, 32, 3)
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(plotting.to_uint8(every_byte / np.float32(127.5) - 1), every_byte)


def with_one_bad_value(value):
    batch = images(2)
    batch[1, 3, 4, 0] = value
    return batch


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plotting.to_uint8(np.zeros((3, 32, 32))), r"\(3, 32, 32\)"),
        (lambda: plotting.to_uint8(np.zeros((8, 3))), r"\(8, 3\)"),
        (lambda: plotting.to_uint8(np.zeros((8, 8, 3), np.uint8)), "uint8"),
        (lambda: plotting.to_uint8(with_one_bad_value(np.inf)), "not finite"),
        (lambda: plotting.image_grid(with_one_bad_value(np.nan)), "not finite"),
        (lambda: plotting.image_grid(images(0)), "B >= 1"),
        (lambda: plotting.image_grid(images()), "B >= 1"),
        (lambda: plotting.image_grid(images(2), ["one"]), "captions"),
        (lambda: plotting.image_grid(images(2), verdicts=[True] * 3), "verdicts"),
        (lambda: plotting.image_grid(images(2), columns=0), "columns"),
        (lambda: plotting.filmstrip(with_one_bad_value(np.nan), images(2), [1, 0], ""), "not finite"),
        (lambda: plotting.filmstrip(images(2), images(1), [1, 0], ""), "filmstrip needs"),
        (lambda: plotting.guidance_sweep(images(2, 3), ["a"], [1, 2, 3]), r"\(1, 3\)"),
        (lambda: plotting.guidance_sweep(images(1, 2), ["a"], [1, 2], [True, False]), "verdicts"),
        (lambda: plotting.progress(images(2, 3), ["a"] * 3, ["1 minute"]), r"\(1, 3\)"),
        (lambda: plotting.progress(images(0, 3), ["a"] * 3, []), r"\(0, 3\)"),
        (lambda: plotting.loss_curve({"a": log(3)}, x="epochs"), "epochs"),
        (lambda: plotting.loss_curve({"a": [{"step": 1, "loss": 1.0}]}, x="minutes"), "minutes"),
        (lambda: plotting.loss_curve({"a": []}), "no finite loss"),
        (lambda: plotting.score_curve([{"minutes": 1, "loss": 1}]), "no record"),
        (lambda: plotting.score_curve([{"minutes": 1, "colours": 93}]), "0..1"),
        (lambda: plotting.score_curve([{"minutes": 1, "colours": np.nan}]), "0..1"),
        (lambda: plotting.schedule_plot({"a": [1.0, 1.5]}), "'a'"),
        (lambda: plotting.line_plot({"a": ([1], [np.nan])}, "x", "y"), "finite"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_filmstrip_scales_noise_but_not_the_final_image(monkeypatch):
    final, noise = images(), 4 * images()
    monkeypatch.setattr(plotting, "_tiles", lambda rows, below, *_, **__: (rows, below))
    (x_ts, x0s), (notes, _) = plotting.filmstrip([noise, final], [2 * final, final], [9, 0], "a circle")
    np.testing.assert_array_equal(x_ts[1], plotting.to_uint8(final))
    np.testing.assert_array_equal(x0s[0], plotting.to_uint8(2 * final))
    spread = np.percentile(np.abs(noise), 99)
    np.testing.assert_array_equal(x_ts[0], plotting.to_uint8(noise / spread))
    assert notes == [f"÷ {spread:.1f}", ""]


def test_verdicts_read_without_colour():
    figure = plotting.image_grid(images(2), ["a", "b"], verdicts=np.array([True, False]))
    assert [t.get_text() for t in figure.axes[0].texts] == ["✓ a", "✗ b"]


def test_losses_that_are_not_finite_are_counted():
    records = log(50) + [{"step": 50, "loss": np.nan}, {"step": 51, "loss": np.inf}]
    figure = plotting.loss_curve({"run": records})
    assert [t.get_text() for t in figure.axes[0].texts] == ["run (2 not finite)"]
    assert figure.axes[0].get_yscale() == "log"


def test_running_median_ignores_a_spike_and_thins_long_runs():
    ys = np.full(100_000, 2.0)
    ys[5000] = 1e9
    xs, smooth = plotting._running_median(np.arange(100_000), ys)
    assert len(xs) == len(smooth) <= 4000 and np.all(smooth == 2.0)


def test_spread_keeps_order_gap_and_bounds():
    for _ in range(100):
        heights = np.sort(rng.uniform(0, 1, 6))
        places = plotting._spread(heights, 0.1)
        assert np.diff(places).min() >= 0.1 - 1e-12 and places.min() >= 0 and places.max() <= 1 + 1e-12
    np.testing.assert_allclose(plotting._spread(np.array([0.2, 0.5, 0.9]), 0.1), [0.2, 0.5, 0.9])


def test_notebooks_get_a_png_with_alt_text():
    data, metadata = FIGURES["lines"]()._repr_png_()
    assert data.startswith(b"\x89PNG") and metadata["alt"].startswith("y against x")


def test_no_display_and_no_pyplot(tmp_path):
    code = (
        "import sys, numpy; from minidiff import plotting as p; "
        "p.save(p.image_grid(numpy.zeros((2, 8, 8, 3)), ['a', 'b']), sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    display = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in display}
    root = Path(plotting.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], check=True, env=environment, cwd=root)
    assert (tmp_path / "a.png").exists()


def test_a_caption_of_any_length_takes_no_time():
    long = "x" * 100_000
    figure = plotting.image_grid(images(2), [long, "short"])
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert sum(map(len, texts)) < 300 and "…" in "".join(texts) and "short" in texts
