"""What can be known about CUDA devices where there is none: owners, routing, fake kernels."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loraxs_ext import ops
from loraxs_ext.ops import backends
from loraxs_ext.ops.triton import cublas

from ..problems import make
from .harness import recorded_launches


@pytest.fixture
def auto(monkeypatch) -> None:
    monkeypatch.setattr(backends, "BACKEND", "auto")


@pytest.fixture
def capability(monkeypatch):
    """Pretends that there are GPUs of these compute capabilities."""

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    backends._triton_runs_on.cache_clear()
    yield pretend
    backends._triton_runs_on.cache_clear()


def test_fake_kernels_under_every_owner():
    # A fake tensor has a device but no memory: launching anything on it would fail.
    with FakeTensorMode():
        x = torch.empty(2, 100, 48, dtype=torch.bfloat16, device="cuda")
        weight, a, b = (x.new_empty(*s) for s in ((24, 48), (5, 48), (24, 5)))
        pages, slots = torch.empty(3, 5, 5, device="cuda"), torch.empty(200, dtype=torch.int32, device="cuda")
        rng = torch.empty(2, dtype=torch.int64, device="cuda")
        for op in (torch.ops.loraxs.linear, torch.ops.loraxs._linear):
            y, p = op(x, weight, None, a, b, pages, slots, 1.0, 0.1, rng)
            assert (y.shape, y.dtype, y.device.type) == ((2, 100, 24), torch.bfloat16, "cuda")
            assert (p.shape, p.dtype, p.device.type) == ((200, 5), torch.float32, "cuda")
        only_y = torch.ops.loraxs._linear_output(x, weight, None, a, b, pages, slots, 1.0, 0.1, rng)
        assert (only_y.shape, only_y.dtype, only_y.device.type) == (y.shape, y.dtype, "cuda")
        for op in (torch.ops.loraxs.add_delta, torch.ops.loraxs._add_delta):
            out, p = op(y, x, a, b, pages, slots, 1.0)
            assert (out.shape, out.dtype, p.shape) == (y.shape, y.dtype, (200, 5))
        assert torch.ops.loraxs.add_delta_(y, x, a, b, pages, slots, 1.0) is None
        dx, dpages = torch.ops.loraxs.linear_backward(
            y, weight, a, b, pages, slots, p, 1.0, 0.1, rng, True, True
        )  # fmt: skip
        assert (dx.shape, dx.dtype, dpages.shape, dpages.dtype) == (x.shape, x.dtype, pages.shape, pages.dtype)
        assert torch.ops.loraxs.project(x, a).shape == (200, 5)
        assert torch.ops.loraxs.linear_projected(x, weight, None, p, a, b, pages, slots, 1.0).shape == (2, 100, 24)


def test_owners_tell_what_runs(capability, monkeypatch):
    def linear_owner() -> str:
        return ops.backends.owners()["linear"]["cuda"]

    if backends.BACKEND != "auto":
        pytest.skip(f"LORAXS_BACKEND={backends.BACKEND}")
    capability()
    assert linear_owner() == "Triton, plain torch for fp64, r > 256"
    capability((9, 0), (7, 5))
    assert linear_owner() == "Triton, plain torch for cuda:1, fp64, r > 256"
    capability((7, 5))
    assert linear_owner() == "plain torch, as Triton's kernels need compute capability 8.0"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert linear_owner() == "plain torch, as Triton is not installed"


def test_where_triton_cannot_run_it_is_plain_torch_or_an_error(capability, monkeypatch, auto):
    capability((8, 0), (7, 5))
    assert backends._triton_runs_on(0) and not backends._triton_runs_on(1)
    monkeypatch.setattr(backends, "BACKEND", "triton")
    backends._triton_runs_on.cache_clear()
    with pytest.raises(RuntimeError, match=r"LORAXS_BACKEND=triton: expected .* 8.0 or later, cuda:1 has 7.5"):
        backends._triton_runs_on(1)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="LORAXS_BACKEND=triton: expected the package triton to be installed"):
        backends._triton_runs_on(0)


def test_routing(monkeypatch, auto):
    """What the owner on CUDA does with a call, with launches recorded and devices pretended."""
    monkeypatch.setattr(backends, "_triton_runs_on", lambda index: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def kernels(M: int, r: int, dtype: torch.dtype, K: int = 64) -> list[str]:
        with torch.device("meta"), recorded_launches() as launches:
            x, pages = torch.empty(M, K, dtype=dtype), torch.empty(2, r, r, dtype=dtype)
            weight, a, b = (torch.empty(*s, dtype=dtype) for s in ((24, K), (r, K), (24, r)))
            backends._triton_owner("linear")(x, weight, None, a, b, pages, None, 1.0)
        return [launch.kernel.__name__ for launch in launches]

    rotated = ["_project_kernel", "_rotate_kernel"]
    assert kernels(4, 16, torch.bfloat16) == ["_decode_kernel"]
    assert kernels(200, 16, torch.bfloat16) == [*rotated, "_linear_kernel"]
    assert kernels(200, 16, torch.float32) == [*rotated, "_expand_kernel"]
    assert kernels(4, 257, torch.bfloat16) == kernels(4, 16, torch.float64) == []


def test_the_owner_of_the_base_product(monkeypatch, auto, request):
    b = torch.empty(24, 16, dtype=torch.bfloat16)

    def owner(K: int, dtype: torch.dtype = torch.bfloat16) -> str:
        weight = torch.empty(24, K, dtype=dtype)
        return backends.product_owner(weight, weight, b.to(dtype))[1]

    assert owner(1024) == "one_pass" and owner(4096) == "expanded"
    assert owner(1024, torch.float32) == "expanded"
    request.getfixturevalue("tf32")
    assert owner(1024, torch.float32) == "one_pass"
    laid_out = cublas.lay_out(torch.empty(24, 1024, dtype=torch.bfloat16), b)
    assert backends.product_owner(laid_out[0], *laid_out) == ("cublas", "concatenated")
    monkeypatch.setattr(backends, "BACKEND", "triton")
    assert backends.product_owner(laid_out[0], *laid_out) == ("linear", "one_pass") == ("linear", owner(4096))


def test_a_wrong_argument_is_named_before_any_launch():
    problem = make((6, 20, 12, 4, 5), torch.float32, slots="mixed")
    checked = backends._checked("linear", backends._triton_owner("linear"))
    problem.weight = problem.weight[:, :-1]
    with recorded_launches() as launches, pytest.raises(ValueError, match=r"weight: expected shape \[N=12, K=20\]"):
        checked(*problem.forward_args())
    assert launches == []
