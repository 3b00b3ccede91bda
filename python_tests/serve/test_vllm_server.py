"""vLLM's own server answers as transformers and PEFT do. `make vllm-check` runs this where vLLM is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel

from loraxs_ext.store import AdapterStore

from .real_adapters import QUESTIONS, STYLES, ask, gap, greedy, pack, train
from .vllm_server import vllm_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm-check"),
]
TOKENS = 16
BASE = "base"
# Room for two of the three plain LoRAs of 20 MB, on the disk as in vLLM's memory.
ENVIRONMENT = {"LORAXS_VLLM_CACHE_GB": "0.04"}
OPTIONS = ("--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "2", "--max-model-len", "256")


class World(NamedTuple):
    """A server, and what it should answer: tokens by model name, a list per question."""

    client: Any
    store: AdapterStore
    prompts: list[list[int]]
    answers: dict[str, list[list[int]]]
    model: Any
    cache: Path
    log: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import openai

    from examples.decoder import decoder_folder, load_decoder, load_decoder_tokenizer

    folder = tmp_path_factory.mktemp("vllm")
    base = decoder_folder()
    model, tokenizer = load_decoder(folder=base), load_decoder_tokenizer(base)
    folders = train(model, tokenizer, folder / "adapters")
    prompts = [ask(tokenizer, question) for question in QUESTIONS]
    answers = {BASE: [greedy(model, prompt, TOKENS) for prompt in prompts]}
    adapted: PeftModel | None = None
    for name, path in folders.items():
        key = name.replace("/", "-")
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, str(path), adapter_name=key).eval()
        else:
            adapted.load_adapter(str(path), adapter_name=key)
        adapted.set_adapter(key)
        answers[name] = [greedy(adapted, prompt, TOKENS) for prompt in prompts]
    for name, lists in answers.items():
        print(f"{name}: {tokenizer.decode(lists[0])!r}")
    with pack(folder / "store", folders) as store:
        variables = {"LORAXS_VLLM_ADAPTERS": str(store.path), "LORAXS_VLLM_CACHE": str(folder / "cache")}
        with vllm_server(base, ENVIRONMENT | variables, folder / "log", name=BASE, options=OPTIONS) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
            yield World(client, store, prompts, answers, adapted, folder / "cache", folder / "log")


def complete(world: World, name: str, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    extra = {"return_token_ids": True, "ignore_eos": True}
    reply = world.client.completions.create(
        model=name, prompt=prompt, temperature=0.0, max_tokens=tokens, extra_body=extra
    )
    return list(reply.choices[0].token_ids)


def differences(world: World, name: str, index: int, theirs: list[int]) -> list[str]:
    """Nothing if the answers are the same, else where they part."""
    ours = world.answers[name][index]
    if ours == theirs:
        return []
    if name == BASE:
        with world.model.disable_adapter():
            return [f"{name}, question {index}: {gap(world.model, world.prompts[index], ours, theirs)}"]
    world.model.set_adapter(name.replace("/", "-"))
    return [f"{name}, question {index}: {gap(world.model, world.prompts[index], ours, theirs)}"]


def test_the_adapters_have_an_effect(world: World) -> None:
    assert len({tuple(map(tuple, lists)) for lists in world.answers.values()}) == len(STYLES) + 1


def test_same_tokens_one_request_at_a_time(world: World) -> None:
    found = [
        difference
        for name in world.answers
        for index, prompt in enumerate(world.prompts)
        for difference in differences(world, name, index, complete(world, name, prompt))
    ]
    assert found == []


def test_same_tokens_with_all_requests_at_once(world: World) -> None:
    jobs = [(name, index) for _ in range(3) for index in range(len(QUESTIONS)) for name in world.answers]
    with ThreadPoolExecutor(len(jobs)) as threads:
        replies = list(threads.map(lambda job: complete(world, job[0], world.prompts[job[1]]), jobs))
    found = [d for job, reply in zip(jobs, replies, strict=True) for d in differences(world, *job, reply)]
    assert found == []


def test_rows_without_an_adapter_get_none() -> None:
    from vllm.lora.ops.torch_ops import lora_ops

    from loraxs_ext.serve.vllm.cpu import skip_rows_without_adapter

    x, weights = torch.randn(4, 8), torch.randn(3, 1, 2, 8)
    slots, output = torch.tensor([-1, 2, 0, -1]), torch.full((4, 2), torch.nan)
    skip_rows_without_adapter()
    lora_ops.bgmv_shrink(x, weights, output, slots, 0.5)
    wanted = 0.5 * torch.einsum("bi,boi->bo", x, weights[slots, 0])
    wanted[slots < 0] = 0
    torch.testing.assert_close(output, wanted)
    # Once is enough.
    corrected = lora_ops.bgmv_shrink
    skip_rows_without_adapter()
    assert lora_ops.bgmv_shrink is corrected


def test_the_cache_stays_within_its_limit(world: World) -> None:
    for name in STYLES:
        complete(world, name, world.prompts[0], tokens=1)
    folders = [path for path in world.cache.iterdir() if not path.name.startswith(".")]
    assert len(folders) == 2


def test_a_replaced_adapter_is_seen_at_once_and_a_deleted_one_is_gone(world: World) -> None:
    import openai

    row = world.store.row("json")
    assert complete(world, "json", world.prompts[0]) == world.answers["json"][0]
    world.store.put(world.store.row("pirate")._replace(name="json"))
    assert complete(world, "json", world.prompts[0]) == world.answers["pirate"][0]
    world.store.put(row)
    assert complete(world, "json", world.prompts[0]) == world.answers["json"][0]
    world.store.put(row._replace(name="short-lived"))
    assert complete(world, "short-lived", world.prompts[0]) == world.answers["json"][0]
    world.store.delete("short-lived")
    with pytest.raises(openai.NotFoundError):
        complete(world, "short-lived", world.prompts[0])


@pytest.mark.parametrize("name", ["nobody", "../../etc/passwd", "/etc", "a" * 400, "pirate/../json"])
def test_an_unknown_adapter_is_404(world: World, name: str) -> None:
    import openai

    with pytest.raises(openai.NotFoundError):
        complete(world, name, world.prompts[0])


def test_the_server_lives_and_answers_as_before(world: World) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="control characters"):
        complete(world, "a\nb", world.prompts[0])
    test_same_tokens_one_request_at_a_time(world)
