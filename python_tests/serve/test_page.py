"""The page at `/` in a real browser, against a server that does what each test wants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from .browser import browser, looking_at
from .page_steps import answer, column, finished, pick, wait_for
from .page_world import MODEL, World, complete, serving

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


@pytest.fixture(scope="module")
def launched() -> Iterator:
    with browser() as one:
        yield one


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def url(world: World) -> Iterator[str]:
    with serving(world.application()) as address:
        yield address


def test_live_figures_move(launched, world, url):
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        assert page.get_by_role("heading", level=1).text_content() == MODEL
        assert page.text_content("#adapters") == "3 adapters"
        assert page.text_content("#store-size") == "12.3 MB on disk"
        assert page.text_content("#slots") == "5 of 16"
        assert page.text_content("#hit-rate") == "–"
        assert page.text_content("#latency-p50") == "–"
        for _ in range(2):
            complete(url, "alice", "hello")
        assert wait_for(page, "#hit-rate", "%") == "75.0 %"
        assert wait_for(page, "#token-rate", "[1-9]") == "4.8"
        assert wait_for(page, "#latency-p50", "ms") == "250 ms"
        assert page.text_content("#latency-p99") == "1.5 s"
        world.tokens = 0
        wait_for(page, "#token-rate", "^0$")
        drawn = page.get_attribute("#token-chart .line", "d")
        assert drawn.startswith("M") and len(set(re.findall(r" ([\d.]+)", drawn))) > 1
        assert "now 0; scale from 0 to 5" in page.get_by_role("img").first.get_attribute("aria-label")


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
def test_one_prompt_side_by_side(launched, world, url, chat):
    world.chat = chat
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        # With the mouse, then with the keyboard alone.
        pick(page, "al", "alan")
        page.get_by_label("Add an adapter").fill("b")
        page.get_by_role("option", name="bob", exact=True).wait_for()
        page.keyboard.press("Enter")
        assert page.get_by_role("article").count() == 3
        page.get_by_label("Prompt").fill("two\nlines")
        page.get_by_label("Prompt").press("Control+Enter")
        finished(page, 3)
        for name, model in (("base model", MODEL), ("alan", f"{MODEL}:alan"), ("bob", f"{MODEL}:bob")):
            shown = column(page, name).locator(".output").text_content()
            assert shown == "".join(world.answer(model, "two\nlines"))
            if chat:
                assert shown == complete(url, None if name == "base model" else name, "two\nlines")
            assert "24 tokens, " in column(page, name).locator(".note").text_content()

        page.get_by_label("Max tokens").fill("2")
        column(page, "alan").get_by_role("button", name="Remove alan").click()
        answer(page, "again")
        finished(page, 2)
        assert column(page, "bob").locator(".output").text_content() == f"{MODEL}:bob says\n … cut at the limit"


def test_the_picker_finds_by_prefix(launched, world, url):
    world.adapters = [f"user-{n:03}" for n in range(300)]
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        picker = page.get_by_label("Add an adapter")
        picker.fill("user-29")
        page.get_by_role("option", name="user-299", exact=True).wait_for()
        assert page.get_by_role("option").count() == 10
        picker.press("ArrowDown")
        picker.press("Enter")
        column(page, "user-291").wait_for()
        picker.fill("user-291")
        wait_for(page, "#picker-note", "No other adapter begins with “user-291”")
        for n in range(3):
            pick(page, f"user-00{n}", f"user-00{n}")
        pick(page, "user-004", "user-004")
        wait_for(page, "#playground-status", "At most 5 side by side")
        assert page.get_by_role("article").count() == 5


def test_same_answer_as_the_base_model_is_said(launched, world, url):
    world.answer = lambda model, prompt: ["other"] if model.endswith("bob") else ["same"]
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        pick(page, "alice", "alice")
        pick(page, "bob", "bob")
        answer(page, "hello")
        finished(page, 3)
        assert "the same as the base model" in column(page, "alice").locator(".note").text_content()
        assert "the same" not in column(page, "bob").locator(".note").text_content()


def test_stop_ends_the_answers_on_the_server_too(launched, world, url):
    world.flowing.clear()
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        pick(page, "bob", "bob")
        answer(page, "hello")
        wait_for(page, "article[aria-label=bob] .output", "says|tiny:bob")
        assert column(page, "bob").get_attribute("aria-busy") == "true"
        assert page.get_by_role("button", name="Answer").is_disabled()
        page.get_by_role("button", name="Stop").click()
        finished(page, 2)
        assert page.text_content("#playground-status").startswith("0 of 2 answered")
        assert column(page, "bob").locator(".output").text_content() == f"{MODEL}:bob "
        assert column(page, "bob").locator(".note").text_content().startswith("Stopped after")
        page.wait_for_timeout(200)
        assert sorted(world.left) == ["", "bob"]
        world.flowing.set()
        answer(page, "hello")
        finished(page, 2)
        assert column(page, "bob").get_attribute("data-state") == "done"


def test_api_key(launched, world, url):
    world.key = "correct-horse"
    refused = ("401 (Unauthorized)",)
    with looking_at(launched, url, expected=refused) as page:
        wait_for(page, "#status", "The server asks for an API key")
        key = page.get_by_label("API key")
        assert key.evaluate("element => element === document.activeElement")
        key.fill("wrong")
        key.press("Enter")
        wait_for(page, "#status", "The server refuses this API key")
        key.fill("correct-horse")
        page.get_by_role("button", name="Use").click()
        wait_for(page, "#status", "^Live$")
        assert not key.is_visible()
        answer(page, "hello")
        finished(page, 1)
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert "correct" not in kept and page.context.cookies() == []

        world.key = "changed"
        answer(page, "hello")
        finished(page, 1)
        assert column(page, "base model").get_by_role("alert").text_content() == "The server refuses this API key."
        assert key.is_visible()


def test_errors_are_shown_where_they_belong(launched, world, url):
    with looking_at(launched, url, expected=("404 (Not Found)", "503 (Service Unavailable)")) as page:
        wait_for(page, "#status", "^Live$")
        pick(page, "bob", "bob")
        world.adapters.remove("bob")
        answer(page, "hello")
        finished(page, 2)
        said = column(page, "bob").get_by_role("alert").text_content()
        assert said == f"model: there is no model {MODEL}:bob"
        assert column(page, "base model").get_by_role("alert").text_content() == ""
        assert column(page, "base model").locator(".output").text_content().startswith(MODEL)

        world.broken = True
        wait_for(page, "#status", "The store is being repaired. Trying again.")
        world.broken = False
        wait_for(page, "#status", "^Live$")
        world.ready = False
        wait_for(page, "#status", "The server is ending")


def test_names_prompts_and_answers_are_text_and_nothing_else(launched, world, url):
    world.adapters = [HOSTILE]
    with looking_at(launched, url) as page:
        wait_for(page, "#status", "^Live$")
        pick(page, "<script", HOSTILE)
        answer(page, HOSTILE)
        finished(page, 2)
        shown = column(page, HOSTILE)
        assert shown.get_by_role("heading").text_content() == HOSTILE
        assert shown.locator(".output").text_content() == "".join(world.answer(f"{MODEL}:{HOSTILE}", HOSTILE))
        assert page.locator("main script, main img").count() == 0
    # Should a later change of the page try: the browser itself refuses.
    with looking_at(launched, url, expected=("TrustedHTML",)) as page:
        refused = page.evaluate("() => { try { document.body.innerHTML = '<b>' } catch (error) { return error.name } }")
        assert refused == "TypeError"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(launched, world, url, scheme):
    world.adapters = ["a-name-of-many-letters" * 6]
    with looking_at(launched, url, color_scheme=scheme, viewport={"width": 360, "height": 740}) as page:
        wait_for(page, "#status", "^Live$")
        pick(page, "a", world.adapters[0])
        answer(page, "x" * 500)
        finished(page, 2)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 80) == (scheme == "dark")


def test_headers_and_no_address_of_another_host(world, url):
    for path, kind in {"/": "html", "/page/page.js": "javascript", "/page/page.css": "css"}.items():
        with urlopen(url + path, timeout=10) as response:
            assert kind in response.headers["Content-Type"]
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self';") and "unsafe" not in policy
            text = response.read().decode()
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
            assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", text)
