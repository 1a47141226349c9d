"""What the pages say of measurements is what the committed results say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDER, AMD, INTEL = (
    "amd-epyc-family-25-2-cores",
    "amd-epyc-family-26-2-cores",
    "intel-r-xeon-r-processor-family-6-2-cores",
)


@pytest.mark.parametrize(
    "page, name, device, tables",
    [
        ("README.md", "unet", AMD, 1),
        ("README.md", "summary", AMD, 1),
        ("docs/pretrained.md", "pretrained", INTEL, None),
        ("docs/recipes.md", "images_cifar10", OLDER, None),
        ("docs/recipes.md", "images_coco", OLDER, None),
        ("docs/recipes.md", "images_folder", INTEL, None),
    ],
)
def test_a_page_shows_the_committed_results(page, name, device, tables):
    text = (ROOT / page).read_text()
    shown = re.search(f"<!-- benchmarks/results/{name} -->\\n(.*?)\\n<!-- end -->", text, re.DOTALL).group(1)
    results = (ROOT / f"benchmarks/results/{name}-{device}.md").read_text().split("\n\n")
    assert shown.strip() == "\n\n".join(results[:tables]).strip()


@pytest.mark.parametrize(
    "page", ["README.md", "docs/performance.md", "docs/recipe.md", "docs/recipes.md", "docs/pretrained.md"]
)
def test_every_file_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for script in re.findall(r"benchmarks/(bench_[a-z0-9_]+\.py)", text):
        assert (ROOT / "benchmarks" / script).exists(), script
