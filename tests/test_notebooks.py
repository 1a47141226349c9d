"""The notebooks are whole: every part is there, nothing stands twice, and what is committed belongs to its source."""

import ast
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import helpers
import pytest

import minidiff

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def markdown(source):
    """The text cells of a percent source."""
    cells = re.split(r"^# %%", source.read_text(), flags=re.M)
    return "\n".join(cell for cell in cells if cell.startswith(" [markdown]"))


def library_names():
    """Every public function and class of minidiff."""
    names = set()
    for module in pkgutil.walk_packages(minidiff.__path__, "minidiff."):
        if "._" in module.name:  # __main__, and the compiled modules
            continue
        try:
            found = importlib.import_module(module.name)
        except ImportError:
            assert module.name in ("minidiff.cpu", "minidiff.cuda")  # built without a compiler, or no CuPy
            continue
        names |= {
            name
            for name, thing in vars(found).items()
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.startswith("minidiff")
        }
    return {name for name in names if not name.startswith("_")}


def test_the_index_lists_them_all_in_order():
    index = re.findall(r"\[(\d+)\. [^]]+\]\((\w+)\.ipynb\)", (FOLDER / "README.md").read_text())
    assert [name for _, name in index] == [source.stem for source in SOURCES]
    assert [f"{int(number):02}" for number, _ in index] == [source.name[:2] for source in SOURCES]
    assert len({number for number, _ in index}) == len(index)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_notebook_defines_what_the_library_has(source):
    defined = {
        node.name
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    assert not defined & library_names()


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_every_notebook_has_its_parts(source):
    text, code = markdown(source), source.read_text()
    number = int(source.name[:2])
    assert f"# # {number}. " in text and "**What you will learn**" in text and "## Exercises" in text
    assert re.search(rf"^begin\({number}[,)]", code, re.M)
    assert code.count("figure(") >= 3 and "source(" in code
    exercises = re.findall(rf"\*\*({number}\.\d)\*\*", text)
    assert len(exercises) >= 2 and exercises == [f"{number}.{i + 1}" for i in range(len(exercises))]
    for folder in ("exercises", "solutions"):
        assert (FOLDER / folder / f"n{source.name}").is_file()
    assert (FOLDER.parent / "tests" / f"test_exercises_{source.name[:2]}.py").is_file()


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_links_lead_somewhere(source):
    for target in re.findall(r"\]\(([^)#]+)", markdown(source)):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_the_index_names_every_notebook(source):
    index = (FOLDER / "README.md").read_text()
    assert f"({source.stem}.ipynb)" in index


def test_the_index_names_functions_that_exist():
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if "`minidiff/" in line]
    assert len(rows) >= 15
    for row in rows:
        *_, path, names = re.findall(r"`([^`]+)`", row)[-2:]
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for name in names.split(", "):
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_the_built_notebook_belongs_to_its_source(source):
    if helpers.skipping_allowed and importlib.util.find_spec("jupytext") is None:
        pytest.skip("needs jupytext: pip install '.[notebooks]'")
    import build

    assert build.differences(source) is None
    assert source.with_suffix(".ipynb").stat().st_size < 1_000_000


def test_a_planted_difference_is_found(tmp_path):
    if helpers.skipping_allowed and importlib.util.find_spec("jupytext") is None:
        pytest.skip("needs jupytext: pip install '.[notebooks]'")
    import build

    for suffix in (".py", ".ipynb"):
        (tmp_path / f"01_x{suffix}").write_text(SOURCES[0].with_suffix(suffix).read_text())
    assert build.differences(tmp_path / "01_x.py") is None
    source = tmp_path / "01_x.py"
    source.write_text(source.read_text().replace("T=1000", "T=999", 1))
    assert "not those of 01_x.py" in build.differences(source)
    source.with_suffix(".ipynb").unlink()
    assert "missing" in build.differences(source)
