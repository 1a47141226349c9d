"""What the pages say of measurements is what the committed results say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICE = "amd-epyc-family-26-2-cores"


@pytest.mark.parametrize("name", ["unet", "summary"])
def test_the_readme_shows_the_committed_results(name):
    text = (ROOT / "README.md").read_text()
    shown = re.search(f"<!-- benchmarks/results/{name} -->\\n(.*?)\\n<!-- end -->", text, re.DOTALL).group(1)
    table = (ROOT / f"benchmarks/results/{name}-{DEVICE}.md").read_text().split("\n\n")[0].strip()
    assert shown.strip() == table


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/recipe.md", "docs/recipes.md"])
def test_every_file_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for script in re.findall(r"benchmarks/(bench_[a-z0-9_]+\.py)", text):
        assert (ROOT / "benchmarks" / script).exists(), script
