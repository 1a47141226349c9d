"""Builds the compiled kernels with ninja; the rest of the packaging is in pyproject.toml.

Each kernel file is compiled once for every instruction set. Without a C++ compiler, or where one fails, the package
installs all the same and computes with NumPy; `minidiff doctor` says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
KERNELS = (
    "conv2d",
    "convolution",
    "linear",
    "groupnorm",
    "layernorm",
    "attention",
    "pointwise",
    "muon",
    "philox",
    "table",
)  # one build a set
COMMON = ("../ops", "pool", "allocator", "module")
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes"
)
INSTRUCTION_SETS = {"portable": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": "-march=x86-64-v3",
        "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    }


class Build(build_ext):
    """build_ext, with ninja for the work and a warning for a failure."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one module, or say why not."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            build(target, Path(self.build_temp).absolute())
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as e:
            print(f"minidiff: no compiled kernels, NumPy will do the work: {e}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """The files that were made."""
        return [name for name in super().get_outputs() if Path(name).exists()]


def compiler() -> str:
    """The C++ compiler: $CXX, or the first that is there."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("there is no C++ compiler (g++ or clang++)")


def build(target: Path, folder: Path) -> None:
    """Write build.ninja for minidiff._cpu and run it."""
    import ninja
    import numpy
    import pybind11

    extra = os.environ.get("MINIDIFF_CXXFLAGS", "")  # e.g. -fsanitize=address,undefined
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')} -I{numpy.get_include()}"
    root = Path(__file__).absolute().parent
    lines = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} {extra}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {extra} -o $out $in -pthread"
        + (" -undefined dynamic_lookup" if sys.platform == "darwin" else ""),
    ]
    sources = [(name, "common", includes) for name in COMMON]
    sources += [
        (name, isa, f"-DMINIDIFF_ISA={isa} {more}") for isa, more in INSTRUCTION_SETS.items() for name in KERNELS
    ]
    objects = []
    for name, kind, more in sources:
        objects.append(folder / f"{Path(name).name}-{kind}.o")
        lines += [f"build {objects[-1]}: compile {root / CPU / name}.cpp", f"  more = {more}"]
    lines += [f"build {target}: link {' '.join(map(str, objects))}", f"default {target}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


setup(ext_modules=[Extension("minidiff._cpu", [], optional=True)], cmdclass={"build_ext": Build})
