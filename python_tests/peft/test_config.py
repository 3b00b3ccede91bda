"""The configuration refuses what cannot work, in words that help."""

from __future__ import annotations

import pytest
from peft import PeftConfig

from loraxs_ext.basis import Recipe
from loraxs_ext.peft import LoraXSConfig


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("r", 0, "r: expected a positive integer, got 0"),
        ("rank_pattern", {"q": -1}, r"rank_pattern\['q'\]: expected a positive integer, got -1"),
        ("loraxs_dropout", 1.0, r"loraxs_dropout: expected a probability in \[0, 1\), got 1.0"),
        ("bias", "lora_only", "bias: expected .* got 'lora_only'"),
        ("init_weights", "gaussian", "init_weights: expected .* got 'gaussian'"),
        ("init_std", -1.0, "init_std: expected .* got -1.0"),
        ("basis_check", "maybe", "basis_check: expected .* got 'maybe'"),
        ("basis_tol", 0.0, "basis_tol: expected a positive number, got 0.0"),
        ("edora_norm", "none", "edora_norm: expected 'detached' or 'differentiated', got 'none'"),
        ("sigma", "C", "sigma must be one of .* got 'C'"),
        ("vectors", "all", "vectors must be one of .* got 'all'"),
        ("svd_tol", 2.0, "tol must lie between 0 and 1, got 2.0"),
        ("sketch_version", 99, "sketch_version 99"),
        ("layers_pattern", "h", "layers_pattern: expected layers_to_transform"),
    ],
)
def test_wrong_values(field, value, error):
    with pytest.raises(ValueError, match=error):
        LoraXSConfig(**{field: value})


@pytest.mark.parametrize("value", [4.0, "4", True])
def test_ranks_are_integers(value):
    with pytest.raises(TypeError, match="r: expected an int"):
        LoraXSConfig(r=value)


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("lora_alpha", "8", TypeError, "lora_alpha: expected a number, got '8'"),
        ("lora_alpha", None, TypeError, "lora_alpha: expected a number, got None"),
        ("lora_alpha", float("nan"), ValueError, "lora_alpha: expected a finite number, got nan"),
        ("alpha_pattern", {"q": "2"}, TypeError, r"alpha_pattern\['q'\]: expected a number, got '2'"),
        ("loraxs_dropout", "0.1", TypeError, "loraxs_dropout: expected a number, got '0.1'"),
        ("basis_tol", None, TypeError, "basis_tol: expected a number, got None"),
        ("svd_tol", "x", TypeError, "svd_tol: expected a number, got 'x'"),
        ("svd_seed", 1.5, TypeError, "seed must be an int, got 1.5"),
        ("n_oversamples", "3", TypeError, "n_oversamples must be an int, got '3'"),
    ],
)
def test_numbers_are_numbers(field, value, error, message):
    with pytest.raises(error, match=message):
        LoraXSConfig(**{field: value})


def test_use_edora_is_a_switch():
    with pytest.raises(TypeError, match="use_edora: expected True or False, got 'yes'"):
        LoraXSConfig(use_edora="yes")


def test_layers_need_names():
    with pytest.raises(ValueError, match="layers_to_transform: expected target_modules as a list"):
        LoraXSConfig(target_modules="all-linear", layers_to_transform=[0])


def test_recipe_has_the_defaults_of_the_basis():
    assert LoraXSConfig().recipe() == Recipe()
    changed = LoraXSConfig(sigma="B", vectors="random", svd_tol=1e-5, svd_seed=3, svd_max_iter=7, n_oversamples=4)
    assert changed.recipe() == Recipe("B", "random", tol=1e-5, seed=3, max_iter=7, n_oversamples=4)


def test_round_trip(tmp_path):
    config = LoraXSConfig(r=3, target_modules=["q", "v"], rank_pattern={"q": 2}, sigma="sqrt", basis_check="warn")
    config.save_pretrained(tmp_path)
    for loaded in (LoraXSConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded == config
