"""One decomposition of a model, shared between the processes of torch.distributed.

Every weight has one owner, which follows from the shapes alone. Owners decompose their weights and broadcast the
factors, so all processes hold the same bits. A sharded weight (DTensor of FSDP2 or tensor parallelism) is gathered when
its turn comes and dropped by all but its owner: no process ever holds more than two complete weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .decomposition import decompose
from .factors import Factors
from .recipe import Recipe

_active: list[dist.ProcessGroup | None] = []
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Lanczos vectors beyond the rank, for the estimate of the cost.
_OVERHEAD = 32


@contextlib.contextmanager
def across_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within this context, LoRA-XS bases are computed once by all processes of `group` together.

        with across_ranks():
            model = get_peft_model(model, LoraXSConfig(...))

    Every process of the group must enter it and add the same adapters to the same model; hence it is never implied: a
    program may well prepare a model on its first process only. Without effect where there is one process.

    Args:
        group: of torch.distributed; all processes if None.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not is_running():
        raise RuntimeError("across_ranks needs torch.distributed: call torch.distributed.init_process_group first")
    _active.append(group if group is not None else dist.group.WORLD)
    try:
        yield
    finally:
        _active.pop()


def is_running() -> bool:
    """Whether this is one of the processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def active_group() -> dist.ProcessGroup | None:
    """The group of the innermost `across_ranks`; None outside of it, or if it has one process."""
    group = _active[-1] if _active else None
    return group if group is not None and dist.get_world_size(group) > 1 else None


def is_sharded(weight: object) -> bool:
    """Whether this is a DTensor; without importing what may never have been used."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def gather(sharded: Any) -> Tensor:
    """The complete tensor of a DTensor; collective over the processes of its mesh."""
    return sharded.detach().full_tensor()


def split_by_cost(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int] | int, parts: int) -> list[list[str]]:
    """The names each of `parts` owners decomposes: the costliest first, each to whoever has least to do so far.

    Args:
        shapes: (N, K) by name.
        ranks: by name, or one for all.
        parts: number of owners.
    """

    def cost(name: str) -> int:
        rank = ranks if isinstance(ranks, int) else ranks[name]
        return shapes[name][0] * shapes[name][1] * (rank + _OVERHEAD)

    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(shapes, key=lambda name: (-cost(name), name)):
        owner = loads.index(min(loads))
        shares[owner].append(name)
        loads[owner] += cost(name)
    return shares


def decompose_across(
    weights: Mapping[str, Tensor | Callable[[], Tensor]],
    ranks: Mapping[str, int] | int,
    recipe: Recipe | None = None,
    *,
    shapes: Mapping[str, tuple[int, int]],
    group: dist.ProcessGroup | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    compute_device: torch.device | str | None = None,
) -> dict[str, Factors]:
    """`decompose` of a model that every process of `group` has, or has a shard of; a collective call.

    Args:
        weights: by name. A DTensor is gathered by all processes of its mesh; a function is called by the owner only.
        ranks, recipe, cache_dir, compute_device: see `decompose`.
        shapes: (N, K) by name.
        group: of torch.distributed; all processes if None.
        progress: show the bar of the first process.

    Returns:
        Factors by name on the CPU, with the same bits on every process.

    Raises:
        What `decompose` raises, on the owner of the weight; RuntimeError that quotes it on all others.
    """
    me = dist.get_rank(group)
    shares = split_by_cost(shapes, ranks, dist.get_world_size(group))
    found: dict[str, Factors] = {}

    def compute(share: Mapping[str, Tensor | Callable[[], Tensor]]) -> None:
        places: dict[str, Any] = {"device": "cpu", "compute_device": compute_device}
        found.update(decompose(share, ranks, recipe, cache_dir=cache_dir, progress=progress and me == 0, **places))

    failure: Exception | None = None
    try:
        compute({name: weights[name] for name in shares[me] if not is_sharded(weights[name])})
    except Exception as error:  # raised below, when no other process waits for this one any more
        failure = error
    sharded = [[name for name in share if is_sharded(weights[name])] for share in shares]
    for turn in range(max(map(len, sharded), default=0)):
        mine = _gather_turn(weights, [share[turn] if turn < len(share) else None for share in sharded], me)
        try:
            if failure is None:
                compute(mine)
        except Exception as error:
            failure = error
        # Before the next ones are gathered.
        mine.clear()
    raise_together(failure, group)
    return broadcast_factors(found, {name: i for i, share in enumerate(shares) for name in share}, shapes, group)


def _gather_turn(
    weights: Mapping[str, Tensor | Callable[[], Tensor]], turn: Sequence[str | None], me: int
) -> dict[str, Tensor]:
    """Gather one weight per owner; the result holds that of this process."""
    mine: dict[str, Tensor] = {}
    for owner, name in enumerate(turn):
        if name is not None:
            full = gather(weights[name])
            if owner == me:
                mine[name] = full
            del full
    return mine


def raise_together(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise `failure` on the process that had one, and on all others a RuntimeError that quotes it."""
    me, device = dist.get_rank(group), _device(group)
    text = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    lengths[me] = len(text)
    dist.all_reduce(lengths, group=group)
    failed = lengths.nonzero().flatten().tolist()
    if not failed:
        return
    quoted = torch.zeros(int(lengths[failed[0]]), dtype=torch.uint8, device=device)
    if me == failed[0]:
        quoted.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(quoted, _global_rank(group, failed[0]), group=group)
    if failure is not None:
        raise failure
    raise RuntimeError(f"process {failed[0]} of the group failed: {bytes(quoted.tolist()).decode(errors='replace')}")


def broadcast_factors(
    mine: Mapping[str, Factors],
    owners: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    group: dist.ProcessGroup | None,
) -> dict[str, Factors]:
    """All factors on every process, on the CPU; collective.

    Args:
        mine: the factors this process owns.
        owners: name -> owner, in the order of the result.
        shapes: (N, K) by name.
        group: of torch.distributed.
    """
    device, names = _device(group), list(shapes)
    # Rank, dtype, and the fingerprint with its presence, from each owner.
    facts = torch.zeros(len(names), 4, dtype=torch.int64, device=device)
    errors = torch.zeros(len(names), dtype=torch.float64, device=device)
    for i, name in enumerate(names):
        if name in mine:
            found = mine[name]
            hashed = int(found.fingerprint or "0", 16)
            signed = hashed - (1 << 64) if hashed >> 63 else hashed
            kind, known = _DTYPES.index(found.a.dtype), int(found.fingerprint is not None)
            facts[i] = torch.tensor([len(found.s), kind, known, signed])
            errors[i] = found.subspace_error
    dist.all_reduce(facts, group=group)
    dist.all_reduce(errors, group=group)
    result = {}
    for name, (rank, kind, known, signed), error in zip(names, facts.tolist(), errors.tolist(), strict=True):
        N, K = shapes[name]
        flat = torch.empty(rank * (K + N + 1), dtype=_DTYPES[kind], device=device)
        if name in mine:
            flat.copy_(torch.cat([part.flatten() for part in mine[name][:3]]))
        dist.broadcast(flat, _global_rank(group, owners[name]), group=group)
        a, bt, s = flat.cpu().split([rank * K, rank * N, rank])
        fingerprint = f"{signed % (1 << 64):016x}" if known else None
        result[name] = Factors(a.view(rank, K).clone(), bt.view(rank, N).clone(), s.clone(), error, fingerprint)
    return result


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie to be sent."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
