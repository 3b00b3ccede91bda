"""The contract refuses what does not fit, by name, whoever owns the op; and fake kernels know every shape."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loraxs_ext import ops
from loraxs_ext.ops.contract import OPS, check

from .problems import Problem, make

SHAPE = (6, 20, 12, 4, 3)


def _bad_calls() -> dict[str, tuple[dict, str]]:
    p = make(SHAPE, slots="mixed")
    return {
        "weight of another width": ({"weight": p.weight[:, :-1]}, "weight"),
        "weight of another dtype": ({"weight": p.weight.double()}, "weight"),
        "bias too long": ({"bias": torch.zeros(13)}, "bias"),
        "a of another rank": ({"a": p.a[:3]}, "b"),
        "a of another width": ({"a": p.a[:, :-1]}, "a"),
        "b transposed": ({"b": p.b.mT}, "b"),
        "pages not square": ({"pages": p.pages[:, :, :-1]}, "pages"),
        "pages without a slot axis": ({"pages": p.pages[0]}, "pages"),
        "no slot at all": ({"pages": p.pages[:0]}, "pages"),
        "pages in a half type": ({"pages": p.pages.half()}, "pages"),
        "slots too short": ({"slots": p.slots[:-1]}, "slots"),
        "slots in int64": ({"slots": p.slots.long()}, "slots"),
        "slot out of range": ({"slots": torch.full((6,), 3, dtype=torch.int32)}, "slots"),
        "slot below -1": ({"slots": torch.full((6,), -2, dtype=torch.int32)}, "slots"),
        "dropout without rng": ({"p_drop": 0.5}, "rng"),
        "dropout of one": ({"p_drop": 1.0, "rng": torch.tensor([1, 2])}, "p_drop"),
        "rng too short": ({"p_drop": 0.5, "rng": torch.tensor([1])}, "rng"),
        "rank zero": ({"a": p.a[:0], "b": p.b[:, :0], "pages": p.pages[:, :0, :0]}, "a"),
        "integer x": ({"x": torch.ones(6, 20, dtype=torch.int32)}, "x"),
    }


@pytest.mark.parametrize("case", _bad_calls())
def test_bad_input_is_refused_by_name(case):
    change, name = _bad_calls()[case]
    problem = Problem(**{**vars(make(SHAPE, slots="mixed")), **change})
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{name}: expected"):
        torch.ops.loraxs.linear(*problem.forward_args())


@pytest.mark.parametrize("op", ["add_delta", "add_delta_"])
def test_bad_output_is_refused_and_left_alone(op):
    p = make(SHAPE)
    y = torch.full((5, 12), 3.0)
    with pytest.raises((ValueError, RuntimeError), match=r"\by: expected|\bx: expected"):
        getattr(torch.ops.loraxs, op)(y, p.x, *p.low_rank_args())
    assert torch.equal(y, torch.full((5, 12), 3.0))


def test_slot_out_of_range_writes_nothing():
    p = make(SHAPE)
    y = torch.full((6, 12), 3.0)
    p.slots = torch.tensor([0, 0, 0, 0, 0, 7], dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"slots: expected .*7"):
        torch.ops.loraxs.add_delta_(y, p.x, *p.low_rank_args())
    assert torch.equal(y, torch.full((6, 12), 3.0))


def test_messages_say_what_was_expected_and_what_came():
    p = make(SHAPE)
    with pytest.raises(ValueError, match=r"loraxs::linear: weight: expected shape \[N=12, K=20\], got \[12, 19\]"):
        check("linear", x=p.x, weight=p.weight[:, :-1], bias=None, a=p.a, b=p.b, pages=p.pages, slots=None, rng=None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_kernels_know_shapes_and_dtypes(device):
    with FakeTensorMode():
        x = torch.empty(2, 3, 20, dtype=torch.bfloat16, device=device)
        weight, a, b = (x.new_empty(*s) for s in ((12, 20), (4, 20), (12, 4)))
        pages = torch.empty(5, 4, 4, device=device)
        y, p = torch.ops.loraxs.linear(x, weight, None, a, b, pages, None, 1.0)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 12), torch.bfloat16, device)
        assert (p.shape, p.dtype) == ((6, 4), torch.float32)
        dx, dpages = torch.ops.loraxs.linear_backward(y, weight, a, b, pages, None, p, 1.0, 0.0, None, True, False)
        assert dx.shape == x.shape and dpages.shape == (0,)
        out, _ = torch.ops.loraxs.add_delta(y, x, a, b, pages, None, 1.0)
        assert out.shape == y.shape


def test_every_op_has_an_owner_on_every_device():
    owners = ops.backends.owners()
    assert set(owners) == set(OPS)
    # The decomposition of a weight is made of large products, which torch does best. Layers share a projection on other
    # devices only.
    plain = {"orthonormalize", "randomized_svd", "project", "linear_projected"}
    compiled = set(OPS) - plain if ops.backends.COMPILED else set()
    assert {op for op, table in owners.items() if table["cpu"] == "C++"} == compiled
