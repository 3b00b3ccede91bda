"""ManyAdapters: one frozen model, and the R matrices of many adapters as the rows of one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSLayer, Route, Rows, following, initial_core
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.store import AdapterRow, RowLayout, Segment

from .template import TEMPLATE, check_template

# Arguments whose first dimension is the batch.
_BATCHED = {"input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"}


class ManyAdapters(nn.Module):
    """Trains many adapters in one forward and one backward pass.

    The adapters are the rows of one parameter: all R matrices of an adapter end to end. A batch takes the rows it
    needs, so its cost does not depend on how many there are; the gradient of `rows` is sparse and holds only these.

    Args:
        model: with one LoRA-XS adapter, the template: its targets, ranks, scaling, dropout and basis are those of every
            adapter, its own R is not used. All of it is frozen.
        names: of the adapters; a name's position is its slot.
        seeds: of each adapter's R at the start; None for the template's `init_seed`. An adapter starts as
            `get_peft_model` would start it alone with that seed.

    Attributes:
        rows: fp32 [S, layout.size] (fp64 for an fp64 base).
        layout: which numbers of a row belong to which module.

    Raises:
        ValueError: the template is not plain LoRA-XS, a name comes twice, or the seeds are not as many as the names.
    """

    def __init__(self, model: PeftModel, names: Sequence[str], *, seeds: Sequence[int] | None = None) -> None:
        super().__init__()
        layers = check_template(model)
        self.model = model.requires_grad_(False)
        self.names = tuple(names)
        self.slot_of: Mapping[str, int] = {name: slot for slot, name in enumerate(self.names)}
        if not names or len(self.slot_of) != len(names):
            raise ValueError(f"names: expected different names, at least one, got {list(names)!r:.200}")
        config = self.template_config
        self.seeds = (config.init_seed,) * len(self.names) if seeds is None else tuple(seeds)
        if len(self.seeds) != len(self.names):
            raise ValueError(f"seeds: expected one for each of {len(self.names)} adapters, got {len(self.seeds)}")
        self.layers = layers
        self._routes: dict[LoraXSLayer, Route] = {}
        self.layout = RowLayout(Segment(m.key, m.r[TEMPLATE], m.scaling[TEMPLATE]) for m in layers)
        started = {seed: self._start(config, seed) for seed in dict.fromkeys(self.seeds)}
        self.rows = nn.Parameter(torch.stack([started[seed] for seed in self.seeds]))

    @property
    def template_config(self) -> LoraXSConfig:
        """The configuration that all adapters share."""
        return cast(LoraXSConfig, self.model.peft_config[TEMPLATE])

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self.model.config

    def slots(self, names: Sequence[str | None]) -> Tensor:
        """int64 [rows]: the slot of every name; None is the plain model, −1.

        Raises:
            ValueError: a name is unknown.
        """
        unknown = [name for name in names if name is not None and name not in self.slot_of]
        if unknown:
            raise ValueError(f"names: expected names of the {len(self.names)} adapters, got {unknown[0]!r}")
        return torch.tensor([-1 if name is None else self.slot_of[name] for name in names], dtype=torch.int64)

    def forward(self, slots: Tensor, **inputs: Any) -> Any:
        """What the model gives for `inputs`, with row i adapted by the adapter slots[i].

        Args:
            slots: integers [rows] in [−1, S); −1 is the plain model.
            inputs: of the model, without labels; see `adapter_loss`.

        Raises:
            ValueError: slots out of range or not as many as the rows, or there are labels.
        """
        if inputs.get("labels") is not None:
            raise ValueError(
                "labels: expected None, because the model would average over the rows of all adapters; give the logits "
                "and the labels to adapter_loss"
            )
        for key in _BATCHED & inputs.keys():
            if isinstance(inputs[key], Tensor) and len(inputs[key]) != len(slots):
                raise ValueError(f"slots: expected one per row of {key}, {len(inputs[key])}, got {len(slots)}")
        with self.routed(slots):
            return self.model(**inputs)

    @contextmanager
    def routed(self, slots: Tensor) -> Iterator[None]:
        """Inside the context, row i of what `model` computes is adapted by the adapter slots[i]; see `forward`."""
        routes = self._route(slots)
        before, self._routes = self._routes, routes
        try:
            with following(routes):
                yield
        finally:
            self._routes = before

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """As transformers' own; what is recomputed in the backward pass takes the routes of its forward pass.

        Raises:
            ValueError: reentrant checkpoints, which cannot.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError("activation_checkpointing_kwargs: expected use_reentrant=False, got True")
        options["context_fn"] = lambda: (nullcontext(), following(self._routes))
        model: Any = self.model
        # Older versions of transformers know the second name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options, **more)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def version(self, name: str) -> int:
        """Grows whenever a row changes; KeyError if there is no such adapter. With `row`, a `store.RowSource`."""
        return self.row(name).version

    def row(self, name: str) -> AdapterRow:
        """The adapter as a store takes it, a view of its row; KeyError if there is none."""
        return AdapterRow(name, self.rows._version, self.layout, self.rows.detach()[self.slot_of[name]])

    def _route(self, slots: Tensor) -> dict[LoraXSLayer, Route]:
        if slots.dim() != 1 or slots.is_floating_point():
            raise ValueError(f"slots: expected integers [rows], got {slots.dtype} {list(slots.shape)}")
        present, place = slots.to(self.rows.device, torch.int64).unique(return_inverse=True)
        lowest, highest = present[[0, -1]].tolist() if len(present) else (-1, -1)
        if lowest < -1 or highest >= len(self.names):
            wrong = lowest if lowest < -1 else highest
            raise ValueError(f"slots: expected values in [-1, {len(self.names)}), got {wrong}")
        active = present[1:] if lowest == -1 else present
        local = (place - int(lowest == -1)).to(torch.int32)
        rows, routes = Rows(local), {}
        for layer, pages in zip(self.layers, self._pages(active), strict=True):
            dropout = layer.loraxs_dropout[TEMPLATE]
            p_drop = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            routes[layer] = Route(rows, pages, TEMPLATE, scale=layer.scaling[TEMPLATE], p_drop=p_drop)
        return routes

    def _pages(self, active: Tensor) -> Iterator[Tensor | None]:
        """[A, r, r] of every layer for the slots `active` [A]."""
        if not len(active):
            return (None for _ in self.layers)
        # One gather for all layers, and one gradient: an embedding whose words are adapters.
        taken = F.embedding(active, self.rows, sparse=True)
        parts = taken.split([segment.r**2 for segment in self.layout.segments], dim=1)
        return (p.view(-1, s.r, s.r) for p, s in zip(parts, self.layout.segments, strict=True))

    def _start(self, config: LoraXSConfig, seed: int) -> Tensor:
        init: Any = config.init_weights
        cores = [
            initial_core(s.r, init, std=config.init_std, seed=seed, key=s.key, dtype=layer.get_R(TEMPLATE).dtype)
            for s, layer in zip(self.layout.segments, self.layers, strict=True)
        ]
        return torch.cat([core.flatten() for core in cores]).to(self.layers[0].get_R(TEMPLATE).device)
