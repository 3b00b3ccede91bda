"""The server with OpenAI's own client, over HTTP: every answer is that of the adapter alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("lmdb")

from .server_scenes import ADAPTERS, Running, Site, make_site, running

PROMPTS = ("word5 word6 word7", "word8", "word11 word12 word13 word14 word15 word16")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    with running(site) as server:
        yield server


def model_of(adapter: str | None) -> str:
    return "tiny" if adapter is None else f"tiny:{adapter}"


def test_concurrent_requests_get_what_their_adapter_says_alone(site: Site, server: Running):
    """More adapters and more requests than slots, of different lengths, all at a time."""
    client = server.client()
    jobs = [(a, p, n) for n in (3, 9, 17) for p in PROMPTS for a in [None, *ADAPTERS]]
    expected = [site.text(*job) for job in jobs]

    def ask(job) -> str:
        adapter, prompt, tokens = job
        answer = client.completions.create(model=model_of(adapter), prompt=prompt, max_tokens=tokens, temperature=0)
        assert answer.usage.completion_tokens == tokens and answer.choices[0].finish_reason == "length"
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, jobs)) == expected
    assert len({text for (_, prompt, n), text in zip(jobs, expected, strict=True) if n == 9 and prompt == PROMPTS[0]}) == 4
