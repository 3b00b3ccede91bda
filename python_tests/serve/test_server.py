"""The server with OpenAI's own client, over HTTP: every answer is that of the adapter alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .server_scenes import ADAPTERS, Running, Site, make_site, model_of, running

PROMPTS = ("word5 word6 word7", "word8", "word11 word12 word13 word14 word15 word16")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    with running(site) as server:
        yield server


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
    assert (
        len({text for (_, prompt, n), text in zip(jobs, expected, strict=True) if n == 9 and prompt == PROMPTS[0]}) == 4
    )


@pytest.mark.parametrize("adapter", [None, *ADAPTERS], ids=str)
def test_a_stream_is_the_answer_in_pieces(site: Site, server: Running, adapter):
    client = server.client()
    stream = client.completions.create(
        model=model_of(adapter),
        prompt=PROMPTS[0],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == site.text(adapter, PROMPTS[0], 12)
    assert len(chunks) > 6
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12 and chunks[-1].usage.prompt_tokens == 3


def test_chat(site: Site, server: Running):
    """The template puts word9 behind the messages."""
    client = server.client()
    messages = [
        {"role": "system", "content": "word4"},
        {"role": "user", "content": [{"type": "text", "text": "word5"}]},
    ]
    options = {"model": "tiny:alice", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == site.text("alice", "word4 word5 word9", 8)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_the_cache_of_another_adapter_is_never_used(site: Site, server: Running):
    """One prompt, longer than a block of the cache, for all adapters: together, and one after the other."""
    client = server.client()
    prompt = " ".join(f"word{2 + i % 40}" for i in range(150))
    expected = [site.text(adapter, prompt, 6) for adapter in [None, *ADAPTERS]]

    def ask(adapter) -> str:
        answer = client.completions.create(model=model_of(adapter), prompt=prompt, max_tokens=6, temperature=0)
        return answer.choices[0].text

    for threads in (4, 1, 4):
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(ask, [None, *ADAPTERS])) == expected
    assert len(set(expected)) == 4


def test_prompts_as_tokens_and_several_answers(site: Site, server: Running):
    client = server.client()
    options = {"model": "tiny:alice", "max_tokens": 5, "temperature": 0}
    answer = client.completions.create(prompt=[[5, 6, 7], [8]], n=2, **options)
    first, second = site.text("alice", "word5 word6 word7", 5), site.text("alice", "word8", 5)
    assert [choice.text for choice in answer.choices] == [first, first, second, second]
    assert answer.usage.completion_tokens == 20 and answer.usage.prompt_tokens == 4
    texts = {index: "" for index in range(4)}
    for chunk in client.completions.create(prompt=PROMPTS[:2], n=2, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [first, first, second, second]


def test_stop_sequences(site: Site, server: Running):
    client = server.client()
    words = site.text("team/bob", PROMPTS[2], 16).split()
    stop = next(f"{a} {b}" for a, b in zip(words[3:], words[4:], strict=False))
    expected = " ".join(words).partition(stop)[0]
    options = {"model": "tiny:team/bob", "prompt": PROMPTS[2], "max_tokens": 16, "temperature": 0}
    answer = client.completions.create(stop=[stop, "never"], **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    stream = list(client.completions.create(stop=stop, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert stream[-1].choices[0].finish_reason == "stop"


def test_sampling_depends_on_the_seed_and_on_nothing_else(server: Running):
    client = server.client()

    def ask(seed: int, **options) -> str:
        settings = {"model": "tiny:alice", "prompt": PROMPTS[0], "max_tokens": 12, "seed": seed, **options}
        return client.completions.create(**settings).choices[0].text

    alone = [ask(seed) for seed in range(3)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, [0, 1, 2, 0, 1, 2])) == alone * 2
    assert len(set(alone)) == 3
    assert ask(0, top_p=1e-6) == ask(1, extra_body={"top_k": 1}) == ask(2, temperature=0)


def test_models(server: Running):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", *sorted(f"tiny:{name}" for name in ADAPTERS)]
    assert client.models.retrieve("tiny:team/bob").id == "tiny:team/bob"
    assert client.models.retrieve("tiny").owned_by == "loraxs"

    def page(**query):
        return [model.id for model in client.models.list(extra_query=query)]

    assert page(prefix="team/") == ["tiny:team/bob"]
    assert page(limit=1) == ["tiny", "tiny:../../etc/passwd"]
    assert page(after="tiny:../../etc/passwd", limit=1) == ["tiny:alice"]
