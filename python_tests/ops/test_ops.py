"""What the ops compute, on whoever owns them on this machine, against fp64."""

from dataclasses import replace

import pytest
import torch

from loraxs_ext import ops
from loraxs_ext.ops import reference

from .problems import DTYPES, SHAPES, amid_others, assert_within_twice, error, make, naive_linear

HALF_OR_SINGLE = ["fp32", "bf16", "fp16"]
SLOTS = [None, "mixed", "base", "skewed"]


@pytest.mark.parametrize("p_drop", [0.0, 0.4])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_error_within_twice_plain_torch(dtype, shape, slots, p_drop):
    problem = make(SHAPES[shape], DTYPES[dtype], slots=slots, p_drop=p_drop)
    exact = problem.to(torch.float64)
    y64, p64 = reference.linear(*exact.forward_args())
    dx64, dpages64 = reference.linear_backward(*exact.backward_args(p64))

    y_plain = naive_linear(problem)
    p_plain = reference.linear(*problem.forward_args())[1]
    dx_plain, dpages_plain = reference.linear_backward(*problem.backward_args(p_plain))

    y, p = torch.ops.loraxs.linear(*problem.forward_args())
    dx, dpages = torch.ops.loraxs.linear_backward(*problem.backward_args(p))
    assert_within_twice(y, y_plain, y64, "y")
    assert_within_twice(p, p_plain, p64, "p")
    assert_within_twice(dx, dx_plain, dx64, "dx")
    assert_within_twice(dpages, dpages_plain, dpages64, "dpages")


@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_equals_the_reference(shape):
    problem = make(SHAPES[shape], torch.float64, slots="mixed", p_drop=0.4)
    expected = reference.linear(*problem.forward_args())
    got = torch.ops.loraxs.linear(*problem.forward_args())
    expected += reference.linear_backward(*problem.backward_args(expected[1]))
    got += torch.ops.loraxs.linear_backward(*problem.backward_args(got[1]))
    for name, ours, theirs in zip(("y", "p", "dx", "dpages"), got, expected, strict=True):
        assert error(ours, theirs) < 2e-15, f"{name} differs by {error(ours, theirs):.1e}"


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_three_ways_to_add_the_delta_agree(dtype):
    p = make(SHAPES["tall"], DTYPES[dtype], slots="mixed", p_drop=0.2)
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    y = ops.linear(p.x, p.weight, p.bias, p.a, p.b, p.pages, p.slots, p.scale, p_drop=p.p_drop, rng=p.rng)
    out = ops.add_delta(base, p.x, p.a, p.b, p.pages, p.slots, p.scale, p_drop=p.p_drop, rng=p.rng)
    inplace = base.clone()
    assert ops.add_delta_(inplace, p.x, *p.low_rank_args()[:5], p_drop=p.p_drop, rng=p.rng) is inplace
    assert torch.equal(y, out) and torch.equal(out, inplace)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_base_rows_are_the_base_model_to_the_last_bit(dtype):
    p = make(SHAPES["tall"], DTYPES[dtype], slots="mixed")
    y, _ = torch.ops.loraxs.linear(*p.forward_args())
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    rows = p.slots < 0
    assert rows.any() and torch.equal(y[rows], base[rows])
    assert not torch.equal(y[~rows], base[~rows])


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_half_types_take_pages_in_fp32(dtype):
    p = make(SHAPES["tall"], DTYPES[dtype], slots="mixed").to(DTYPES[dtype], torch.float32)
    y, low = torch.ops.loraxs.linear(*p.forward_args())
    dx, dpages = torch.ops.loraxs.linear_backward(*p.backward_args(low))
    assert y.dtype == dx.dtype == DTYPES[dtype] and dpages.dtype == torch.float32


def test_leading_dimensions_and_strides_do_not_matter():
    p = make((24, 40, 36, 8, 3), slots="mixed")
    y, low = torch.ops.loraxs.linear(*p.forward_args())
    strided = torch.empty(40, 2, 3, 4).permute(1, 2, 3, 0)
    strided.copy_(p.x.view(2, 3, 4, 40))
    q = make((24, 40, 36, 8, 3), slots="mixed")
    q.x, q.b = strided, p.b.contiguous()
    q.weight = p.weight.T.contiguous().T
    q.pages = p.pages.mT.contiguous().mT
    y_strided, low_strided = torch.ops.loraxs.linear(*q.forward_args())
    assert y_strided.shape == (2, 3, 4, 36)
    torch.testing.assert_close(y_strided.reshape(24, 36), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low_strided, low, rtol=1e-5, atol=1e-5)
    q.dy = p.dy.view(2, 3, 4, 36).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    dx, dpages = torch.ops.loraxs.linear_backward(*q.backward_args(low))
    dx0, dpages0 = torch.ops.loraxs.linear_backward(*p.backward_args(low))
    torch.testing.assert_close(dx.reshape(24, 40), dx0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dpages, dpages0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p_drop", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_may_be_parts_of_larger_ones(dtype, p_drop):
    p = make(SHAPES["tall"], DTYPES[dtype], slots="mixed", p_drop=p_drop)
    p.x, p.dy = p.x.view(2, 75, 96), p.dy.view(2, 75, 64)
    parts = replace(p, **{name: amid_others(getattr(p, name)) for name in ("x", "weight", "bias", "a", "b", "dy")})
    y, low = torch.ops.loraxs.linear(*p.forward_args())
    expected = (y, low, *torch.ops.loraxs.linear_backward(*p.backward_args(low)))
    y, low = torch.ops.loraxs.linear(*parts.forward_args())
    got = (y, low, *torch.ops.loraxs.linear_backward(*parts.backward_args(low)))
    for name, ours, theirs in zip(("y", "p", "dx", "dpages"), got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_one_dimensional_x():
    p = make((1, 40, 36, 8, 1))
    y, low = torch.ops.loraxs.linear(p.x[0], *p.forward_args()[1:])
    assert y.shape == (36,) and low.shape == (1, 8)
    torch.testing.assert_close(y, torch.ops.loraxs.linear(*p.forward_args())[0][0])


@pytest.mark.parametrize("shape", [(0, 8, 6, 2, 2), (3, 0, 6, 2, 2), (3, 8, 0, 2, 2)], ids=["M=0", "K=0", "N=0"])
def test_empty_problems(shape):
    p = make((3, 8, 6, 2, 2), slots="mixed")
    M, K, N, _, _ = shape
    p.x, p.weight, p.bias, p.a, p.b = p.x[:M, :K], p.weight[:N, :K], p.bias[:N], p.a[:, :K], p.b[:N]
    p.slots, p.dy = p.slots[:M], p.dy[:M, :N]
    y, low = torch.ops.loraxs.linear(*p.forward_args())
    dx, dpages = torch.ops.loraxs.linear_backward(*p.backward_args(low))
    assert y.shape == (M, N) and low.shape == (M, 2) and dx.shape == (M, K)
    assert torch.equal(dpages, torch.zeros_like(p.pages)) or (M > 0 and K > 0 and N > 0)
    if K == 0:
        torch.testing.assert_close(y, p.bias.expand(M, N))


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_bitwise_repeatable(dtype):
    p = make(SHAPES["tall"], DTYPES[dtype], slots="mixed", p_drop=0.3)
    results = []
    for _ in range(3):
        y, low = torch.ops.loraxs.linear(*p.forward_args())
        results.append((y, low, *torch.ops.loraxs.linear_backward(*p.backward_args(low))))
    for again in results[1:]:
        assert all(torch.equal(s, t) for s, t in zip(results[0], again, strict=True))


def test_gradient_of_a_slot_does_not_depend_on_other_rows():
    p = make((700, 24, 20, 8, 3), slots="mixed")
    low = torch.ops.loraxs.linear(*p.forward_args())[1]
    _, together = torch.ops.loraxs.linear_backward(*p.backward_args(low))
    for slot in range(3):
        rows = p.slots == slot
        alone = replace(p, dy=p.dy[rows], slots=p.slots[rows])
        _, dpages = torch.ops.loraxs.linear_backward(*alone.backward_args(low[rows]))
        if ops.backends.COMPILED:
            assert torch.equal(dpages[slot], together[slot])
        else:
            # Plain torch's matmul rounds dq by the number of rows it is given.
            torch.testing.assert_close(dpages[slot], together[slot])


def test_what_is_not_needed_is_not_computed():
    p = make(SHAPES["odd widths"])
    low = torch.ops.loraxs.linear(*p.forward_args())[1]
    args = p.backward_args(low)[:-2]
    dx, dpages = torch.ops.loraxs.linear_backward(*args, True, False)
    assert dx.shape == p.x.shape and dpages.shape == (0,)
    dx, dpages = torch.ops.loraxs.linear_backward(*args, False, True)
    assert dx.shape == (0,) and dpages.shape == p.pages.shape


def test_reference_never_skips_dropout_silently():
    p = make(SHAPES["odd widths"], p_drop=0.4)
    p.rng = None
    with pytest.raises(ValueError, match="rng: expected"):
        reference.linear(*p.forward_args())
