"""How the next token of each request is chosen, in a batch in which every request may want it otherwise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: 0 for the most likely token, which leaves the logits untouched.
        top_p: the smallest set of tokens with at least this probability is left.
        top_k: so many most likely tokens are left; 0 for all.
        seed: the same seed, prompt, adapter and logits give the same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Sampler(ContinuousBatchingLogitsProcessor):
    """Makes the largest score the chosen token, by noise that only depends on the request and the position.

    Continuous batching either samples all requests or none. It is told to take the largest score, and adding Gumbel
    noise to logits makes that a sample of their softmax. A request at temperature 0 gets no noise.

    What was prepared is kept on the host until the next call, so batches have to be computed one after the other.
    """

    supported_kwargs: dict[str, type] = {"sampling": Sampling}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._rows: list[tuple[Sampling, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is kept in the tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Note what the rows of the next scores ask for; returns an empty tensor."""
        states = [request.state for request in requests_with_new_token]
        self._rows = [(state.logit_processor_kwargs["sampling"], state.position_offset) for state in states]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores [at least requests, vocabulary], overwritten in the rows that sample."""
        for row, (sampling, position) in enumerate(self._rows):
            if sampling.temperature > 0:
                scores[row] = perturbed(scores[row], sampling, position)
        return scores


def processors() -> ContinuousBatchingLogitsProcessorList:
    """What a manager of continuous batching wants in the place of its own processors."""
    found = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))
    # One line of its table of arguments, which it wants even if nothing is in it.
    found.tensors_required = 1
    return found


def perturbed(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    """Scores whose largest is a sample.

    Args:
        logits: fp32 [vocabulary].
        sampling: with a temperature above 0.
        position: of the token in its sequence.
    """
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(0)
        # A token stays if those before it don't reach top_p; the first one always does.
        beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p
        beyond[0] = False
        scores[order[beyond]] = -torch.inf
    digest = hashlib.blake2b(f"{sampling.seed} {position}".encode(), digest_size=4).digest()
    generator = torch.Generator(scores.device).manual_seed(int.from_bytes(digest, "little"))
    waiting = torch.empty_like(scores).exponential_(generator=generator)
    return scores - waiting.clamp_min_(torch.finfo(waiting.dtype).tiny).log_()
