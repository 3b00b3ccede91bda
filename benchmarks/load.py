"""A load test of `loraxs serve` over HTTP: 200 clients at a time, adapters changed meanwhile, and kill -9.

    python -m benchmarks.load               SmolLM2-135M on the CPU, about a quarter of an hour
    python -m benchmarks.load --smoke       walks through everything with a tiny model; no figures

Every answer is compared with that of its adapter alone, folded into the weights of a plain transformers model before.
Only prompts and adapters with one clear greedy answer are asked for, so there is one right text, or, for an adapter
that is changed while it is asked, one for each of what it was in that time. The same number of clients asks for the
base model of the same server in turns with that. Then the server is killed under load while adapters are put, and
started again: each that was confirmed has to be there and answer rightly.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks._measure import RESULTS, environment, write_json
from benchmarks.serve.clients import (
    ADMIN_KEY,
    API_KEY,
    BROKEN,
    NAME,
    Administrator,
    Asked,
    Connection,
    Site,
    ask_for,
    served,
)
from benchmarks.serve.oracle import answers, folded
from benchmarks.serve.workload import RandomAdapters, real_workload, targets, tiny_workload
from loraxs_ext.basis import Recipe, decompose, sketch
from loraxs_ext.checkpoint.packing import unpack
from loraxs_ext.store import AdapterRow, AdapterStore, Manifest


class Plan(NamedTuple):
    """How much is asked.

    Attributes:
        clients: at a time.
        seconds, rounds: of a round, and rounds, of the base model and of adapters each.
        contents: different sets of numbers that adapters have.
        steady, changing: adapters that stay as they are, and that do not.
        prompts, length, new: how many, tokens of each, most tokens of an answer.
        pause: seconds between two changes.
        put: adapters confirmed before the server is killed.
    """

    clients: int
    seconds: float
    rounds: int
    contents: int
    steady: int
    changing: int
    prompts: int
    length: int
    new: int
    pause: float
    put: int


FULL = Plan(200, 90.0, 2, 8, 200, 24, 16, 16, 24, 1.0, 200)
TINY = Plan(20, 2.0, 1, 3, 6, 4, 6, 6, 6, 0.02, 10)
# Text for a prompt, by (adapter's content, prompt); None where there is no one right text.
Right = Mapping[tuple[int | None, int], str | None]


class WrongAnswer(Exception):
    """The server said what it should not have; there are no figures for that."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help=f"of a round; default {FULL.seconds:g}")
    parser.add_argument("--clients", type=int, help=f"at a time; default {FULL.clients}")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, small numbers; no figures")
    parser.add_argument("--output", type=Path, help="file of the result; default benchmarks/results/load-cpu.json")
    arguments = parser.parse_args(argv)
    plan = TINY if arguments.smoke else FULL
    plan = plan._replace(seconds=arguments.seconds or plan.seconds, clients=arguments.clients or plan.clients)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(plan, Path(folder), smoke=arguments.smoke)
    path = arguments.output or (None if arguments.smoke else RESULTS / "load-cpu.json")
    content = {
        "kind": "load",
        "dry_run": arguments.smoke,
        "environment": environment(),
        "plan": plan._asdict(),
        **result,
    }
    print("checked" if arguments.smoke else json.dumps(result, indent=1))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        print(f"written to {path}")


def measure(plan: Plan, folder: Path, *, smoke: bool) -> dict[str, Any]:
    """All of it, in a scratch folder.

    Raises:
        WrongAnswer: an answer was wrong, or none came.
    """
    rows, prompts, right = prepare(plan, folder, smoke=smoke)
    steady = {f"steady/{i}": i % plan.contents for i in range(plan.steady)}
    with AdapterStore(folder / "store") as store:
        store.put_many([rows[content]._replace(name=name) for name, content in steady.items()])
    files = [_files(folder / f"content-{i}") for i in range(plan.contents)]
    room = plan.clients * (plan.length + plan.new + 64) + 128
    arguments = ["--slots", "128", "--cache-tokens", str(room), "--batch-tokens", str(max(512, 2 * plan.clients))]
    site = Site(folder / "model", folder / "store", [*arguments, "--slot-seconds", "300"], folder / "server.log")
    result: dict[str, Any] = {}
    with served(site) as (port, _):
        sides: dict[str, list[dict[str, float]]] = {"base model": [], "adapters": []}
        begin = dict(steady)
        counts: Counter[str] = Counter()
        for number in range(plan.rounds):
            names = [f"changing/{number}/{i}" for i in range(plan.changing)]
            base = ask_for(plan.seconds, port, plan.clients, _chooser(right, [None], {}, number), prompts, plan.new)
            check(base, right, lambda one: {None})
            sides["base model"].append(figures(base))
            administrator = Administrator(port, files, begin, names, plan.pause)
            administrator.start()
            try:
                choose = _chooser(right, [*steady, *names, *names], steady, number)
                mixed = ask_for(plan.seconds, port, plan.clients, choose, prompts, plan.new)
            finally:
                administrator.stop()
            counts += check(mixed, right, lambda one, who=administrator: who.allowed(one.adapter, one.start, one.end))
            counts += Counter(administrator.counts)
            sides["adapters"].append(figures(mixed))
        result["rows"] = [{"side": side, **row} for side, rows in sides.items() for row in rows]
        result["changes_and_answers"] = dict(counts)
        for what in ("tokens_per_second", "latency_p50", "latency_p99"):
            ratios = [a[what] / b[what] for a, b in zip(sides["adapters"], sides["base model"], strict=True)]
            result[f"{what}_over_base"] = statistics.median(ratios)
    result["killed"] = kill(plan, site, prompts, right, files)
    return result


def prepare(plan: Plan, folder: Path, *, smoke: bool) -> tuple[list[AdapterRow], list[list[int]], Right]:
    """Model, empty store and a folder of each content; its rows, the prompts, and what is right."""
    workload = tiny_workload() if smoke else real_workload()
    model: Any = workload.load(torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer: Any = _tiny_tokenizer(model.config.vocab_size) if smoke else _real_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    adapters = RandomAdapters(list(targets(model)), plan.contents)
    weights = {name: module.weight.detach() for name, module in targets(model).items()}
    recipe = Recipe()
    factors = decompose(weights, 4, recipe)
    config = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    manifest = Manifest("", recipe.to_dict(), config, {name: sketch(found) for name, found in factors.items()})
    rows = [adapters.row(adapters.name(i)) for i in range(plan.contents)]
    with AdapterStore.create(folder / "scratch", manifest) as scratch:
        scratch.put_many(rows)
        for i, row in enumerate(rows):
            unpack(scratch, row.name, folder / f"content-{i}")
    AdapterStore.create(folder / "store", manifest).close()
    ids = _equal_prompts(workload.prompts, plan)
    right: dict[tuple[int | None, int], str | None] = {}
    for content in (None, *range(plan.contents)):
        with folded(model, factors, None if content is None else rows[content]):
            for number, text in enumerate(answers(model, tokenizer, ids, plan.new)):
                right[content, number] = text
    texts = {content: [right[content, n] for n in range(plan.prompts)] for content in (None, *range(plan.contents))}
    if len({tuple(some) for some in texts.values()}) != len(texts):
        raise WrongAnswer("two adapters answer alike, so mistaking one for the other would not show")
    return rows, ids.tolist(), right


def check(asked: Sequence[Asked], right: Right, allowed: Callable[[Asked], set[int | None]]) -> Counter[str]:
    """Count answers; raise WrongAnswer for one that no content allows, and for none."""
    counts: Counter[str] = Counter()
    for one in asked:
        contents = {None} if one.adapter is None else allowed(one)
        if one.status == 404 and one.adapter is not None and None in contents:
            counts["answers_that_there_is_no_such_adapter"] += 1
            continue
        if one.status != 200:
            raise WrongAnswer(f"{one.adapter}: a request was answered with {one.status or 'nothing'}")
        if one.adapter is not None:
            contents = contents - {None}
        texts = {right[content, one.prompt] for content in contents}
        if one.text not in texts:
            raise WrongAnswer(f"{one.adapter}, prompt {one.prompt}: got {one.text!r}, right is {texts}")
        counts["right_answers"] += 1
    if not counts["right_answers"]:
        raise WrongAnswer("nothing was answered")
    return counts


def figures(asked: Sequence[Asked]) -> dict[str, float]:
    """Latency in seconds, and tokens per second from the first request to the last answer."""
    done = [one for one in asked if one.status == 200]
    latencies = sorted(one.end - one.start for one in done)
    seconds = max(one.end for one in asked) - min(one.start for one in asked)
    return {
        "requests": len(asked),
        "tokens_per_second": sum(one.tokens for one in done) / seconds,
        "latency_p50": latencies[len(latencies) // 2],
        "latency_p99": latencies[int(0.99 * (len(latencies) - 1))],
    }


def kill(
    plan: Plan, site: Site, prompts: Sequence[Sequence[int]], right: Right, files: Sequence[Mapping[str, bytes]]
) -> dict[str, Any]:
    """kill -9 while clients ask and adapters are put, and what is there after a new start."""
    confirmed: dict[str, int] = {}
    with served(site) as (port, process):
        choose = _chooser(right, [None], {}, 0)
        asking = threading.Thread(target=ask_for, args=(3600, port, plan.clients // 2, choose, prompts, plan.new))
        asking.start()
        admin = Connection(port, ADMIN_KEY)
        try:
            for number in range(10 * plan.put):
                name, content = f"confirmed/{number}", number % plan.contents
                if number == plan.put:
                    threading.Timer(0.05, process.kill).start()
                if admin.put(name, files[content]) != 201:
                    raise WrongAnswer(f"{name} was not put")
                confirmed[name] = content
        except BROKEN:
            pass
        finally:
            process.kill()
            asking.join()
    if len(confirmed) < plan.put:
        raise WrongAnswer(f"only {len(confirmed)} adapters were put before the server was gone")
    with served(site) as (port, _):
        client = Connection(port, API_KEY)
        for name in confirmed:
            status, body = client.send("GET", f"/v1/models/{NAME}%3A{name.replace('/', '%2F')}")
            if status != 200 or body["id"] != f"{NAME}:{name}":
                raise WrongAnswer(f"{name} was confirmed and is gone: {status}")
        asked = 0
        for name, content in list(confirmed.items())[-2 * plan.contents :]:
            prompt = next(n for n in range(plan.prompts) if right[content, n] is not None)
            status, body = client.complete(name, prompts[prompt], plan.new)
            if status != 200 or body["choices"][0]["text"] != right[content, prompt]:
                raise WrongAnswer(f"{name} answers wrongly after a new start")
            asked += 1
    return {"confirmed": len(confirmed), "lost": 0, "asked_after_the_new_start": asked}


def _chooser(
    right: Right, names: Sequence[str | None], steady: Mapping[str, int], seed: int
) -> Callable[[int, int], tuple[str | None, int]]:
    """What a client asks for in its turn: an adapter, and a prompt to which all it may be have a clear answer."""
    prompts = sorted({prompt for _, prompt in right})
    clear = {c: [p for p in prompts if right[c, p] is not None] for c in {content for content, _ in right}}
    for_all = [p for p in prompts if all(right[c, p] is not None for c in clear)]
    if not for_all or not all(clear.values()):
        raise WrongAnswer("too few prompts have a clear answer")

    def choose(client: int, turn: int) -> tuple[str | None, int]:
        draw = random.Random(f"{seed} {client} {turn}")
        name = draw.choice(names)
        some = clear[None] if name is None else clear[steady[name]] if name in steady else for_all
        return name, draw.choice(some)

    return choose


def _equal_prompts(prompts: Callable[[int, int], Any], plan: Plan) -> Tensor:
    """[prompts, length], the first of those that are long enough."""
    batch = prompts(40 * plan.prompts, plan.length)
    full = batch.ids[batch.mask.all(1)].unique(dim=0)
    if len(full) < plan.prompts:
        raise ValueError(f"prompts: expected {plan.prompts} of {plan.length} tokens, got {len(full)}")
    return full[: plan.prompts]


def _files(folder: Path) -> dict[str, bytes]:
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {field: (folder / name).read_bytes() for field, name in names.items()}


def _real_tokenizer() -> Any:
    from examples.decoder import decoder_folder

    return AutoTokenizer.from_pretrained(decoder_folder(), local_files_only=True)


def _tiny_tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
