"""Drive CMake and Ninja. Everything else about the package is in pyproject.toml.

Environment: LORAXS_CUDA=auto|on|off (CUDA kernels), LORAXS_CUDA_ARCHS="80;90a;100", MAX_JOBS (parallel compilers),
LORAXS_NATIVE=off (compile nothing: plain torch does the work, which is all that the plugin for vLLM needs).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Loaded with torch.ops.load_library, hence one name for every Python version.
OPS = "loraxs_ext._ops"


class CMakeBuild(build_ext):
    """One CMake build makes all extensions; an editable install copies back those that setuptools knows by name."""

    _built = False

    def get_ext_filename(self, fullname: str) -> str:
        if fullname == OPS:
            return OPS.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if self._built:
            return
        self._built = True
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(
                f"loraxs-ext compiles against the torch you have, and {error.name} is not importable here: install "
                'torch first, then run `pip install "setuptools>=77" wheel cmake ninja pybind11` and '
                "`pip install --no-build-isolation .`"
            ) from None

        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        output.mkdir(parents=True, exist_ok=True)
        # A build folder per Python and torch: switching between environments compiles nothing twice.
        build = ROOT / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LORAXS_TORCH_ROOT": str(Path(torch.__file__).parent),
            "LORAXS_TORCH_VERSION": torch.__version__,
            "LORAXS_OUTPUT": str(output),
            "LORAXS_CUDA": os.environ.get("LORAXS_CUDA", "auto"),
            "LORAXS_CUDA_ARCHS": os.environ.get("LORAXS_CUDA_ARCHS", "80;90a;100"),
        }
        cmake = _tool("cmake")
        _run(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items()))
        _run(cmake, "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))
        _run(cmake, "--install", str(build))


def _tool(name: str) -> str:
    """Path of cmake or ninja: beside this interpreter (they are pip packages) or on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"loraxs-ext needs {name} to compile: run `pip install {name}` first")
    return found


def _run(*command: str) -> None:
    if subprocess.call(command) != 0:
        raise SystemExit(f"loraxs-ext: `{command[0]} {command[1]}` failed, see above")


native = os.environ.get("LORAXS_NATIVE", "on")
if native not in ("on", "off"):
    raise SystemExit(f"LORAXS_NATIVE: expected on or off, got {native!r}")
setup(
    ext_modules=[Extension(name, sources=[]) for name in (OPS, "loraxs_ext._C") if native == "on"],
    cmdclass={"build_ext": CMakeBuild},
)
