"""`loraxs serve MODEL --store STORE`: an OpenAI-compatible server of a base model and its adapters."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from loraxs_ext.serve.server.limits import Limits

from .folders import DTYPES

HELP = "serve a model and the adapters of a store over HTTP"
DESCRIPTION = """
Serve a base model and any adapters of a store, one of them for each request: model "NAME" is the base model and
"NAME:ADAPTER" an adapter. Adapters may be added, replaced and deleted meanwhile. SIGTERM or SIGINT ends the server when
what runs is finished. Exit status: 0 ended in order, 1 failed (the reason is on stderr), 2 wrong usage.
"""
_DTYPES = {"auto": "auto", **DTYPES}
_EXTRA = "loraxs serve needs what the extra `serve` installs: pip install 'loraxs-ext[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs serve` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", help="base model: a folder or a name")
    parser.add_argument("--store", type=Path, required=True, help="store of its adapters, which `loraxs pack` makes")
    parser.add_argument("--name", help="of the base model towards clients (default: the last part of MODEL)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default %(default)s)")
    parser.add_argument("--grace", type=int, default=60, help="seconds for what runs at the end (default %(default)s)")
    keys = parser.add_argument_group("keys", "one a line; without a file, those in LORAXS_API_KEY and LORAXS_ADMIN_KEY")
    keys.add_argument("--api-key-file", metavar="FILE", type=Path, help="of clients; needed beyond this machine")
    keys.add_argument("--admin-key-file", metavar="FILE", type=Path, help="of whoever changes adapters over HTTP")
    compute = parser.add_argument_group("computing")
    compute.add_argument("--device", help="default: an accelerator, if there is one")
    compute.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the model (default: as it was saved)")
    compute.add_argument("--slots", type=int, default=256, help="adapters at work at a time (default %(default)s)")
    compute.add_argument("--rank", type=int, help="largest of an adapter (default: the largest of the store)")
    compute.add_argument("--cache-tokens", type=int, help="keys and values kept (default: 16384, on a GPU what fits)")
    compute.add_argument("--batch-tokens", type=int, help="of a step (default: 512, on a GPU what fits)")
    limits, defaults = parser.add_argument_group("limits"), vars(Limits())
    for flag, kind, help in (
        ("--max-body", int, "bytes of a request"),
        ("--max-adapter", int, "bytes of an adapter that is put"),
        ("--max-context", int, "tokens of a prompt and its answer (default: what model and cache hold)"),
        ("--max-choices", int, "answers of a request"),
        ("--max-queue", int, "answers waiting or running"),
        ("--slot-seconds", float, "that a request waits for a slot"),
        ("--body-seconds", float, "that a client takes to send a request"),
    ):
        default = defaults.get(flag.removeprefix("--max-").removeprefix("--").replace("-", "_"))
        said = "" if default is None else f" (default {default:,})"
        limits.add_argument(flag, type=kind, metavar="N", help=help + said)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        from loraxs_ext.serve.server import logs
        from loraxs_ext.serve.server.listening import serve
    except ImportError as reason:
        print(f"{_EXTRA} ({reason})", file=sys.stderr)
        return 1
    try:
        with ExitStack() as stack:
            service = _service(arguments, stack)
            logs.set_up()
            return serve(service, arguments.host, arguments.port, arguments.grace)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as reason:
        print(f"loraxs serve: {reason}", file=sys.stderr)
        return 1


def _service(arguments: argparse.Namespace, stack: ExitStack) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loraxs_ext.serve.server.auth import check_binding, read_keys
    from loraxs_ext.serve.server.building import build
    from loraxs_ext.store import AdapterStore

    # All that can be wrong without the model is said before the model is loaded.
    api_keys = read_keys(arguments.api_key_file, "LORAXS_API_KEY", os.environ)
    admin_keys = read_keys(arguments.admin_key_file, "LORAXS_ADMIN_KEY", os.environ)
    check_binding(arguments.host, api_keys)
    limits = _limits(arguments)
    store = stack.enter_context(AdapterStore(arguments.store, readonly=not admin_keys))
    device = torch.device(arguments.device) if arguments.device else _accelerator()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loader = cast(Any, AutoModelForCausalLM)
    model = loader.from_pretrained(arguments.model, dtype=_DTYPES[arguments.dtype]).to(device).eval()
    on_cpu = device.type == "cpu"
    return stack.enter_context(
        build(
            model,
            tokenizer,
            store,
            name=arguments.name or Path(arguments.model).name,
            limits=limits,
            slots=arguments.slots,
            rank=arguments.rank,
            cache_tokens=arguments.cache_tokens or (16384 if on_cpu else None),
            batch_tokens=arguments.batch_tokens or (512 if on_cpu else None),
            api_keys=api_keys,
            admin_keys=admin_keys,
        )
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    given = {
        "body": arguments.max_body,
        "adapter": arguments.max_adapter,
        "context": arguments.max_context,
        "choices": arguments.max_choices,
        "queue": arguments.max_queue,
        "slot_seconds": arguments.slot_seconds,
        "body_seconds": arguments.body_seconds,
    }
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _accelerator() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
