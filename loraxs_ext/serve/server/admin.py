"""Routes of the administrator: adapters are put, replaced and deleted while others are served."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraxs_ext.checkpoint.packing import row_of
from loraxs_ext.files import read_json
from loraxs_ext.store import AdapterStore, VersionConflict

from .errors import ApiError
from .service import Service

# Names of PEFT's files, which are those of the fields of the form as well.
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FIELDS = {"config": _CONFIG, "weights": _WEIGHTS}
# Numbers of TinyLoRA's fixed projections of one module, which are drawn when it is read.
_MOST_DRAWN = 1 << 25


async def put_adapter(request: Request) -> Response:
    """Add an adapter, or replace it: a form with the files `config` and `weights`, as `save_pretrained` wrote them.

    What runs is finished with the adapter as it was. With `?expected_version=N`, 0 for none, only if it is at that.
    """
    service: Service = request.app.state.service
    name, expected = request.path_params["name"], _expected(request)
    form = await request.form(max_files=len(_FIELDS), max_fields=0)
    try:
        files = {field: form.get(field) for field in _FIELDS}
        missing = [field for field, file in files.items() if not isinstance(file, UploadFile)]
        if missing:
            raise ApiError(422, f"{missing[0]}: expected a file in the form, got none", param=missing[0])
        opened = {_FIELDS[field]: file.file for field, file in files.items() if isinstance(file, UploadFile)}
        version = await asyncio.to_thread(_put, service.store, name, opened, expected)
    finally:
        await form.close()
    request.scope["loraxs"]["about"].update(adapter=name, version=version)
    return JSONResponse({"id": f"{service.name}:{name}", "version": version}, 201 if version == 1 else 200)


async def delete_adapter(request: Request) -> Response:
    """Forget an adapter. What runs is finished with it."""
    service: Service = request.app.state.service
    name, expected = request.path_params["name"], _expected(request)
    try:
        await asyncio.to_thread(service.store.delete, name, expected_version=expected)
    except (KeyError, ValueError):
        raise ApiError(404, "name: there is no such adapter", param="name", code="model_not_found") from None
    except VersionConflict as reason:
        raise _conflict(reason) from None
    request.scope["loraxs"]["about"].update(adapter=name)
    return JSONResponse({"id": f"{service.name}:{name}", "deleted": True})


def _put(store: AdapterStore, name: str, files: dict[str, BinaryIO], expected: int | None) -> int:
    with tempfile.TemporaryDirectory(prefix="loraxs-put-") as scratch:
        # The name of the adapter is a key and no part of a path.
        folder = Path(scratch)
        for target, file in files.items():
            with (folder / target).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        try:
            _check_drawn(folder)
            return store.put(row_of(name, folder, store.manifest), expected_version=expected)
        except VersionConflict as reason:
            raise _conflict(reason) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
            message = str(reason).replace(f"{folder}/", "").replace(str(folder), "adapter")
            raise ApiError(422, message or "the adapter cannot be read", code="invalid_adapter") from reason


def _check_drawn(folder: Path) -> None:
    """Raise unless what a configuration makes the reader allocate is within reason."""
    config = read_json(folder / _CONFIG)
    if not config.get("use_tinylora"):
        return
    pattern = config.get("rank_pattern") or {}
    numbers = [config.get("u", 1), config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else ())]
    if not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise ValueError(f"{_CONFIG}: expected positive integers for u and all ranks")
    if numbers[0] * max(numbers[1:]) ** 2 > _MOST_DRAWN:
        raise ValueError(f"{_CONFIG}: expected u · r² of at most {_MOST_DRAWN}, got u = {numbers[0]}")


def _expected(request: Request) -> int | None:
    value = request.query_params.get("expected_version")
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise ApiError(422, "expected_version: expected a number, 0 for no adapter", param="expected_version")
    return int(value)


def _conflict(reason: VersionConflict) -> ApiError:
    return ApiError(
        409,
        f"expected_version: expected {reason.expected}, the adapter is at {reason.found} (0 is none)",
        param="expected_version",
        code="version_conflict",
    )
