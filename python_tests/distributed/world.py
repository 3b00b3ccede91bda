"""Two processes of gloo that train in all ways; what they found goes to a file each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from loraxs_ext.peft import gather_adapter

from . import runs
from .ways import WAYS, batches, config, load_base, run, spread_ddp, spread_fsdp1, spread_fsdp2

WORLD = 2
WEIGHTS = "adapter_model.safetensors"


@contextmanager
def noting_broadcasts() -> Iterator[list[Tensor]]:
    """What DistributedDataParallel sends from the first process to the others."""
    sent: list[Tensor] = []
    send = dist._broadcast_coalesced

    def note(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        sent.extend(tensors)
        send(group, tensors, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "_broadcast_coalesced", note)
        yield sent


def broadcasts(folder: Path) -> dict[str, Any]:
    """Bytes that DDP sends when a model is wrapped and in a step, and how many of them are of the basis."""
    model = get_peft_model(load_base(folder / "base", "cpu"), config("EDoRA"))
    frozen = {b.data_ptr() for n, b in model.named_buffers() if "loraxs_" in n}
    kept = {n: b for n, b in model.named_buffers() if "loraxs_" not in n}
    with noting_broadcasts() as sent:
        wrapped = spread_ddp(model, "cpu").train()
        at_start = len(sent)
        ids = batches()[0, 0]
        for _ in range(2):
            wrapped(input_ids=ids, labels=ids).loss.backward()
    return {
        "frozen": len(frozen),
        "sent of them": sum(tensor.data_ptr() in frozen for tensor in sent),
        "in a step": sum(t.nbytes for t in sent[at_start:]) / 2,
        "other buffers": sum(b.nbytes for b in kept.values()),
    }


def sharded_state(folder: Path, adapters: Path) -> dict[str, Any]:
    """An FSDP2 model: what it holds, PEFT's own way to save it, and a load into it, of turned vectors too."""
    model = spread_fsdp2(
        get_peft_model(load_base(folder / "base", "cpu"), config("LoRA-XS", init_weights="zeros")), "cpu"
    )
    held = {n: type(p.data).__name__ for n, p in model.named_parameters() if "loraxs_R" in n}
    stored = load_file(adapters / "FSDP2" / "LoRA-XS" / WEIGHTS)
    set_peft_model_state_dict(model, dict(stored))
    model.eval()
    after = gather_adapter(model)
    # What is turned on both sides, the singular vectors and R, is the same adapter.
    turned = {}
    for name, tensor in stored.items():
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
        if name.endswith("sketch"):
            # Its last row are the singular values.
            turned[name] = torch.cat([tensor[:-1] * signs, tensor[-1:]])
        else:
            turned[name] = signs[:, None] * tensor * signs
    set_peft_model_state_dict(model, turned)
    model.eval()
    turned_back = gather_adapter(model)
    place = adapters / f"by PEFT {dist.get_rank()}"
    model.save_pretrained(str(place))
    mine = [n for n in after if n.endswith(".weight")]
    return {
        "held": held,
        "loaded": all(torch.equal(after[n], stored[n.replace(".default", "")]) for n in mine),
        "turned": max(float((turned_back[n] - after[n]).abs().max()) for n in mine),
        "by PEFT": {n: t.shape for n, t in load_file(place / WEIGHTS).items()},
    }


def nested_fsdp1(folder: Path) -> list[str]:
    """What PEFT takes for the adapter out of the complete state dict of a model whose blocks FSDP1 wraps one by one."""
    model = spread_fsdp1(get_peft_model(load_base(folder / "base", "cpu"), config("LoRA-XS")), "cpu")
    complete = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, complete):
        state_dict = model.state_dict()
    return list(get_peft_model_state_dict(model.module, state_dict=state_dict))


def loaded_under_tp(folder: Path, adapters: Path) -> dict[str, Any]:
    """An adapter that DDP trained, in a model that tensor parallelism divides; dropout; merging."""
    base = load_base(folder / "base", "cpu", **WAYS["TP"].base())
    model = PeftModel.from_pretrained(base, adapters / "DDP" / "LoRA-XS").eval()
    ids = batches()[0, 0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    errors = []
    for attempt in (model.merge_adapter, lambda: _drop_out_with_magnitude(folder)):
        with pytest.raises((TypeError, ValueError)) as refused:
            attempt()
        errors.append(str(refused.value))
    # Seeds that differ, as they may between processes that nobody seeded: the masks have to agree nevertheless.
    torch.manual_seed(dist.get_rank())
    dropping = get_peft_model(
        load_base(folder / "base", "cpu", **WAYS["TP"].base()), config("LoRA-XS", loraxs_dropout=0.5)
    )
    dropping.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in dropping.named_parameters() if p.requires_grad}
    return {"logits": logits, "errors": errors, "dropped": gradients}


def _drop_out_with_magnitude(folder: Path) -> None:
    base = load_base(folder / "base", "cpu", **WAYS["TP"].base())
    ids = batches()[0, 0]
    get_peft_model(base, config("EDoRA", loraxs_dropout=0.5)).train()(input_ids=ids)


def work(rank: int, folder: Path, port: int) -> None:
    """One process."""
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()}, MASTER_ADDR="127.0.0.1")
    # Caches that are not shared, so that only what the processes tell each other can agree.
    os.environ["LORAXS_CACHE"] = str(folder / f"cache{rank}")
    dist.init_process_group("gloo")
    adapters = folder / "adapters"
    torch.manual_seed(0)
    results = {
        "ways": run(folder, list(WAYS), "cpu", adapters),
        "broadcasts": broadcasts(folder),
        "nested": nested_fsdp1(folder),
    }
    dist.barrier()
    results |= {"sharded": sharded_state(folder, adapters), "tp": loaded_under_tp(folder, adapters)}
    if find_spec("tensorboard") is not None:
        results["runs"] = runs.train_all(folder)
    torch.save(results, folder / f"results{rank}")
    dist.destroy_process_group()
