"""setup.py: where nvcc is looked for, and that a clone's modules are built without setuptools."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.mark.parametrize("of", ["purelib", "platlib"])
def test_the_environments_nvcc_is_found_where_pip_hides_its_packages(of, tmp_path, monkeypatch):
    """pip builds with the environment's Python, but without its site-packages on sys.path."""
    spec = importlib.util.spec_from_file_location("minidiff_setup", SETUP)
    setup = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, setup)  # where its dataclass looks
    spec.loader.exec_module(setup)
    paths = {**sysconfig.get_paths(), of: str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", paths.get)
    assert tmp_path / "nvidia" / "cu13" in setup.cuda_homes()


def test_a_clones_modules_are_built_without_setuptools():
    """Of which a machine with a GPU may have none, or one too old for pyproject.toml."""
    blocked = "import runpy, sys; sys.modules['setuptools'] = None; sys.argv = ['setup.py', 'in-place']; "
    blocked += f"runpy.run_path({str(SETUP)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked], env={**os.environ, "MINIDIFF_MODULES": "none"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
