"""vLLM on the CPU as a peer: tokens/s with 0, 1 and 16 adapters in a batch of 16, against its own base, beside ours.

    make vllm-check                                       makes .venv-vllm
    .venv-vllm/bin/python -m benchmarks.vllm_peer         some minutes; writes benchmarks/results/vllm-cpu.json
    .venv-vllm/bin/python -m benchmarks.vllm_peer --smoke two rounds of few tokens; no figures

The decoder, prompts, adapters and dtype (fp32) are the same for both. vLLM runs them as the plugin gives them to it, as
plain LoRA; we run R in `AdapterPool` and transformers' generate(). Every token of vLLM is checked against our logits
before anything is timed. A ratio is one of two times of the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import RESULTS, environment, ratio, write_json
from examples.decoder import decoder_folder, load_decoder, load_decoder_tokenizer
from loraxs_ext import LoraXSConfig
from loraxs_ext.basis import Recipe
from loraxs_ext.checkpoint.model_folder import find_targets
from loraxs_ext.serve import AdapterPool
from loraxs_ext.serve.vllm.plain_lora import Bases, write
from loraxs_ext.serve.vllm.plugin import ADAPTERS
from loraxs_ext.serve.vllm.sources import Found
from loraxs_ext.store import AdapterRow, RowLayout, Segment

ROWS, RANK, STD = 16, 16, 0.05
PROMPT, NEW, ROUNDS = 32, 32, 5
SMOKE_NEW, SMOKE_ROUNDS = 4, 2
COUNTS = (0, 1, 16)
# How far below our largest logit a token of vLLM may lie: what another order of sums makes of fp32 logits up to 30.
TIE = 2e-3
TEXT = "A film that is as warm as it is wise, and a cast that never lets a single scene go to waste, whatever happens."


class Shelf:
    """Adapters of independent normal numbers, in memory; a `RowSource`."""

    def __init__(self, keys: Sequence[str]) -> None:
        layout = RowLayout(Segment(key, RANK) for key in keys)
        generator = torch.Generator().manual_seed(0)
        numbers = STD * torch.randn(ROWS, layout.size, generator=generator)
        self.rows = {f"user{i}": AdapterRow(f"user{i}", 1, layout, numbers[i]) for i in range(ROWS)}

    def version(self, name: str) -> int:
        return self.rows[name].version

    def row(self, name: str) -> AdapterRow:
        return self.rows[name]


def names_of(count: int) -> list[str | None]:
    """The adapter of each row of the batch: `count` of them, in turns; None for the base."""
    return [f"user{i % count}" if count else None for i in range(ROWS)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few tokens, two rounds; no figures")
    parser.add_argument("--output", type=Path, default=RESULTS / "vllm-cpu.json", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    new, rounds = (SMOKE_NEW, SMOKE_ROUNDS) if arguments.smoke else (NEW, ROUNDS)
    base = decoder_folder()
    # Not as many sequences of the same length that it could be a coincidence: each prompt begins elsewhere in the text.
    ids = load_decoder_tokenizer(base)(TEXT * 4)["input_ids"]
    prompts = torch.tensor([ids[i : i + PROMPT] for i in range(ROWS)])
    config = LoraXSConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    shelf = Shelf([target.key for target in find_targets(base, config)])
    pool = AdapterPool(load_decoder(folder=base), shelf, slots=ROWS, adapter_config=config)
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(base, expand(shelf, base, Path(folder)))
        misses = {}
        for count in COUNTS:
            names = names_of(count)
            misses[count] = check(pool, prompts, names, engines.generate(prompts, names, new))
            print(
                f"vLLM, {count} adapters: its tokens miss our largest logit by at most {misses[count]:.2g}", flush=True
            )
        sides: dict[str, Callable[[], Any]] = {"vLLM without LoRA": lambda: engines.generate(prompts, None, new)}
        sides |= {f"vLLM {n}": lambda n=n: engines.generate(prompts, names_of(n), new) for n in COUNTS}
        sides |= {f"loraxs {n}": lambda n=n: ours(pool, prompts, names_of(n), new) for n in COUNTS}
        samples = alternate(sides, rounds)
    rows = []
    for side in sides:
        provider, _, count = side.partition(" ")
        own_base = "vLLM without LoRA" if provider == "vLLM" else "loraxs 0"
        row = {
            "provider": provider,
            "adapters": int(count) if count.isdigit() else None,
            "tokens_per_second": ROWS * new / statistics.median(samples[side]),
            "over_own_base": 1 / ratio(samples, side, own_base),
            "seconds": samples[side],
        }
        rows.append(row)
        if not arguments.smoke:
            print(f"{side}: {row['tokens_per_second']:.1f} tokens/s, {row['over_own_base']:.3f} of its own base")
    if arguments.smoke:
        return
    setting = {"dtype": "float32", "batch": ROWS, "rank": RANK, "prompt_tokens": PROMPT, "new_tokens": new}
    told = environment() | {"vllm": engines.version, "vllm_cores": os.environ["VLLM_CPU_OMP_THREADS_BIND"]}
    checked = {f"{count} adapters: misses our largest logit by": miss for count, miss in misses.items()}
    write_json(arguments.output, {"environment": told, "setting": setting, "checks": checked, "rows": rows})
    print(f"written to {arguments.output}")


def expand(shelf: Shelf, base: Path, folder: Path) -> dict[str, Path]:
    """A folder of a plain LoRA for each adapter."""
    bases, recipe = Bases(base), Recipe()
    paths = {}
    for name, row in shelf.rows.items():
        _, sketches = bases.get({segment.key: segment.r for segment in row.layout.segments}, recipe)
        paths[name] = folder / name
        write(Found(row, recipe, sketches), bases, paths[name], str(base))
    return paths


class Engines:
    """vLLM twice, without LoRA and with it.

    Args:
        base: folder of the model.
        adapters: folder of a plain LoRA by name.
    """

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # For the correction that the plugin makes: without it, rows without adapter are answered with one.
        os.environ[ADAPTERS] = str(next(iter(adapters.values())).parent)
        # All cores, which is what we have, too.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        import vllm
        from vllm.lora.request import LoRARequest

        self.version = vllm.__version__
        common: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
        common |= {"max_num_seqs": ROWS, "enable_prefix_caching": False, "disable_log_stats": True}
        lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": ROWS, "max_cpu_loras": ROWS}
        self._plain, self._lora = vllm.LLM(str(base), **common), vllm.LLM(str(base), **common, **lora)
        self._requests = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(adapters.items())}

    def generate(self, prompts: Tensor, names: Sequence[str | None] | None, new: int) -> Tensor:
        """Greedy tokens [rows, new]; with None for `names` without LoRA."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        inputs = [TokensPrompt(prompt_token_ids=row) for row in prompts.tolist()]
        options: dict[str, Any] = {"use_tqdm": False}
        if names is not None:
            options["lora_request"] = [None if name is None else self._requests[name] for name in names]
        outputs = (self._plain if names is None else self._lora).generate(inputs, parameters, **options)
        return torch.tensor([list(output.outputs[0].token_ids) for output in outputs])


@torch.inference_mode()
def ours(pool: AdapterPool, prompts: Tensor, names: Sequence[str | None], new: int) -> Tensor:
    """Greedy tokens [rows, new] of transformers' generate()."""
    model: Any = pool.model
    with pool.adapters(names):
        found = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
    return found[:, prompts.shape[1] :]


@torch.inference_mode()
def check(pool: AdapterPool, prompts: Tensor, names: Sequence[str | None], tokens: Tensor) -> float:
    """By how much tokens of vLLM miss our largest logit, at worst.

    Raises:
        SystemExit: by more than `TIE`.
    """
    model: Any = pool.model
    with pool.adapters(names):
        logits = model(input_ids=torch.cat([prompts, tokens], 1)).logits[:, prompts.shape[1] - 1 : -1].float()
    missed = float((logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]).max())
    if missed > TIE:
        raise SystemExit(f"vLLM's tokens are not ours: one misses our largest logit by {missed:.3g}, allowed {TIE}")
    return missed


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side, one call a round, in turns; each is called once before."""
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for call in sides.values():
        call()
    for _ in range(rounds):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            samples[side].append(time.perf_counter() - start)
    return samples


if __name__ == "__main__":
    main()
