"""PEFT knows the method exactly once."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from loraxs_ext.peft import PEFT_TYPE, LoraXSConfig, LoraXSModel
from loraxs_ext.peft import register as register_module
from loraxs_ext.peft.register import register


def test_member_of_the_enum():
    assert PeftType.LORAXS is PEFT_TYPE is PeftType("LORAXS") is PeftType["LORAXS"]
    assert PEFT_TYPE in list(PeftType) and PEFT_TYPE == "LORAXS" and PEFT_TYPE.value == PEFT_TYPE.name == "LORAXS"
    assert "LORAXS" in list(PeftType) and len(set(PeftType)) == len(list(PeftType))
    assert pickle.loads(pickle.dumps(PEFT_TYPE)) is PEFT_TYPE is copy.deepcopy(PEFT_TYPE)


def test_registered_under_the_prefix_peft_derives():
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is LoraXSModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is LoraXSConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == LoraXSModel.prefix == f"{PEFT_TYPE.value.lower()}_"
    assert "lora_" not in LoraXSModel.prefix


def test_registering_again_changes_nothing():
    count = len(list(PeftType))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(LoraXSConfig, LoraXSModel)
        assert importlib.import_module(register_module.__module__)
    assert len(list(PeftType)) == count


def test_a_native_method_is_replaced_with_a_warning(monkeypatch):
    native = type("LoraXSModel", (), {"__module__": "peft.tuners.loraxs.model", "prefix": "loraxs_"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE, native)
    with pytest.warns(UserWarning, match=r"PEFT ships a method named LORAXS \(peft.tuners.loraxs.model\)"):
        register(LoraXSConfig, LoraXSModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is LoraXSModel
