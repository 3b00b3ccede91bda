"""Which calls of `linear` the CUDA kernels for few tokens take; no GPU needed."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.ops import decode

_C = pytest.importorskip("loraxs_ext._C", reason="the native parts are not built")

# (M, N, K, r): capability 8, 9.
SIZES = {
    (1, 4096, 4096, 16): (True, True),
    (64, 4096, 4096, 16): (True, True),
    (65, 4096, 4096, 16): (False, True),
    (16, 11008, 4096, 32): (True, True),
    (17, 11008, 4096, 32): (False, True),
    (128, 14336, 4096, 128): (False, True),
    (129, 4096, 4096, 16): (False, False),
    (8, 4096, 4096, 129): (False, False),
    (8, 4096, 4097, 16): (False, False),
    (8, 4097, 4096, 16): (True, True),
    (0, 4096, 4096, 16): (False, False),
    (8, 0, 4096, 16): (False, False),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes):
    assert tuple(_C.linear_decode_fits(*sizes, capability) for capability in (8, 9)) == SIZES[sizes]
    assert not any(_C.linear_decode_fits(*sizes, capability) for capability in (0, 7, 11, 12))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64}, False),
        ({"p_drop": 0.1}, False),
        ({"M": 0}, False),
        ({"capability": 0}, False),
    ],
    ids=str,
)
def test_calls(monkeypatch, change, taken):
    case = {"dtype": torch.bfloat16, "p_drop": 0.0, "M": 3, "capability": 9} | change
    monkeypatch.setattr(decode, "_capability", lambda index: case["capability"])
    x, weight, a = (torch.empty(*shape, dtype=case["dtype"]) for shape in ((2, case["M"], 64), (32, 64), (4, 64)))
    assert decode.takes(x, weight, a, case["p_drop"]) == taken


def test_what_is_not_taken_goes_on(monkeypatch):
    monkeypatch.setattr(decode, "takes", lambda *call: False)
    assert decode.before(lambda *call: call)(*"xwbabps", 1.0) == (*"xwbabps", 1.0, 0.0, None)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ["80", "90a"], True),
        ((8, 9), ["80", "90a"], True),
        ((8, 0), ["86"], False),
        ((9, 0), ["80", "90a"], True),
        ((9, 0), ["80"], False),
        ((10, 3), ["100"], True),
        ((10, 3), ["100a"], False),
        ((12, 0), ["80", "90a", "100"], False),
    ],
    ids=str,
)
def test_machine_code_runs_on_its_own_generation(capability, archs, runs):
    assert decode.runs_on(*capability, archs) == runs


def test_fake_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 5, 64, device="cuda", dtype=torch.bfloat16)
        rest = (x.new_empty(32, 64), None, x.new_empty(4, 64), x.new_empty(32, 4), x.new_empty(2, 4, 4), None, 1.0)
        y, p = torch.ops.loraxs._linear_decode(x, *rest)
        assert y.shape == (3, 5, 32) and y.dtype == torch.bfloat16 and p.shape == (15, 4) and p.dtype == torch.float32
        with pytest.raises(ValueError, match=r"weight: expected shape \[N=32, K=64\]"):
            torch.ops.loraxs._linear_decode(x, x.new_empty(32, 63), *rest[1:])
