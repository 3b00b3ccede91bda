"""What nvcc made of the CUDA kernels, read from the built library: registers, spills, and the instructions meant."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import loraxs_ext

_C = pytest.importorskip("loraxs_ext._C", reason="the native parts are not built")

LIBRARY = Path(loraxs_ext.__file__).parent / "_ops.so"
ARCHS = ("sm_80", "sm_90a", "sm_100")

# Mangled names: linear_decode_kernel<T, token tiles, rank tiles, copies, cluster>.
DECODE = re.compile(r"linear_decode_kernelI\w+?Li(\d+)ELi(\d+)E\w*?(Thread|Bulk)CopiesELb([01])")
PROJECT = re.compile(r"linear_project_kernel")
REGISTERS = 65536  # of an SM


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip("cuobjdump is not installed")
    return found


@pytest.fixture(scope="module", params=ARCHS)
def arch(request) -> str:
    if not _C.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels: there was no nvcc")
    if request.param.removeprefix("sm_") not in _C.build_info()["cuda_archs"]:
        pytest.skip(f"this build was not made for {request.param}")
    return request.param


def _dump(arch: str, what: str) -> str:
    return subprocess.run(
        [_cuobjdump(), what, "-arch", arch, str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def resources(arch) -> dict[str, dict[str, int]]:
    lines = re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", _dump(arch, "--dump-resource-usage"))
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", usage)} for name, usage in lines}


@pytest.fixture(scope="module")
def instructions(arch) -> dict[str, Counter]:
    functions = _dump(arch, "-sass").split("Function : ")[1:]
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", re.MULTILINE)
    return {text.split("\n", 1)[0].strip(): Counter(opcode.findall(text)) for text in functions}


def _runs_on(arch: str, name: str) -> bool:
    """Kernels of clusters are empty in code for sm_80."""
    decode = DECODE.search(name)
    return arch != "sm_80" or (decode is not None and decode[4] == "0")


def test_no_kernel_spills(resources):
    assert sum(bool(DECODE.search(name)) for name in resources) == 26
    for name, usage in resources.items():
        assert usage["LOCAL"] == 0 and usage["STACK"] == 0, f"{name}: {usage}"


def test_registers_leave_room_for_the_blocks_meant(resources):
    for name, usage in resources.items():
        decode = DECODE.search(name)
        if decode:
            blocks = 1 if decode[3] == "Bulk" else 2
            assert usage["REG"] * 128 * blocks <= REGISTERS, f"{name}: {usage}"
        elif PROJECT.search(name):
            assert usage["REG"] * 256 * 2 <= REGISTERS, f"{name}: {usage}"


def test_expected_instructions(arch, instructions):
    seen = Counter()
    for name, count in instructions.items():
        decode = DECODE.search(name)
        if not _runs_on(arch, name) or not (decode or PROJECT.search(name)):
            continue
        assert count["HMMA"] > 0, name
        assert not count["LDL"] and not count["STL"], name
        if decode:
            copy, other = ("UBLKCP", "LDGSTS") if decode[3] == "Bulk" else ("LDGSTS", "UBLKCP")
            assert count[copy] > 0 and count[other] == 0 and count["LDSM"] > 0, name
            seen[copy] += 1
            if decode[2] == "0":
                assert count["ACQBULK"] == 1, f"{name}: griddepcontrol.wait is missing"
    assert seen["LDGSTS"] > 0 and (arch == "sm_80") == (seen["UBLKCP"] == 0)
