"""loraxs::row_scale: EDoRA's factor m / ‖W + s b R a‖ from a cached rest, against the norm of the weight itself."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loraxs_ext import ops
from loraxs_ext.ops import reference

from .problems import DTYPES, assert_within_twice, threads

# (N, K, r, S): one row, rank 1, ranks that are no power of two, more slots than rows.
SHAPES = {
    "one row": (1, 24, 1, 1),
    "rank 1": (17, 33, 1, 3),
    "rank 5": (130, 67, 5, 4),
    "rank 100": (150, 140, 100, 2),
    "many slots": (9, 48, 8, 31),
}
FORMS = ["reference", "mirror", "any basis"]


@dataclass
class Scaling:
    """One call of `loraxs::row_scale` and, in fp64, the weight it is about."""

    rho: Tensor
    b: Tensor
    pages: Tensor
    sigma: Tensor | None
    m: Tensor
    c: Tensor | None
    root: Tensor | None
    weight: Tensor
    a: Tensor
    scale: float = 0.7

    def args(self, through_norm: bool = False) -> tuple:
        return (self.rho, self.b, self.pages, self.sigma, self.m, self.scale, self.c, self.root, through_norm)

    def to(self, dtype: torch.dtype, small: torch.dtype | None = None) -> Scaling:
        """b in `dtype`, pages and m in `small` (default: `dtype`), what is cached in fp32 at least."""
        cached = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = {"b": dtype, "pages": small or dtype, "m": small or dtype}
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: t.to(kinds.get(name, cached)) for name, t in tensors.items()})


def make_scaling(shape: tuple[int, int, int, int], form: str, seed: int = 0) -> Scaling:
    """fp64; the low-rank part is as large as what it is added to."""
    N, K, r, S = shape
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    weight = randn(N, K) / K**0.5
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    k = min(r, sigma.numel())
    u, sigma, vh = (torch.nn.functional.pad(t, pad) for t, pad in ((u[:, :k], (0, r - k)), (sigma[:k], (0, r - k)),
                                                                  (vh[:k], (0, 0, 0, r - k))))  # fmt: skip
    c = root = None
    a, b = (sigma[:, None] * vh, u) if form == "reference" else (vh, u * sigma)
    q = vh.mT
    if form == "any basis":
        a, b = randn(r, K) / K**0.5, randn(N, r) / r**0.5
        q, lower = torch.linalg.qr(a.mT)
        c, root = weight @ q, lower.mT
    rho = (weight - weight @ q @ q.mT).square().sum(1)
    pages = randn(S, r, r) / r**0.5
    return Scaling(rho, b, pages, sigma if form == "reference" else None, 1 + randn(S, N), c, root, weight, a)


def of_the_weight(p: Scaling) -> Tensor:
    """g with the adapted weight formed: what the op must be equal to."""
    norm = (p.weight + p.scale * (p.b @ p.pages @ p.a)).norm(dim=-1)
    return p.m / norm


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_norm_of_the_adapted_weight(shape, form):
    p = make_scaling(SHAPES[shape], form)
    g = ops.row_scale(*p.args()[:6], c=p.c, root=p.root)
    torch.testing.assert_close(g, of_the_weight(p), rtol=1e-11, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_twice_plain_torch(dtype, shape, form):
    # One function with the op where plain torch owns it; it holds every other owner to the reference.
    p = make_scaling(SHAPES[shape], form).to(DTYPES[dtype])
    exact = reference.row_scale(*p.to(torch.float64).args())
    plain = reference.row_scale(*p.args())
    got = torch.ops.loraxs.row_scale(*p.args())
    assert got[0].dtype == DTYPES[dtype] and got[1].dtype == torch.float32
    for name, ours, theirs, truth in zip(("g", "inverse_norm"), got, plain, exact, strict=True):
        assert_within_twice(ours, theirs, truth, name)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_cancels_when_the_adapter_removes_the_basis(form):
    # R → −1/s leaves the row outside the row space of a only: here nothing, so that the norm is of rounding size.
    p = make_scaling((40, 24, 24, 1), form)
    if form == "any basis":
        p.b, p.c = torch.eye(40, 24, dtype=torch.float64), torch.eye(40, 24, dtype=torch.float64) @ p.root
    p.rho = torch.zeros_like(p.rho)
    p.pages = -(1 + 2**-10) / p.scale * torch.eye(24, dtype=torch.float64)[None]
    single = p.to(torch.float32)
    # The values that fp32 was given, in fp64.
    exact = reference.row_scale(*single.to(torch.float64).args())[0]
    got = ops.row_scale(*single.args()[:6], c=single.c, root=single.root)
    lengths = exact > 0
    assert lengths.any()
    torch.testing.assert_close(got[lengths].double(), exact[lengths], rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_slots_are_computed_as_if_alone(dtype):
    p = make_scaling(SHAPES["many slots"], "reference").to(DTYPES[dtype])
    together = ops.row_scale(*p.args()[:6])
    for slot in range(31):
        alone = replace(p, pages=p.pages[slot, None], m=p.m[slot, None])
        torch.testing.assert_close(ops.row_scale(*alone.args()[:6])[0], together[slot])


def test_zero_adapter_gives_back_the_weight():
    p = make_scaling(SHAPES["rank 5"], "reference")
    p.pages.zero_()
    p.m = p.weight.norm(dim=1).expand(4, -1)
    g = ops.row_scale(*p.args()[:6])
    torch.testing.assert_close(g, torch.ones_like(g), rtol=1e-13, atol=0)


def test_a_row_of_zeros_stays_one():
    p = make_scaling(SHAPES["rank 5"], "mirror")
    p.rho[3], p.b[3] = 0, 0
    m = p.m.clone().requires_grad_()
    g = ops.row_scale(p.rho, p.b, p.pages, None, m, p.scale)
    g.sum().backward()
    assert (g[:, 3] == 0).all() and (m.grad[:, 3] == 0).all() and torch.isfinite(g).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_through_the_norm(form):
    p = make_scaling((7, 9, 4, 2), form)
    leaves = p.pages.clone().requires_grad_(), p.m.clone().requires_grad_()

    def call(pages: Tensor, m: Tensor) -> Tensor:
        return ops.row_scale(p.rho, p.b, pages, p.sigma, m, p.scale, c=p.c, root=p.root, through_norm=True)

    assert torch.autograd.gradcheck(call, leaves)


def test_without_it_the_norm_is_a_constant():
    p = make_scaling((7, 9, 4, 2), "reference")
    pages, m = p.pages.clone().requires_grad_(), p.m.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.row_scale(p.rho, p.b, p.pages, p.sigma, m, p.scale), (m,))
    ops.row_scale(p.rho, p.b, pages, p.sigma, m, p.scale).sum().backward()
    assert pages.grad is None
    torch.testing.assert_close(m.grad, of_the_weight(p) / p.m)


@pytest.mark.parametrize("through_norm", [False, True])
def test_direct_call_and_public_function_differentiate_alike(through_norm):
    p = make_scaling(SHAPES["rank 5"], "any basis").to(torch.bfloat16, torch.float32)
    grads = []
    for direct in (True, False):
        pages, m = p.pages.clone().requires_grad_(), p.m.clone().requires_grad_()
        if direct:
            g = torch.ops.loraxs.row_scale(p.rho, p.b, pages, None, m, p.scale, p.c, p.root, through_norm)[0]
        else:
            g = ops.row_scale(p.rho, p.b, pages, None, m, p.scale, c=p.c, root=p.root, through_norm=through_norm)
        g.square().sum().backward()
        grads.append((m.grad, pages.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1]) if through_norm else grads[0][1] is grads[1][1] is None


@pytest.mark.parametrize("through_norm", [False, True])
def test_opcheck(through_norm):
    p = make_scaling((7, 9, 4, 2), "reference").to(torch.bfloat16, torch.float32)
    p.pages.requires_grad_(), p.m.requires_grad_()
    torch.library.opcheck(torch.ops.loraxs.row_scale.default, p.args(through_norm))


def test_compiled_equals_eager():
    p = make_scaling((7, 9, 4, 2), "reference").to(torch.float32)
    grads = []
    for run in (ops.row_scale, torch.compile(ops.row_scale, fullgraph=True, backend="aot_eager")):
        pages, m = p.pages.clone().requires_grad_(), p.m.clone().requires_grad_()
        run(p.rho, p.b, pages, p.sigma, m, p.scale, through_norm=True).square().sum().backward()
        grads.append((pages.grad, m.grad))
    assert all(torch.equal(s, t) for s, t in zip(*grads, strict=True))


def test_only_the_inverse_norm_is_saved():
    p = make_scaling((7, 9, 4, 2), "reference")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.row_scale(p.rho, p.b, p.pages.requires_grad_(), p.sigma, p.m.requires_grad_(), p.scale)
    assert [tuple(t.shape) for t in saved] == [(2, 7)]


def test_no_rows():
    p = make_scaling((7, 9, 4, 2), "reference")
    g = ops.row_scale(p.rho[:0], p.b[:0], p.pages, p.sigma, p.m[:, :0], p.scale)
    assert g.shape == (2, 0)


def _bad_calls() -> dict[str, tuple[dict, str]]:
    p = make_scaling((7, 9, 4, 2), "reference").to(torch.float32)
    c, root = torch.zeros(7, 4), torch.eye(4)
    return {
        "rho too short": ({"rho": p.rho[1:]}, "rho: expected shape"),
        "rho in a half type": ({"rho": p.rho.half()}, "rho: expected dtype"),
        "sigma of another rank": ({"sigma": p.sigma[1:]}, "sigma: expected shape"),
        "m without a slot axis": ({"m": p.m[0]}, "m: expected shape"),
        "m of other slots": ({"m": p.m[:1]}, "m: expected shape"),
        "pages not square": ({"pages": p.pages[:, 1:]}, "pages: expected shape"),
        "b of integers": ({"b": p.b.int()}, "b: expected a dtype"),
        "c alone": ({"sigma": None, "c": c}, "root: expected a tensor"),
        "root alone": ({"sigma": None, "root": root}, "c: expected a tensor"),
        "two forms": ({"c": c, "root": root}, "sigma: expected None"),
        "rank zero": ({"b": p.b[:, :0], "pages": p.pages[:, :0, :0], "sigma": p.sigma[:0]}, "b: expected a rank"),
    }


@pytest.mark.parametrize("case", _bad_calls())
def test_bad_input_is_refused_by_name(case):
    change, message = _bad_calls()[case]
    p = replace(make_scaling((7, 9, 4, 2), "reference").to(torch.float32), **change)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{message}"):
        torch.ops.loraxs.row_scale(*p.args())


def test_frozen_tensors_that_require_grad_are_refused():
    p = make_scaling((7, 9, 4, 2), "reference")
    with pytest.raises(ValueError, match="b: expected a frozen tensor"):
        ops.row_scale(p.rho, p.b.requires_grad_(), p.pages, p.sigma, p.m.requires_grad_(), p.scale)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_kernel_knows_shapes_and_dtypes(device):
    with FakeTensorMode():
        b = torch.empty(12, 4, dtype=torch.bfloat16, device=device)
        pages, rho, m = (torch.empty(*size, device=device) for size in ((5, 4, 4), (12,), (5, 12)))
        g, inverse_norm = torch.ops.loraxs.row_scale(rho, b, pages, None, m.bfloat16(), 1.0)
        assert (g.shape, g.dtype, g.device.type) == ((5, 12), torch.bfloat16, device)
        assert (inverse_norm.shape, inverse_norm.dtype) == ((5, 12), torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_pages_and_magnitudes_in_fp32(dtype):
    p = make_scaling(SHAPES["rank 5"], "any basis").to(DTYPES[dtype], torch.float32)
    got = torch.ops.loraxs.row_scale(*p.args())
    assert [t.dtype for t in got] == [torch.float32, p.rho.dtype]
    exact, plain = (reference.row_scale(*q.args()) for q in (p.to(torch.float64), p))
    for name, ours, theirs, truth in zip(("g", "inverse_norm"), got, plain, exact, strict=True):
        assert_within_twice(ours, theirs, truth, name)


def test_strides_do_not_matter():
    p = make_scaling(SHAPES["rank 5"], "any basis").to(torch.float32)
    expected = torch.ops.loraxs.row_scale(*p.args())
    turned = {name: getattr(p, name).mT.contiguous().mT for name in ("b", "pages", "m", "c", "root")}
    got = torch.ops.loraxs.row_scale(*replace(p, **turned, rho=p.rho.repeat_interleave(2)[::2]).args())
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0)


if ops.backends.COMPILED:
    from loraxs_ext import _C

    FEATURES = {"portable": True, **_C.cpu_features()}

    @pytest.mark.parametrize("isa", [name for name in _C.build_info()["cpu_isas"] if FEATURES[name]])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    def test_every_instruction_set(isa, dtype, form):
        before = _C.cpu_isa()
        _C.set_cpu_isa(isa)
        try:
            for shape in SHAPES:
                test_error_within_twice_plain_torch(dtype, shape, form)
            test_nothing_cancels_when_the_adapter_removes_the_basis(form)
        finally:
            _C.set_cpu_isa(before)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_thread_count_does_not_change_a_bit(dtype, form):
        # Enough rows and ranks for both steps to be dealt out, with remainders.
        p = make_scaling((600, 110, 100, 3), form).to(DTYPES[dtype])
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                results.append(torch.ops.loraxs.row_scale(*p.args()))
        for others in results[1:]:
            assert all(torch.equal(s, t) for s, t in zip(results[0], others, strict=True))
