"""An adapted model whose base weights stay on disk: its layers are given theirs one by one, and lose them again."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from loraxs_ext.files import read_json
from loraxs_ext.layers import LoraXSLayer, LoraXSLinear
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.bases import AdapterBasis
from loraxs_ext.peft.patterns import check_patterns
from loraxs_ext.peft.transport import anchors_path
from loraxs_ext.peft.verify import Mismatch, is_foreign, report

from .model_folder import Target, WeightStream, empty_model, locate, model_config

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# R, rows of an embedding, and copies of base weights that PEFT stores with adapters of an output embedding.
_NOT_BROUGHT = (".loraxs_", ".token_adapter.", ".base_layer.weight")
# The tensor of a head that has one row a label.
_HEAD = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises:
        ValueError: the folder is not that of an adapter in safetensors, or has patterns that PEFT could match for ever.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"ADAPTER must be a folder of an adapter, got {folder} without {ADAPTER_CONFIG}")
    fields = read_json(path)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} must hold {ADAPTER_WEIGHTS}; pickled adapters are not read, save it again")
    try:
        check_patterns(fields)
    except ValueError as reason:
        raise ValueError(f"{path}: {reason}") from None
    return fields


def empty_base(base: Path, adapter: Path) -> nn.Module:
    """The model that the adapter in `adapter` belongs to, on the meta device, from the folder of its base.

    Its class is the one that the adapter names, or that its task asks for, which the folder of the base may know
    nothing of: a classifier has its head from the adapter, and as many labels as that has rows.
    """
    fields, config = read_adapter_config(adapter), model_config(base)
    named = fields.get("auto_mapping")
    name = named.get("base_model_class") if isinstance(named, dict) else None
    if fields.get("task_type") in _TASKS:
        name = _TASKS[fields["task_type"]]
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and (issubclass(known, transformers.PreTrainedModel) or name in _TASKS.values())):
        name = None
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        heads = [file.get_slice(key).get_shape() for key in file.keys() if _HEAD.search(key)]  # noqa: SIM118
    labels = heads[0][0] if heads and len(heads[0]) == 2 else config.num_labels
    if fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and config.num_labels != labels:
        config.num_labels = labels
    return empty_model(base, config, name)


@dataclass(eq=False)
class StreamedBasis(AdapterBasis):
    """The policy of an adapter whose layers have their weights one after the other.

    Args:
        sketches: of all layers that have no stored basis, by key.

    Attributes:
        mismatches: of the layers that were settled.
    """

    sketches: Mapping[str, Tensor] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)

    def finish(self) -> None:
        """Say once what loading would have said, after the worst of all layers."""
        report(self.adapter, self.mismatches, self.check, self.tol, self.recipe.tol)

    def _judge(self, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches += mismatches
        if any(is_foreign(mismatch, self.tol) for mismatch in mismatches) and self.check == "error":
            self.finish()

    def _anchors_path(self, sketches: Mapping[str, Tensor]) -> Path:
        return anchors_path(self.sketches, self.recipe)

    def _remember(self, *_: Any) -> None:
        # Whoever trains on the basis, or loads the adapter to use it, does.
        pass


class StreamedModel:
    """A PeftModel on the meta device whose adapter, heads included, is real.

    Args:
        folder: of the base model.
        model: adapted; its base weights are on the meta device.
        adapter: name of the adapter.
        others: what the adapter stores beside R, under its stored names.

    Attributes:
        targets: where the weights of its layers lie, in the order of the shards.
        layers: by key.

    Raises:
        TypeError: a layer is not linear.
        ValueError: the folder lacks a weight.
    """

    def __init__(
        self, folder: Path, model: PeftModel, adapter: str = "default", others: Mapping[str, Tensor] | None = None
    ) -> None:
        self.folder, self.model, self.adapter, self.others = folder, model, adapter, others or {}
        modules = [module for module in model.modules() if isinstance(module, LoraXSLayer)]
        self.layers = {module.key: module for module in modules if adapter in module.loraxs_R}
        for layer in self.layers.values():
            if type(layer) is not LoraXSLinear:
                raise TypeError(
                    f"{layer.key}: expected a linear layer, whose weight can be read by itself, got "
                    f"{type(layer).__name__}; load the whole model instead"
                )
        self.base: nn.Module = cast(Any, model).base_model.model
        self.targets = locate(folder, self.base, list(self.layers.values()))
        cores = {key: layer.core(adapter) for key, layer in self.layers.items()}
        sketches = {key: core.recorded_sketch for key, core in cores.items() if core.stored_basis is None}
        plain = cast(AdapterBasis, next(iter(self.layers.values())).basis_policy[adapter])
        options = (plain.adapter, plain.recipe, plain.check, plain.tol, plain.basis_file)
        self.policy = StreamedBasis(*options, sketches=sketches)
        for layer in self.layers.values():
            layer.basis_policy[adapter] = self.policy
        self._stream = WeightStream()

    @classmethod
    def open(cls, base: Path, adapter: Path) -> StreamedModel:
        """Build the model of the folder `base`, and load the adapter in `adapter` into it.

        Raises:
            ValueError: one of the folders is not what it should be, or the two do not fit each other.
        """
        fields = read_adapter_config(adapter)
        if fields.get("peft_type") != "LORAXS":
            raise ValueError(f"{adapter} must hold a LoRA-XS adapter, got one of type {fields.get('peft_type')!r}")
        try:
            config = LoraXSConfig.from_pretrained(str(adapter))
        except (TypeError, AttributeError, KeyError) as reason:
            raise ValueError(f"{adapter / ADAPTER_CONFIG} cannot be understood: {reason}") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT notes the name of the base in the configuration, and the base has another one here.
            warnings.filterwarnings("ignore", ".*base_model_name_or_path.*")
            model = get_peft_model(empty_base(base, adapter), config, low_cpu_mem_usage=True)
            config.base_model_name_or_path = fields.get("base_model_name_or_path")
            tensors = load_file(adapter / ADAPTER_WEIGHTS)
            missing = load_tensors(model, tensors, "default", assign=True)
        lacking = [name for name, tensor in model.named_parameters() if "loraxs_" in name and tensor.is_meta]
        if missing or lacking:
            name = next(iter([*missing, *lacking]))
            raise ValueError(f"the adapter in {adapter} does not fit the model in {base}: it lacks {name}")
        others = {name: tensor for name, tensor in tensors.items() if ".loraxs_" not in name}
        return cls(base, model.eval(), others=others)

    @contextlib.contextmanager
    def at(self, target: Target) -> Iterator[LoraXSLayer]:
        """The layer of `target` with its weight, and with R settled on its basis; it loses both on leaving.

        Raises:
            ValueError: R was trained on another basis; as in loading.
        """
        layer = self.layers[target.key]
        base: Any = layer.get_base_layer()
        weight = self._stream.read(target)
        base.weight = nn.Parameter(weight.mT if layer.fan_in_fan_out else weight, requires_grad=False)
        del weight
        try:
            layer.settle(self.adapter)
            yield layer
        finally:
            base.weight = nn.Parameter(torch.empty_like(base.weight, device="meta"), requires_grad=False)
            layer.loraxs_A = layer.loraxs_Bt = None
            layer.unmerged_weight.clear()
            layer.merged_adapters.clear()
            # What a trained magnitude needs to know of the weight is as large as the basis.
            norms: Any = getattr(layer, "loraxs_norms", {})
            norms.clear()

    def visit(self, *, progress: bool = True) -> Iterator[LoraXSLayer]:
        """Each layer in its turn, as in `at`, in the order of the shards; then `finish`."""
        for target in tqdm(self.targets, desc="modules", unit="module", disable=None if progress else True):
            with self.at(target) as layer:
                yield layer
        self.finish()

    def finish(self) -> None:
        """Let go of the files, and say once what loading would have said."""
        self.close()
        self.policy.finish()

    def close(self) -> None:
        """Let go of the files."""
        self._stream.close()

    def brought(self) -> dict[str, Tensor]:
        """What the adapter replaces beside the weights of its layers, heads and biases, by name in the base model."""
        names = re.compile(rf"\.base_layer(?=\.)|\.modules_to_save\.{re.escape(self.adapter)}(?=\.)")
        return {
            names.sub("", name): tensor
            for name, tensor in self.base.state_dict().items()
            if not tensor.is_meta and not any(part in name for part in _NOT_BROUGHT)
        }


def load_tensors(model: PeftModel, tensors: Mapping[str, Tensor], adapter: str, *, assign: bool = False) -> list[str]:
    """Load stored tensors into an adapter of `model`; the names of its R matrices that are not among them.

    Args:
        model: with the adapter.
        tensors: under the names that PEFT stores them by.
        adapter: its name.
        assign: take the tensors themselves, in the place of those on the meta device.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    try:
        result: Any = set_peft_model_state_dict(model, tensors, adapter, low_cpu_mem_usage=assign)
    except (KeyError, RuntimeError) as reason:
        # One line for every tensor; any of them tells.
        raise ValueError(f"the adapter does not fit the model: {str(reason).splitlines()[-1].strip()}") from None
    if result.unexpected_keys:
        raise ValueError(f"the adapter does not fit the model, which has no place for {result.unexpected_keys[0]}")
    return [name for name in result.missing_keys if f"loraxs_R.{adapter}." in name]
