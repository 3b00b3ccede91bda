"""Trainer, torch.compile, transformers' own adapter methods, distributed training."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from .models import CASES, Case, layers_of, logits, train


def arguments(path, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(path),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "dataloader_num_workers": 0,
    }
    return TrainingArguments(**{**options, **changes})


def rows(case: Case) -> list[dict[str, torch.Tensor]]:
    inputs, labels = case.inputs(8), case.labels(8)
    return [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(8)]


def cores(model) -> list[torch.Tensor]:
    return [layer.loraxs_R["default"].weight.detach().clone() for layer in layers_of(model)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_trainer_resumes_where_it_stopped(bert: Case, tmp_path):
    data = rows(bert)
    whole = bert.model(loraxs_dropout=0.1)
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=data).train()
    assert not equal(cores(whole), cores(bert.model()))

    resumed = bert.model(loraxs_dropout=0.1)
    Trainer(resumed, arguments(tmp_path / "again"), train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert equal(cores(resumed), cores(whole))


def test_trainer_loads_the_best_model(bert: Case, tmp_path):
    model = bert.model()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    # A rate that makes things worse: the best checkpoint is not the last state.
    trainer = Trainer(
        model,
        arguments(tmp_path, learning_rate=5.0, lr_scheduler_type="constant", **options),
        train_dataset=rows(bert),
        eval_dataset=rows(bert),
    )
    trainer.train()
    best = PeftModel.from_pretrained(bert.base(), trainer.state.best_model_checkpoint)
    assert equal(cores(best), cores(trainer.model))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiled_model_trains_and_serves(name):
    torch._dynamo.reset()
    case = CASES[name]
    model = case.model(loraxs_dropout=0.2)
    eager = logits(model, case.inputs())
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, case.inputs()), eager, rtol=1e-4, atol=1e-4)
    model.train()
    compiled(**case.inputs()).logits.square().mean().backward()
    assert all(layer.loraxs_R["default"].weight.grad.any() for layer in layers_of(model))


def test_loading_into_a_compiled_model_does_not_break_it(llama: Case, tmp_path):
    torch._dynamo.reset()
    trained = llama.model()
    train(trained, llama)
    trained.save_pretrained(tmp_path)
    model = llama.model()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    logits(compiled, llama.inputs())
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    model.eval()
    with torch._dynamo.config.patch(error_on_recompile=True):
        swapped = logits(compiled, llama.inputs())
    torch.testing.assert_close(swapped, logits(trained, llama.inputs()), rtol=1e-5, atol=1e-5)


def test_transformers_adapter_methods(case: Case, tmp_path):
    # Without a head of its own: not every transformers release loads modules_to_save this way.
    config = case.config(task_type=None)
    model = case.base()
    base = logits(model, case.inputs())
    model.add_adapter(config, "first")
    train(model, case)
    first = logits(model, case.inputs())
    model.save_pretrained(tmp_path)
    model.add_adapter(case.config(r=6, task_type=None), "second")
    assert not torch.equal(logits(model, case.inputs()), first)
    model.set_adapter("first")
    assert torch.equal(logits(model, case.inputs()), first)
    model.disable_adapters()
    assert torch.equal(logits(model, case.inputs()), base)
    model.enable_adapters()
    model.delete_adapter("second")

    loaded = case.base()
    loaded.load_adapter(str(tmp_path), "mine")
    assert torch.equal(logits(loaded, case.inputs()), first)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs()), first)


def test_pretrained_with_adapter_on_top(llama: Case, tmp_path):
    llama.base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, llama.config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert layers_of(loaded) and torch.equal(logits(loaded, llama.inputs()), logits(model, llama.inputs()))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_leaves_the_basis_alone(llama: Case, one_process):
    model = llama.model().train()
    wrapped = DistributedDataParallel(model)
    buffers = {name for name, _ in model.named_buffers() if "loraxs_" in name}
    assert buffers == set(model._ddp_params_and_buffers_to_ignore)
    assert buffers <= wrapped.parameters_to_ignore and len(buffers) == 3 * len(layers_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped(**llama.inputs(), labels=llama.labels()).loss.backward()
    assert all(layer.loraxs_R["default"].weight.grad.any() for layer in layers_of(model))


def test_base_that_is_offloaded(case: Case):
    base = case.base()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in base.parameters())
    model = get_peft_model(base, case.config(task_type=None)).eval()
    expected = logits(case.model(task_type=None), case.inputs())
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-5, atol=1e-5)


def test_base_that_arrives_later(llama: Case):
    """A model built on the meta device gets its bases with the first call after its weights."""
    with torch.device("meta"):
        empty = llama.build()
    model = get_peft_model(empty, llama.config())
    reference = llama.model()
    assert not any(layer.basis_rank for layer in layers_of(model))
    real = llama.base()
    weights = {k.replace("base_model.model.", ""): v for k, v in reference.state_dict().items()}
    model.base_model.model.load_state_dict(weights, assign=True)
    for name, buffer in real.named_buffers():
        module, _, leaf = name.rpartition(".")
        model.base_model.model.get_submodule(module)._buffers[leaf] = buffer
    assert torch.equal(logits(model.eval(), llama.inputs()), logits(reference, llama.inputs()))
