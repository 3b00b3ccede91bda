"""The page of a real server in a real browser: what it shows is what the API says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("lmdb")

from .browser import browser, looking_at
from .page_steps import answer, column, finished, pick, wait_for
from .server_scenes import API_KEY, Running, make_site, running

PROMPT = "word5 word6 word7"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    with running(make_site(tmp_path_factory.mktemp("site"))) as server:
        yield server


@pytest.fixture(scope="module")
def launched() -> Iterator:
    with browser() as one:
        yield one


def test_the_page_shows_what_the_api_says(launched, server: Running):
    client = server.client()

    def asked(model: str) -> str:
        messages = [{"role": "user", "content": PROMPT}]
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
        return reply.choices[0].message.content

    expected = {name: asked(f"tiny:{name}" if name else "tiny") for name in (None, "alice", "team/bob")}
    assert len(set(expected.values())) == 3
    with looking_at(launched, server.url, expected=("401 (Unauthorized)", "404 (Not Found)")) as page:
        wait_for(page, "#status", "The server asks for an API key")
        page.get_by_label("API key").fill("not-the-key-of-this-server")
        page.get_by_role("button", name="Use").click()
        wait_for(page, "#status", "The server refuses this API key")
        page.get_by_label("API key").fill(API_KEY)
        page.get_by_role("button", name="Use").click()
        wait_for(page, "#status", "^Live$")
        assert page.text_content("#adapters") == "3 adapters"
        assert wait_for(page, "#slots", "of 3")
        misses = page.text_content("#hit-note")

        pick(page, "al", "alice")
        pick(page, "team/", "team/bob")
        page.get_by_label("Max tokens").fill("12")
        answer(page, PROMPT)
        finished(page, 3)
        for name, text in expected.items():
            shown = column(page, name or "base model")
            assert shown.locator(".output").text_content() == f"{text} … cut at the limit"
            assert "12 tokens, " in shown.locator(".note").text_content()
        page.wait_for_function("before => document.querySelector('#hit-note').textContent !== before", arg=misses)
        assert float(wait_for(page, "#token-rate", "[1-9]")) > 0
        wait_for(page, "#latency-p50", "s$")

        # Deleted meanwhile.
        server.service.store.delete("alice")
        answer(page, PROMPT)
        finished(page, 3)
        assert "there is no model 'tiny:alice'" in column(page, "alice").get_by_role("alert").text_content()
        assert column(page, "team/bob").locator(".output").text_content().startswith(expected["team/bob"])


def test_stop_frees_the_server(launched, server: Running):
    """An answer of 1,900 tokens is stopped after its first ones; the engine drops it."""
    with looking_at(launched, server.url, expected=("401 (Unauthorized)",)) as page:
        wait_for(page, "#status", "The server asks for an API key")
        page.get_by_label("API key").fill(API_KEY)
        page.get_by_role("button", name="Use").click()
        wait_for(page, "#status", "^Live$")
        page.get_by_label("Max tokens").fill(str(server.service.engine.context - 20))
        answer(page, PROMPT)
        wait_for(page, ".output", "word")
        page.get_by_role("button", name="Stop").click()
        finished(page, 1)
        assert column(page, "base model").locator(".note").text_content().startswith("Stopped after")
        wait_for(page, "#requests", "^0 running$")
