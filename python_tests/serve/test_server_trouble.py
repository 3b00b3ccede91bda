"""A server whose cache is too small, and one whose engine breaks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .server_scenes import ADAPTERS, APIError, InternalServerError, Site, make_site, model_of, running, send

PROMPT = "word5 word6 word7"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def test_a_cache_that_is_too_small_for_all(site: Site):
    """Requests that lose their keys and values to others begin again, with the adapter and the numbers they had."""
    jobs = [(adapter, PROMPT, 150) for adapter in [None, *ADAPTERS]] * 2
    expected = [site.text(*job) for job in jobs[:4]] * 2
    with running(site, cache_tokens=448) as server:
        assert server.service.engine.context == 384
        client = server.client()

        def ask(job) -> str:
            stream = client.completions.create(
                model=model_of(job[0]), prompt=job[1], max_tokens=job[2], temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in stream)

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, jobs)) == expected
        whole = client.completions.create(model="tiny:alice", prompt="word8", max_tokens=383, temperature=0)
        assert whole.choices[0].text == site.text("alice", "word8", 383)


def test_a_broken_engine_is_said_to_be_broken(site: Site):
    with running(site) as server:
        client = server.client()
        stream = iter(client.completions.create(model="tiny:alice", prompt=PROMPT, max_tokens=1900, stream=True))
        next(stream)

        def fail(*_) -> None:
            raise RuntimeError("the device is gone, and word5 with it")

        server.service.engine._batching._assign_slots = fail
        with pytest.raises(APIError, match="takes no requests at the moment"):
            list(stream)
        for path in ("/health", "/ready"):
            assert send(server, "GET", path)[0] == 503
        with pytest.raises(InternalServerError) as caught:
            client.completions.create(model="tiny", prompt=PROMPT)
        assert caught.value.status_code == 503
        assert server.service.engine.running == 0 and server.service.engine.pool.stats()["in_use"] == 0
