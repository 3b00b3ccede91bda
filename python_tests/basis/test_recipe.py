from __future__ import annotations

import json

import pytest

from loraxs_ext.basis import Recipe


def test_json_round_trip() -> None:
    recipe = Recipe(sigma="sqrt", vectors="middle", svd="exact", n_oversamples=5, tol=1e-6, max_iter=7, seed=2**62)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({}) == Recipe()


def test_recipes_are_values() -> None:
    assert hash(Recipe()) == hash(Recipe()) and Recipe() != Recipe(seed=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": "C"}, "sigma must be one of"),
        ({"svd": "randomized"}, "svd must be one of"),
        ({"vectors": "left"}, "vectors must be one of"),
        ({"sklearn_n_iter": -1}, "sklearn_n_iter must be at least 0, got -1"),
        ({"sklearn_random_state": 2**32}, "sklearn_random_state must be in"),
        ({"tol": 1.0}, "tol must lie between 0 and 1, got 1.0"),
        ({"seed": 2**63}, "seed must be in"),
        ({"sketch_version": 2}, "sketch_version 2 cannot be computed"),
        ({"rank": 4}, r"unknown fields \['rank'\]"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tol": "1e-3"}, "tol must be a number, got '1e-3'"),
        ({"seed": 1.5}, "seed must be an int, got 1.5"),
        ({"max_iter": True}, "max_iter must be an int, got True"),
        ({"n_oversamples": None}, "n_oversamples must be an int, got None"),
        ({"sketch_version": "1"}, "sketch_version must be an int, got '1'"),
    ],
)
def test_numbers_are_numbers(fields: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Recipe.from_dict(fields)
