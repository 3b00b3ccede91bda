"""Triton kernels without a GPU: run by Triton's interpreter, and compiled to machine code for GPUs that are not here.

Whether a kernel is interpreted is decided when Triton is first imported, so the interpreter lives in a child process
and is called like a function. Compilation happens here: a launcher is run on meta tensors with every launch recorded
instead of made, and the recorded launch (its own tile sizes, its own argument types) is compiled for a target.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.multiprocessing

PACKAGE = "loraxs_ext.ops.triton"


class Interpreter:
    """A child process with TRITON_INTERPRET=1 that calls functions of the package's Triton modules."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            self._process.start()

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`interpreted("linear.linear", *args)` calls loraxs_ext.ops.triton.linear.linear there.

        Tensors travel in shared memory: what the function writes in place is seen here too.
        """
        self._connection.send((name, args, kwargs))
        ok, result = self._connection.recv()
        if not ok:
            raise RuntimeError(f"in the interpreter:\n{result}")
        return result

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def _serve(connection: Connection) -> None:
    from . import interpreter_fixes

    torch.set_num_threads(1)
    # Uninitialised memory holds NaN in this mode, so what a kernel forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    interpreter_fixes.apply()
    while (call := connection.recv()) is not None:
        name, args, kwargs = call
        module, function = name.rsplit(".", 1)
        try:
            result = (True, getattr(import_module(f"{PACKAGE}.{module}"), function)(*args, **kwargs))
        except Exception:
            result = (False, traceback.format_exc())
        connection.send(result)


class Launch(NamedTuple):
    """A kernel launch that was recorded: what is needed to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, launching a Triton kernel only appends to the list; run launchers on meta tensors here."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        bound = dict(zip(self.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound |= {p.name: p.default for p in self.params if p.name not in bound}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        launches.append(Launch(self, tuple(grid(bound) if callable(grid) else grid), bound, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def launches_of(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches that `launcher` makes for these arguments, with tensors replaced by meta tensors."""

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    with recorded_launches() as launches:
        launcher(*map(to_meta, args), **{name: to_meta(value) for name, value in kwargs.items()})
    return launches


class Compiled(NamedTuple):
    """What the hardware would run: registers and bytes of stack (spills) per thread, shared bytes, PTX, Triton's IR."""

    registers: int
    stack: int
    shared: int
    ptx: str
    ir: str

    def tensor_core(self) -> set[str]:
        """The kinds of tensor-core instruction used: mma.sync (Ampere), wgmma (Hopper), tcgen05 (Blackwell)."""
        return set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", self.ptx))

    def reductions(self) -> list[tuple[int, ...]]:
        """How every `tl.sum` over a last dimension shares it out: (extent, elements per thread, threads, warps)."""
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked.*)$", self.ir, re.MULTILINE))
        found = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(?:\d+x)*(\d+)xf32, (#\w+)>\)', self.ir, re.DOTALL)
        lists = "sizePerThread", "threadsPerWarp", "warpsPerCTA"
        return [
            (int(extent), *(int(re.search(rf"{name} = \[[\d, ]*?(\d+)\]", layouts[layout])[1]) for name in lists))
            for extent, layout in found
        ]

    def assert_within_budget(self, arch: int) -> None:
        """Nothing spilled, and shared memory for the device; for 80 also for its smaller sisters 86 and 89."""
        assert self.stack == 0, f"sm_{arch}: {self.stack} bytes of spills per thread"
        budget = {80: 99, 90: 227, 100: 227}[arch] * 1024
        assert self.shared <= budget, f"sm_{arch}: {self.shared} bytes of shared memory, {budget} there are"


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a recorded launch for compute capability `arch` (80, 90, 100), specialised as Triton's launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        if specialised and _divisible_by_16(value):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={**launch.options, "enable_fp_fusion": True}
    )
    usage = _resource_usage(binary.asm["cubin"])
    return Compiled(usage["REG"], usage["STACK"], binary.metadata.shared, binary.asm["ptx"], binary.asm["ttgir"])


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64"}
        names |= {"float64": "fp64", "int8": "i8"}
        return "*" + names[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _divisible_by_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", report)}
