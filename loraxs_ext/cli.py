"""The command line, `loraxs COMMAND`. A command is one entry of COMMANDS and nothing else."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from . import __version__, ops
from .basis.cache import cache_directory
from .commands import advise, evaluate, export, import_, init, merge, pack, serve, store, train

REQUIRED = ("torch", "numpy", "safetensors", "transformers", "peft", "tqdm")
OPTIONAL = ("triton", "accelerate")
# As a shell says that SIGPIPE ended a process.
_BROKEN_PIPE = 128 + 13


@dataclass(frozen=True)
class Command:
    """A subcommand: its one-line help, what it adds to its parser, and what it does; `run` returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (default: the process's arguments), run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="loraxs", description="LoRA-XS adapters: kilobytes each, any number a batch.")
    parser.add_argument("--version", action="version", version=f"loraxs_ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    with _ends_with_its_reader():
        arguments = parser.parse_args(argv)
        return arguments.run(arguments)


class _Output:
    """A text stream that ends the process when nobody reads it any more, as `head` does not after its lines.

    As SystemExit, so that commands clean up and don't take it for an error of theirs. SIGPIPE would end a server, too,
    whose client goes away.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._unless_closed(self._stream.write, text)

    def flush(self) -> None:
        self._unless_closed(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _unless_closed(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except BrokenPipeError:
            # What is in the buffer is written once more at the end of the interpreter.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            raise SystemExit(_BROKEN_PIPE) from None


@contextmanager
def _ends_with_its_reader() -> Iterator[None]:
    if sys.stdout is None:  # It was closed from the beginning; then `print` does nothing.
        yield
        return
    output = _Output(sys.stdout)
    with redirect_stdout(cast(TextIO, output)):
        try:
            yield
        except SystemExit:
            output.flush()
            raise
        output.flush()


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _doctor(arguments: argparse.Namespace) -> int:
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(_as_text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """What `loraxs doctor` reports, as JSON-ready values.

    Returns:
        versions: package -> version or None; devices; cpu: features and the level in use; build: how the compiled part
        was made, or None; cache: folder and size in bytes; owners: op -> device -> owner; agreement: device -> largest
        relative error of the fused op against the reference; notes and problems: [{what, hint}]; ok: no problems.
    """
    problems: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []
    versions: dict[str, str | None] = {"python": platform.python_version(), "loraxs_ext": __version__}
    versions |= {name: _installed(name) for name in REQUIRED + OPTIONAL}
    problems += [
        {"what": f"{name} is not installed", "hint": f"pip install {name}"}
        for name in REQUIRED
        if versions[name] is None
    ]
    if versions["triton"] is None:
        notes.append({"what": "triton is not installed", "hint": "only needed for Triton kernels: pip install triton"})

    build, cpu = None, {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    try:
        compiled = importlib.import_module("loraxs_ext._C")
    except ImportError as error:
        hint = "build it: pip install --no-build-isolation -e . (needs a C++ compiler, cmake, ninja, pybind11)"
        problems.append({"what": f"the compiled part cannot be imported: {error}", "hint": hint})
    else:
        build = compiled.build_info()
        cpu["features"] = compiled.cpu_features()
        if ops.backends.COMPILED:
            try:
                cpu["isa"] = compiled.cpu_isa()
            except RuntimeError as error:
                hint = "_C and _ops.so are of different builds; build again: pip install --no-build-isolation -e ."
                problems.append({"what": str(error), "hint": hint})

    devices = _devices()
    if len(devices) > 1 and build and not build["cuda"]:
        hint = "with nvcc on PATH: LORAXS_CUDA=on pip install --no-build-isolation -e ."
        notes.append({"what": "there is a CUDA device, but this build has no CUDA kernels", "hint": hint})
    if ops.backends.BACKEND == "reference":
        hint = "unset LORAXS_BACKEND to use the fast owners"
        notes.append({"what": "LORAXS_BACKEND=reference: no op uses its fast owner", "hint": hint})
    elif build and not ops.backends.COMPILED:
        hint = "build again: pip install --no-build-isolation -e ."
        problems.append({"what": "the compiled ops are not there, every op runs in plain torch", "hint": hint})

    agreement = {device: _agreement(device) for device in dict.fromkeys(device["type"] for device in devices)}
    problems += [
        {"what": f"loraxs::linear is wrong on {device}: relative error {error:.1e}", "hint": "LORAXS_BACKEND=reference"}
        for device, error in agreement.items()
        if not error < 1e-5
    ]
    return {
        "ok": not problems,
        "versions": versions,
        "devices": devices,
        "cpu": cpu,
        "build": build,
        "nvcc": shutil.which("nvcc"),
        "cache": _cache(),
        "owners": ops.backends.owners(),
        "agreement": agreement,
        "notes": notes,
        "problems": problems,
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"type": "cpu", "name": cpu_name()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            capability = f"{facts.major}.{facts.minor}"
            devices.append(
                {"type": "cuda", "name": facts.name, "capability": capability, "memory_bytes": facts.total_memory}
            )
    return devices


def cpu_name() -> str:
    """The processor's name as Linux gives it, elsewhere the machine type."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cache() -> dict[str, Any]:
    """The folder for downloads and decompositions, and the bytes in it."""
    folder = cache_directory("default")
    assert folder is not None  # only None as a choice gives none
    return {"folder": str(folder), "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}


def _agreement(device: str) -> float:
    """Largest error of the fused op against the reference on a small problem, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, pages = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((5, 48), (40, 48), (4, 48), (40, 4), (2, 4, 4))
    )
    slots = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32, device=device)
    computed = ops.linear(x, weight, None, a, b, pages, slots, 0.5).double()
    meant, _ = ops.reference.linear(
        x.double(), weight.double(), None, a.double(), b.double(), pages.double(), slots, 0.5
    )
    return ((computed - meant).abs().max() / meant.abs().max()).item()


def _as_text(report: dict[str, Any]) -> str:
    versions = "\n".join(f"  {name:<14}{version or 'not installed'}" for name, version in report["versions"].items())
    cpu, build = report["cpu"], report["build"]
    features = " ".join(name for name, has in cpu.get("features", {}).items() if has) or "unknown"
    lines = ["Versions", versions, "Devices"]
    for device in report["devices"]:
        more = (
            f", sm_{device['capability']}, {device['memory_bytes'] / 2**30:.0f} GiB" if "capability" in device else ""
        )
        lines.append(f"  {device['type']:<14}{device['name']}{more}")
    lines += [
        "CPU",
        f"  {'features':<14}{features}",
        f"  {'in use':<14}{cpu.get('isa', 'plain torch')}, {cpu['threads']} of {cpu['cores']} cores",
        "Build",
    ]
    if build:
        cuda = f"CUDA {build['cuda_version']} for {' '.join(build['cuda_archs'])}" if build["cuda"] else "without CUDA"
        lines.append(f"  {'compiled':<14}{build['compiler']}, torch {build['torch']}, {cuda}")
        lines.append(f"  {'CPU levels':<14}{' '.join(build['cpu_isas'])}")
    lines.append(f"  {'nvcc':<14}{report['nvcc'] or 'not found'}")
    lines += ["Cache", f"  {report['cache']['folder']}, {report['cache']['bytes'] / 1e6:.1f} MB"]
    columns = list(next(iter(report["owners"].values())))
    width = max(len(owners[columns[0]]) for owners in report["owners"].values()) + 2
    lines += ["Who computes each op", f"  {'':<18}" + "".join(f"{column:<{width}}" for column in columns).rstrip()]
    for op, owners in report["owners"].items():
        lines.append(f"  {op:<18}" + "".join(f"{owners[column]:<{width}}" for column in columns).rstrip())
    for device, error in report["agreement"].items():
        lines.append(f"  on {device}, linear agrees with its meaning in fp64 to {error:.1e}")
    for title in ("notes", "problems"):
        if report[title]:
            lines.append(title.capitalize())
            lines += [f"  {entry['what']}\n    → {entry['hint']}" for entry in report[title]]
    lines.append("All well." if report["ok"] else "Not all is well: see above.")
    return "\n".join(lines)


COMMANDS = {
    "init": Command(init.HELP, init.add_arguments, init.run),
    "advise": Command(advise.HELP, advise.add_arguments, advise.run),
    "train": Command(train.HELP, train.add_arguments, train.run),
    "eval": Command(evaluate.HELP, evaluate.add_arguments, evaluate.run),
    "merge": Command(merge.HELP, merge.add_arguments, merge.run),
    "export": Command(export.HELP, export.add_arguments, export.run),
    "import": Command(import_.HELP, import_.add_arguments, import_.run),
    "pack": Command(pack.HELP, pack.add_arguments, pack.run),
    "store": Command(store.HELP, store.add_arguments, store.run),
    "serve": Command(serve.HELP, serve.add_arguments, serve.run),
    "doctor": Command("print versions, devices and who computes each op", _doctor_arguments, _doctor),
}

if __name__ == "__main__":
    sys.exit(main())
