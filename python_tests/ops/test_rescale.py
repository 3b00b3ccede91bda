"""loraxs::rescale, y = g_slot ∘ z + bias, and its gradients, on whoever owns them on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from loraxs_ext import ops
from loraxs_ext.ops import reference

from .problems import DTYPES, assert_within_twice, threads

HALF_OR_SINGLE = ["fp32", "bf16", "fp16"]
SLOTS = [None, "mixed", "base", "skewed"]
# (M, N, S): one token, odd widths, fewer columns than lanes, pieces of rows with and without a rest, many slots.
SHAPES = {
    "one token": (1, 48, 1),
    "few columns": (40, 3, 2),
    "odd widths": (13, 131, 4),
    "pieces": (128, 64, 3),
    "pieces and a rest": (333, 77, 3),
    "many slots": (9, 64, 31),
}


@dataclass
class Rescaling:
    """One call of `loraxs::rescale` and the gradient of its result."""

    z: Tensor
    g: Tensor
    slots: Tensor | None
    bias: Tensor | None
    dy: Tensor

    def args(self) -> tuple:
        return self.z, self.g, self.slots, self.bias

    def backward_args(self) -> tuple:
        return self.dy, self.z, self.g, self.slots, True

    def to(self, dtype: torch.dtype, g_dtype: torch.dtype | None = None) -> Rescaling:
        kinds = {"z": dtype, "g": g_dtype or dtype, "bias": dtype, "dy": dtype}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: given[name].to(kind) for name, kind in kinds.items() if given[name] is not None})


def make_rescaling(
    shape: tuple[int, int, int], dtype: torch.dtype, *, slots: str | None = None, bias: bool = True, seed: int = 0
) -> Rescaling:
    """Random numbers of the size of 1; `slots` as in `problems.make`."""
    M, N, S = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    chosen = None
    if slots is not None:
        chosen = torch.randint(-1, S, (M,), generator=generator, dtype=torch.int32)
    if slots in ("base", "skewed"):
        chosen = torch.full((M,), -1 if slots == "base" else S - 1, dtype=torch.int32)
    return Rescaling(randn(M, N), randn(S, N), chosen, randn(N) if bias else None, randn(M, N)).to(dtype)


def plainly(p: Rescaling) -> tuple[Tensor, Tensor, Tensor]:
    """y, dz and dg by the operations of torch in the dtype of z: the yardstick of the 2× rule."""
    z, g = p.z.clone().requires_grad_(), p.g.clone().requires_grad_()
    factor = g[0].to(z.dtype) if p.slots is None else g.to(z.dtype)[p.slots.clamp_min(0).long()]
    if p.slots is not None:
        factor = torch.where((p.slots >= 0)[:, None], factor, 1)
    y = factor * z
    y = y if p.bias is None else y + p.bias
    return y.detach(), *torch.autograd.grad(y, (z, g), p.dy)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_error_within_twice_plain_torch(dtype, shape, slots, bias):
    p = make_rescaling(SHAPES[shape], DTYPES[dtype], slots=slots, bias=bias)
    exact = p.to(torch.float64)
    expected = reference.rescale(*exact.args()), *reference.rescale_backward(*exact.backward_args())
    got = torch.ops.loraxs.rescale(*p.args()), *torch.ops.loraxs.rescale_backward(*p.backward_args())
    for name, ours, theirs, truth in zip(("y", "dz", "dg"), got, plainly(p), expected, strict=True):
        assert ours.dtype == DTYPES[dtype]
        assert_within_twice(ours, theirs, truth, name)


@pytest.mark.parametrize("slots", SLOTS)
def test_the_reference_is_autograds_in_fp64(slots):
    p = make_rescaling(SHAPES["pieces and a rest"], torch.float64, slots=slots)
    ours = reference.rescale(*p.args()), *reference.rescale_backward(*p.backward_args())
    owners = torch.ops.loraxs.rescale(*p.args()), *torch.ops.loraxs.rescale_backward(*p.backward_args())
    for got in (ours, owners):
        for value, truth in zip(got, plainly(p), strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_base_rows_without_a_bias_stay_to_the_last_bit(dtype):
    p = make_rescaling(SHAPES["odd widths"], DTYPES[dtype], slots="mixed", bias=False)
    p.z[p.slots < 0, :2] = torch.tensor([-0.0, torch.inf], dtype=p.z.dtype)
    y = ops.rescale(*p.args())
    dz, _ = torch.ops.loraxs.rescale_backward(*p.backward_args())
    rows = p.slots < 0
    assert rows.any() and torch.equal(y[rows], p.z[rows]) and torch.equal(y[rows].signbit(), p.z[rows].signbit())
    assert torch.equal(dz[rows], p.dy[rows])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_factors_in_fp32(dtype):
    p = make_rescaling(SHAPES["odd widths"], DTYPES[dtype], slots="mixed").to(DTYPES[dtype], torch.float32)
    got = torch.ops.loraxs.rescale(*p.args()), *torch.ops.loraxs.rescale_backward(*p.backward_args())
    assert [t.dtype for t in got] == [DTYPES[dtype], DTYPES[dtype], torch.float32]
    exact = p.to(torch.float64)
    expected = reference.rescale(*exact.args()), *reference.rescale_backward(*exact.backward_args())
    tolerance = 3 * torch.finfo(torch.float32 if dtype == "fp64" else DTYPES[dtype]).eps
    for ours, truth in zip(got, expected, strict=True):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize("slots", [None, "mixed"])
def test_bitwise_repeatable_and_each_slot_alone(dtype, slots):
    p = make_rescaling(SHAPES["pieces and a rest"], DTYPES[dtype], slots=slots)
    first, again = (torch.ops.loraxs.rescale_backward(*p.backward_args()) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))
    if slots is None:
        assert (first[1][1:] == 0).all()
        return
    for slot in range(3):
        rows = p.slots == slot
        alone = torch.ops.loraxs.rescale_backward(p.dy[rows], p.z[rows], p.g, p.slots[rows], False)[1]
        assert torch.equal(alone[slot], first[1][slot])


def test_what_is_not_needed_is_not_computed():
    p = make_rescaling(SHAPES["odd widths"], torch.float32, slots="mixed")
    dz, dg = torch.ops.loraxs.rescale_backward(p.dy, None, p.g, p.slots, True)
    assert dz.shape == p.z.shape and dg.shape == (0,)
    dz, dg = torch.ops.loraxs.rescale_backward(p.dy, p.z, p.g, p.slots, False)
    assert dz.shape == (0,) and dg.shape == p.g.shape


def test_leading_dimensions_and_strides_do_not_matter():
    p = make_rescaling((24, 36, 3), torch.float32, slots="mixed")
    expected = ops.rescale(*p.args()), *torch.ops.loraxs.rescale_backward(*p.backward_args())
    scattered = torch.empty(36, 2, 3, 4).permute(1, 2, 3, 0)
    z, dy = scattered.copy_(p.z.view(2, 3, 4, 36)), scattered.clone().copy_(p.dy.view(2, 3, 4, 36))
    g = p.g.mT.contiguous().mT
    y = ops.rescale(z, g, p.slots, p.bias.repeat_interleave(2)[::2])
    dz, dg = torch.ops.loraxs.rescale_backward(dy, z, g, p.slots, True)
    assert y.shape == dz.shape == (2, 3, 4, 36)
    for ours, truth in zip((y.view(24, 36), dz.view(24, 36), dg), expected, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)], ids=["M=0", "N=0"])
def test_empty_problems(shape):
    M, N = shape
    z, g, bias = torch.empty(M, N), torch.ones(2, N), torch.ones(N)
    slots = torch.zeros(M, dtype=torch.int32)
    assert ops.rescale(z, g, slots, bias).shape == (M, N)
    dz, dg = torch.ops.loraxs.rescale_backward(z, z, g, slots, True)
    assert dz.shape == (M, N) and torch.equal(dg, torch.zeros(2, N))


def _leaves(p: Rescaling) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in (p.z, p.g, p.bias)]


@pytest.mark.parametrize("slots", [None, "mixed"])
def test_gradcheck(slots):
    p = make_rescaling((6, 5, 3), torch.float64, slots=slots)
    assert torch.autograd.gradcheck(lambda z, g, bias: ops.rescale(z, g, p.slots, bias), _leaves(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    p = make_rescaling((6, 5, 3), dtype, slots="mixed")
    torch.library.opcheck(torch.ops.loraxs.rescale_backward.default, p.backward_args())
    z, g, bias = _leaves(p)
    torch.library.opcheck(torch.ops.loraxs.rescale.default, (z, g, p.slots, bias))


def _by_every_route(p: Rescaling) -> Iterator[tuple[Tensor, ...]]:
    def eager(z, g, bias):
        return ops.rescale(z, g, p.slots, bias)

    routes = (
        eager,
        lambda z, g, bias: torch.ops.loraxs.rescale(z, g, p.slots, bias),
        torch.compile(eager, fullgraph=True, backend="aot_eager"),
        lambda *leaves: checkpoint(eager, *leaves, use_reentrant=False),
    )
    for route in routes:
        leaves = _leaves(p)
        y = route(*leaves)
        yield y.detach(), *torch.autograd.grad(y, leaves, p.dy)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_route_gives_the_same_gradients(dtype):
    p = make_rescaling(SHAPES["odd widths"], DTYPES[dtype], slots="mixed")
    first, *others = _by_every_route(p)
    for other in others:
        assert all(torch.equal(s, t) for s, t in zip(first, other, strict=True))


def test_only_what_is_needed_is_saved():
    p = make_rescaling((6, 5, 3), torch.float32)
    z, g, bias = _leaves(p)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rescale(p.z, g, None, p.bias), ops.rescale(z, p.g, None, p.bias), ops.rescale(p.z, p.g, None, bias)
    # z for the gradient of g, g for that of z, nothing for that of the bias.
    assert [tuple(t.shape) for t in saved] == [(6, 5), (3, 5), (3, 5)]


def test_autocast_casts_z_and_bias():
    p = make_rescaling((6, 5, 3), torch.float32, slots="mixed")
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.rescale(*p.args())
    assert torch.equal(y, ops.rescale(p.z.bfloat16(), p.g, p.slots, p.bias.bfloat16()))


def test_differentiating_twice_is_refused():
    p = make_rescaling((6, 5, 3), torch.float64)
    z, g, bias = _leaves(p)
    with pytest.raises(RuntimeError, match="rescale: differentiating twice"):
        torch.autograd.grad(ops.rescale(z, g, None, bias).sum(), z, create_graph=True)


def _bad_calls() -> dict[str, tuple[dict, str]]:
    p = make_rescaling((6, 5, 3), torch.float32, slots="mixed")
    return {
        "g of another width": ({"g": p.g[:, 1:]}, "g: expected shape"),
        "g without a slot axis": ({"g": p.g[0]}, "g: expected shape"),
        "g in a half type": ({"g": p.g.half()}, "g: expected dtype"),
        "no slot at all": ({"g": p.g[:0]}, "g: expected at least one slot"),
        "slots too short": ({"slots": p.slots[1:]}, "slots: expected shape"),
        "slot out of range": ({"slots": torch.full((6,), 3, dtype=torch.int32)}, "slots: expected values"),
        "bias too long": ({"bias": torch.zeros(6)}, "bias: expected shape"),
        "bias of another dtype": ({"bias": p.bias.double()}, "bias: expected dtype"),
        "z of integers": ({"z": p.z.int()}, "z: expected a dtype"),
    }


@pytest.mark.parametrize("case", _bad_calls())
def test_bad_input_is_refused_by_name(case):
    change, message = _bad_calls()[case]
    p = replace(make_rescaling((6, 5, 3), torch.float32, slots="mixed"), **change)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{message}"):
        torch.ops.loraxs.rescale(*p.args())


def test_gradient_of_another_shape_is_refused():
    p = make_rescaling((6, 5, 3), torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"\bz: expected"):
        torch.ops.loraxs.rescale_backward(p.dy, p.z[1:], p.g, None, True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_kernels_know_shapes_and_dtypes(device):
    with FakeTensorMode():
        z = torch.empty(2, 3, 12, dtype=torch.bfloat16, device=device)
        g = torch.empty(4, 12, device=device)
        y = torch.ops.loraxs.rescale(z, g, None, None)
        assert (y.shape, y.dtype, y.device.type) == (z.shape, torch.bfloat16, device)
        dz, dg = torch.ops.loraxs.rescale_backward(z, z, g, None, True)
        assert (dz.shape, dz.dtype, dg.shape, dg.dtype) == (z.shape, torch.bfloat16, g.shape, torch.float32)


if ops.backends.COMPILED:
    from loraxs_ext import _C

    FEATURES = {"portable": True, **_C.cpu_features()}

    @pytest.mark.parametrize("isa", [name for name in _C.build_info()["cpu_isas"] if FEATURES[name]])
    @pytest.mark.parametrize("slots", [None, "mixed"])
    @pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
    def test_every_instruction_set(isa, dtype, slots):
        before = _C.cpu_isa()
        _C.set_cpu_isa(isa)
        try:
            for shape in SHAPES:
                test_error_within_twice_plain_torch(dtype, shape, slots, True)
        finally:
            _C.set_cpu_isa(before)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_thread_count_does_not_change_a_bit(dtype):
        p = make_rescaling((333, 520, 3), DTYPES[dtype], slots="mixed")
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                y = torch.ops.loraxs.rescale(*p.args())
                results.append((y, *torch.ops.loraxs.rescale_backward(*p.backward_args())))
        for others in results[1:]:
            assert all(torch.equal(s, t) for s, t in zip(results[0], others, strict=True))
