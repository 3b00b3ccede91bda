"""A correction of vLLM on CPUs: rows without an adapter get none."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def skip_rows_without_adapter() -> None:
    """Make vLLM's torch ops for LoRA skip the rows of index −1, if they do not; does nothing on other platforms.

    vLLM marks rows of the base model with −1. Its Triton kernels skip those; its torch ops, which the CPU uses, take
    them for an index from the end, so a request for the base that shares a batch with others is answered with the
    adapter in the last slot, without a word. What the first of the two products gives for such a row is set to 0, and
    with it what the second one adds.

    Source: https://github.com/vllm-project/vllm/pull/48421
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # TODO: remove with the first vLLM whose ops pass `_skips`, once older ones are not to be supported any more.
    try:
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu
    except ImportError as reason:
        _log.warning("cannot tell whether vLLM's LoRA on the CPU skips rows without an adapter: %s", reason)
        return

    if _skips(lora_ops.bgmv_shrink):
        return
    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output.masked_fill_((indices < 0)[:, None], 0.0)

    # The module of the wrapper has a name of its own for it.
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
    _log.info("vLLM's LoRA on the CPU is made to skip rows without an adapter")


def _skips(bgmv_shrink: Any) -> bool:
    output = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), output, torch.tensor([-1]), 1.0)
    return bool(output.item() == 0.0)
