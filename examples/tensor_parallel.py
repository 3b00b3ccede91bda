"""Tune a language model that is divided between processes (tensor parallelism) with LoRA-XS.

    torchrun --nproc-per-node 8 examples/tensor_parallel.py --model meta-llama/Llama-3.1-70B --dtype bfloat16 \\
        --train train.jsonl --output runs/tensor-parallel

All processes read the same rows. Each holds its part of the frozen weights; R is the same on all of them, bit by bit.
The loop is written out, because the Trainer keeps no optimiser states of models that are divided when they are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model with a tp_plan, or its name")
    parser.add_argument("--dtype", default="float32", help="of the frozen weights; R learns in float32")
    parser.add_argument("--train", required=True, help=".jsonl file of rows with a prompt and a response")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="the same on all processes")
    parser.add_argument("--output", required=True, help="folder of the adapter")
    given = parser.parse_args()

    # torch and transformers take seconds to import, --help should not.
    import torch
    import torch.distributed as dist
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.distributed import DistributedConfig

    from loraxs_ext.basis import across_ranks
    from loraxs_ext.peft import LoraXSConfig, gather_adapter

    divided = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype, distributed_config=divided)
    first = dist.get_rank() == 0
    torch.manual_seed(given.seed)

    config = LoraXSConfig(r=given.rank, lora_alpha=given.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with across_ranks():  # every process decomposes its share of the layers
        model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.lr)

    rows = [json.loads(line) for line in Path(given.train).read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['prompt']} {row['response']}{tokenizer.eos_token or ''}" for row in rows]
    for epoch in range(given.epochs):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(given.seed + epoch)).tolist()
        for start in range(0, len(order), given.batch):
            chosen = [texts[i] for i in order[start : start + given.batch]]
            batch = tokenizer(
                chosen, padding=True, truncation=True, max_length=given.max_length, return_tensors="pt"
            ).to(model.device)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if first:
                print(f"epoch {epoch}, row {start}: loss {loss.item():.4f}", flush=True)

    model.save_pretrained(given.output, state_dict=gather_adapter(model), is_main_process=first)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
