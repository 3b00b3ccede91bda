"""A real browser without a window. Debian's chromium will do, and Chrome, and what `playwright install` brings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser() -> Iterator:
    """Yields playwright's browser; skips where there is none, unless LORAXS_REQUIRE_BROWSER says that there must be."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, _NAMES)), playwright.chromium.executable_path)
        if not Path(path).exists():
            _missing(f"no browser: none of {', '.join(_NAMES)} is installed")
        with playwright.chromium.launch(executable_path=path) as launched:
            yield launched


@contextmanager
def looking_at(launched, url: str, *, expected: tuple[str, ...] = (), **settings) -> Iterator:
    """A page of its own; afterwards, nothing was asked of another host and nothing but `expected` went wrong."""
    context = launched.new_context(**settings)
    context.set_default_timeout(10_000)
    page = context.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert {urlsplit(one).netloc for one in asked} == {urlsplit(url).netloc}
    assert [text for text in wrong if not any(part in text for part in expected)] == []


def _missing(reason: str) -> None:
    if os.environ.get("LORAXS_REQUIRE_BROWSER"):
        pytest.fail(f"LORAXS_REQUIRE_BROWSER is set, but {reason}")
    pytest.skip(f"{reason}; install chromium to run this")
