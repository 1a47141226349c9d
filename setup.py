"""Builds the compiled modules with ninja; the rest of the packaging is in pyproject.toml.

    minidiff._cpu       csrc/cpu, each kernel file once for every instruction set
    minidiff._cuda      csrc/cuda by nvcc, where there is one and a GPU's driver
    minidiff._emulated  csrc/cuda by the C++ compiler, run on the CPU by csrc/emulator
    minidiff._checked   the same, with every access to memory watched

A module that cannot be built, for want of a compiler or for any other reason, is left out: the package installs all the
same and computes with NumPy; `minidiff doctor` says so. MINIDIFF_MODULES=_cpu,_emulated builds these alone;
MINIDIFF_ARCHITECTURES=90 compiles for that compute capability alone. `python setup.py in-place` puts the modules beside
their Python in a clone and needs no setuptools.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).absolute().parent
CSRC = ROOT / "csrc"
MODULES = ("_cpu", "_cuda", "_emulated", "_checked")

CPU_KERNELS = (
    "conv2d", "convolution", "linear", "groupnorm", "layernorm", "attention", "pointwise", "muon", "philox", "table",
)  # fmt: skip
CPU_COMMON = ("pool", "allocator", "module")
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"portable": ""}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": "-march=x86-64-v3",
        "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    }

ANY = "-std=c++17 -fPIC -fvisibility=hidden"
WARN = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes"
FAST = f"{ANY} -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast {WARN}"
EMULATED = f"{ANY} -O2 -g1 {WARN} -Wno-unknown-pragmas"
CHECKED = (
    f"{ANY} -O1 -g {WARN} -Wno-unknown-pragmas -fsanitize=thread -fsanitize=bounds -fsanitize-undefined-trap-on-error "
    "-fno-tree-sra -fno-tree-vectorize -fno-tree-slp-vectorize -fno-store-merging --param tsan-distinguish-volatile=1"
)
ARCHITECTURES = os.environ.get("MINIDIFF_ARCHITECTURES", "75,80,90").split(",")  # and PTX of the last, for later ones
NVCC = "-std=c++17 -O3 -lineinfo -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden " + " ".join(
    [f"-gencode arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    + [f"-gencode arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]
)


@dataclass
class Module:
    """What one compiled module is made of."""

    name: str
    link: str  # the command, without its inputs
    objects: list[tuple[Path, str, str]] = field(default_factory=list)  # source, distinguishing word, command

    def add(self, sources: list[Path], word: str, command: str) -> None:
        """Compile each source by the command."""
        self.objects += [(source, word, command) for source in sources]


def build(targets: dict[str, Path], folder: Path) -> None:
    """Write build.ninja for the modules that have a compiler here, and run it; a failure does not stop the others."""
    modules = []
    wanted = os.environ.get("MINIDIFF_MODULES", ",".join(MODULES)).split(",")
    for make in (cpu, cuda, emulated, checked):
        if f"_{make.__name__}" not in wanted:
            continue
        try:
            modules.append(make())
        except (ImportError, OSError, RuntimeError) as e:
            print(f"minidiff: without _{make.__name__}: {e}", file=sys.stderr)
    if not modules:
        return
    import ninja

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(modules, targets, folder))
    for module in modules:
        targets[module.name].parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-k", "0", "-C", folder])
    failed = [m.name for m in modules if done.returncode and not up_to_date(targets[m.name], folder)]
    if failed:
        print(f"minidiff: {', '.join(failed)} could not be built; other kernels do the work", file=sys.stderr)


def up_to_date(target: Path, folder: Path) -> bool:
    """Whether the target was made by what stands now; if not, an old one is removed."""
    import ninja

    dry = subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-n", "-C", folder, target], capture_output=True, text=True
    ).stdout
    fresh = target.exists() and "no work to do" in dry
    if not fresh:
        target.unlink(missing_ok=True)
    return fresh


def ninja_file(modules: list[Module], targets: dict[str, Path], folder: Path) -> str:
    """The text of build.ninja."""
    lines = ["rule run", "  command = $line", "  depfile = $out.d", "  deps = gcc", "rule link", "  command = $line"]
    for module in modules:
        objects = []
        for source, word, command in module.objects:
            out = folder / f"{source.parent.name}-{source.stem}-{word}.o"
            objects.append(out)
            line = f"{command} -MMD -MF {out}.d -c {source} -o {out}"
            if word == "nvcc":  # which tells of every kernel's registers: benchmarks/registers.py reads it
                line = f"{line} > {out}.log 2>&1 || (cat {out}.log; false)"
            lines += [f"build {out}: run {source}", f"  line = {line}"]
        target, inputs = targets[module.name], " ".join(map(str, objects))
        lines += [f"build {target}: link {inputs}", f"  line = {module.link} -o {target} {inputs}", f"default {target}"]
    return "\n".join([*lines, ""])


def compiler() -> str:
    """The C++ compiler: $CXX, or the first that is there."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("there is no C++ compiler (g++ or clang++)")


def cuda_homes() -> list[Path]:
    """Where NVIDIA's compiler may be: $CUDA_HOME, the toolkit's usual place, the wheel nvidia-cuda-nvcc."""
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    packages = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]  # which pip hides from a build
    return homes + [Path(p) / "nvidia" / "cu13" for p in packages]


def nvcc() -> str:
    """NVIDIA's compiler, of one of its homes or of the path."""
    found = [str(home / "bin" / "nvcc") for home in cuda_homes() if (home / "bin" / "nvcc").is_file()]
    found += [path for path in [shutil.which("nvcc")] if path]
    if not found:
        raise RuntimeError("there is no nvcc (for a GPU: the CUDA toolkit, or pip install nvidia-cuda-nvcc)")
    return found[0]


def python_headers() -> str:
    """Flags for what includes Python's, pybind11's and NumPy's headers."""
    import numpy
    import pybind11

    return f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')} -I{numpy.get_include()}"


def sources(folder: str, *names: str) -> list[Path]:
    """Files of a folder of csrc, without their suffix."""
    return [CSRC / folder / f"{name}.cpp" for name in names]


def linked(command: str, extra: str = "") -> str:
    """The command that makes a shared library."""
    return f"{command} -shared {extra} -pthread" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")


def cpu() -> Module:
    """csrc/cpu."""
    extra = os.environ.get("MINIDIFF_CXXFLAGS", "")  # e.g. -fsanitize=address,undefined
    run = f"{compiler()} {FAST} {extra}"
    module = Module("_cpu", linked(compiler(), extra))
    module.add(sources("", "ops") + sources("cpu", *CPU_COMMON), "cpu", f"{run} {python_headers()}")
    for isa, more in INSTRUCTION_SETS.items():
        module.add(sources("cpu", *CPU_KERNELS), isa, f"{run} -DMINIDIFF_ISA={isa} {more}")
    return module


def cuda() -> Module:
    """csrc/cuda for a GPU."""
    if "MINIDIFF_MODULES" not in os.environ and not (Path("/dev/nvidiactl").exists() or find_library("cuda")):
        raise RuntimeError("there is no NVIDIA driver here (MINIDIFF_MODULES=_cuda builds it all the same)")
    host = f"{compiler()} {FAST} -DMINIDIFF_DEVICE=cuda -DMINIDIFF_MODULE=_cuda {python_headers()}"
    module = Module("_cuda", f"{nvcc()} -shared -cudart static")
    module.add(sources("", "ops") + sources("cuda", "module", "ladder", "table", "gpu"), "cuda", host)
    module.add(sorted((CSRC / "cuda").glob("*.cu")), "nvcc", f"{nvcc()} -DMINIDIFF_DEVICE=cuda {NVCC}")
    return module


def emulated(name: str = "_emulated", kernels: str = EMULATED) -> Module:
    """csrc/cuda for the emulator."""
    if sys.platform != "linux" or not X86:
        raise RuntimeError("the CUDA emulator runs on Linux on x86-64 only")
    run = f"{compiler()} {EMULATED}"
    module = Module(name, linked(compiler(), "-ldl -lrt"))
    host = f"{run} -DMINIDIFF_MODULE={name} {python_headers()}"
    module.add(
        sources("", "ops") + sources("cuda", "module", "ladder", "table") + sources("emulator", "module"), name, host
    )
    module.add([p for p in sorted((CSRC / "emulator").glob("*.cpp")) if p.stem != "module"], name, run)
    module.add(sorted((CSRC / "cuda").glob("*.cu")), name, f"{compiler()} {kernels} -x c++")
    return module


def checked() -> Module:
    """csrc/cuda for the emulator, every access to memory watched."""
    return emulated("_checked", CHECKED)


def in_place() -> None:
    """The modules beside minidiff's Python files, built where setuptools builds too."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    build({name: ROOT / "minidiff" / f"{name}{suffix}" for name in MODULES}, folder)


def package() -> None:
    """What setuptools is asked to do, with ninja for the modules and a warning where one fails."""
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class Build(build_ext):
        def run(self) -> None:
            folder = Path(self.build_temp).absolute()
            build({name: Path(self.get_ext_fullpath(f"minidiff.{name}")).absolute() for name in MODULES}, folder)
            if self.inplace:
                self.copy_extensions_to_source()

        def copy_extensions_to_source(self) -> None:
            """They were built there."""

        def get_outputs(self) -> list[str]:
            return [name for name in super().get_outputs() if Path(name).exists()]

    extensions = [Extension(f"minidiff.{name}", [], optional=True) for name in MODULES]
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    if sys.argv[1:] == ["in-place"]:
        in_place()
    else:
        package()
