"""What each op is called with, and what it gives back: schema, shapes, dtypes and error messages, written once.

Letters: M tokens (product of the leading dimensions of x), K d_in, N d_out, r rank, S slots. The eager check of every
Python owner, the fake kernels, tests and benchmarks read the same table. The C++ owners check the same conditions
again where memory safety begins (`csrc/glue`).

Arguments may have any strides. Pages that are contiguous within each [r, r] are read where they lie, at 64-bit offsets,
whatever the distance between them: the view `rows[:, o : o + r * r].view(S, r, r)` of a slab costs no copy. Any other
layout of pages may cost a copy of all of them. The gradient of pages is contiguous.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("loraxs", "DEF")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class OpContract(NamedTuple):
    """Schema of an op and the shapes of its tensor arguments: `*` any leading dimensions, `?` optional."""

    schema: str
    shapes: str


OPS: Mapping[str, OpContract] = {
    "linear": OpContract(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor pages, Tensor? slots, float scale, "
        "float p_drop=0., Tensor? rng=None) -> (Tensor y, Tensor p)",
        "x[*,K] weight[N,K] bias?[N] a[r,K] b[N,r] pages[S,r,r] slots?[M] rng?[2]",
    ),
    "linear_backward": OpContract(
        "(Tensor dy, Tensor? weight, Tensor a, Tensor b, Tensor pages, Tensor? slots, Tensor p, float scale, "
        "float p_drop, Tensor? rng, bool need_dx, bool need_dpages) -> (Tensor dx, Tensor dpages)",
        "dy[*,N] weight?[N,K] a[r,K] b[N,r] pages[S,r,r] slots?[M] p[M,r] rng?[2]",
    ),
    "add_delta_": OpContract(
        "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor pages, Tensor? slots, float scale, float p_drop=0., "
        "Tensor? rng=None) -> ()",
        "x[*,K] y[*,N] a[r,K] b[N,r] pages[S,r,r] slots?[M] rng?[2]",
    ),
    "add_delta": OpContract(
        "(Tensor y, Tensor x, Tensor a, Tensor b, Tensor pages, Tensor? slots, float scale, float p_drop=0., "
        "Tensor? rng=None) -> (Tensor out, Tensor p)",
        "x[*,K] y[*,N] a[r,K] b[N,r] pages[S,r,r] slots?[M] rng?[2]",
    ),
    "project": OpContract("(Tensor x, Tensor a) -> Tensor p", "x[*,K] a[r,K]"),
    "linear_projected": OpContract(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor p, Tensor a, Tensor b, Tensor pages, Tensor? slots, "
        "float scale) -> Tensor y",
        "x[*,K] weight[N,K] bias?[N] a[r,K] b[N,r] pages[S,r,r] slots?[M] p[M,r]",
    ),
    "row_scale": OpContract(
        "(Tensor rho, Tensor b, Tensor pages, Tensor? sigma, Tensor m, float scale, Tensor? c=None, "
        "Tensor? root=None, bool through_norm=False) -> (Tensor g, Tensor inverse_norm)",
        "b[N,r] rho[N] pages[S,r,r] sigma?[r] m[S,N] c?[N,r] root?[r,r]",
    ),
    "rescale": OpContract(
        "(Tensor z, Tensor g, Tensor? slots, Tensor? bias) -> Tensor y", "z[*,N] g[S,N] slots?[M] bias?[N]"
    ),
    "rescale_backward": OpContract(
        "(Tensor dy, Tensor? z, Tensor g, Tensor? slots, bool need_dz) -> (Tensor dz, Tensor dg)",
        "dy[*,N] z?[*,N] g[S,N] slots?[M]",
    ),
    "gram_product": OpContract("(Tensor x, Tensor weight) -> Tensor", "x[batch,l,n] weight[batch,m,n]"),
    "orthonormalize": OpContract("(Tensor Y) -> Tensor", "Y[batch,n,k]"),
    "randomized_svd": OpContract(
        "(Tensor W, int rank, int n_oversamples=32, float tol=0.001, int max_iter=100, int seed=0) -> "
        "(Tensor U, Tensor S, Tensor Vh)",
        "W[batch,N,K]",
    ),
}

# The same kernels under a second name that no autograd is registered for. Eager code calls these, because the layer
# that `register_autograd` puts around an op costs as much as the op's own overhead, even when no gradient is wanted.
UNWRAPPED = {name: f"_{name}" for name in ("linear", "add_delta", "linear_projected", "row_scale", "rescale")}

for _name, _op in OPS.items():
    LIBRARY.define(_name + _op.schema)
    if _name in UNWRAPPED:
        LIBRARY.define(UNWRAPPED[_name] + _op.schema)
# `linear` without p, which only a backward needs: at one token on the CPU, a second tensor is 2 % of the call.
LIBRARY.define("_linear_output" + OPS["linear"].schema.replace("(Tensor y, Tensor p)", "Tensor y"))
# The CUDA kernel for few tokens: the owner of `linear` on a GPU calls it where it fits (see backends.py).
LIBRARY.define("_linear_decode" + OPS["linear"].schema)
# `linear` on the CPU with all but x and the slots found out before (see prepared.py). No id is 0.
LIBRARY.define("_prepare(Tensor[] weight, Tensor[] bias, Tensor[] a, Tensor[] b, Tensor[] pages, float scale) -> int")
LIBRARY.define("_run_prepared(Tensor x, Tensor slots, int id) -> Tensor[]")
LIBRARY.define("_forget(int id) -> ()")
# One pass of `orthonormalize` over blocks of few rows Y [batch, k, n] on the CPU: rows, and the smallest pivot of each.
LIBRARY.define("_cholesky_qr(Tensor Y) -> (Tensor Q, Tensor pivots)")
# The small eigenproblems of the decompositions, A [batch, l, l] in fp64 (see eigh.py).
LIBRARY.define("_eigh(Tensor A) -> (Tensor values, Tensor vectors)")

_SHAPE = re.compile(r"(\w+)(\??)\[([^\]]*)\]")
_SHAPES = {
    op: [(name, bool(optional), dims.split(",")) for name, optional, dims in _SHAPE.findall(entry.shapes)]
    for op, entry in OPS.items()
}
# The arguments that carry activations and weights share one dtype; what is absent here has a rule of its own below.
_SAME_DTYPE = ("x", "dy", "y", "z", "weight", "bias", "a", "b", "Y", "W")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of p: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(op: str) -> list[str]:
    """The names of the tensor arguments of `op`."""
    return [name for name, _, _ in _SHAPES[op]]


def table_of(op: str) -> str:
    """The name of the argument [S, ...] that slots choose from."""
    return next(name for name, _, dims in _SHAPES[op] if dims[0] == "S")


def check(op: str, p_drop: float = 0.0, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming the argument, what was expected and what came, unless all fit the contract of `op`.

    Args:
        op: a key of `OPS`.
        p_drop: dropout probability; `rng` is required exactly when it is positive.
        tensors: every tensor argument of the op by its name.
    """
    sizes: dict[str, int] = {}
    lead: tuple[int, ...] | None = None
    first: tuple[str, torch.dtype, torch.device] | None = None
    for name, optional, dims in _SHAPES[op]:
        tensor = tensors[name]
        if tensor is None:
            if not optional:
                raise ValueError(f"loraxs::{op}: {name}: expected a tensor, got None")
            continue
        shape = tuple(tensor.shape)
        if first is None:
            if tensor.dtype not in FLOATS:
                expected = ", ".join(map(str, FLOATS))
                raise ValueError(f"loraxs::{op}: {name}: expected a dtype of {expected}, got {tensor.dtype}")
            first = (name, tensor.dtype, tensor.device)
        if dims[0] == "*":
            dims = dims[1:]
            if len(shape) < 1:
                raise ValueError(f"loraxs::{op}: {name}: expected shape [..., {dims[0]}], got []")
            if lead is not None and shape[:-1] != lead:
                raise ValueError(f"loraxs::{op}: {name}: expected leading dimensions {list(lead)}, got {list(shape)}")
            lead, shape = shape[:-1], shape[-1:]
            sizes.setdefault("M", _product(lead))
        if len(shape) != len(dims) or any(_bind(sizes, d, n) != n for d, n in zip(dims, shape, strict=True)):
            expected = ", ".join(f"{d}={sizes[d]}" if d in sizes and not d.isdigit() else d for d in dims)
            raise ValueError(f"loraxs::{op}: {name}: expected shape [{expected}], got {list(shape)}")
        if tensor.device != first[2]:
            raise ValueError(f"loraxs::{op}: {name}: expected device {first[2]} (as {first[0]}), got {tensor.device}")
        _check_dtype(op, name, tensor.dtype, *first[:2])
    if sizes.get("r", 1) < 1:
        raise ValueError(f"loraxs::{op}: {'a' if 'a' in tensors else 'b'}: expected a rank of at least 1, got 0")
    if sizes.get("S", 1) < 1:
        raise ValueError(f"loraxs::{op}: {table_of(op)}: expected at least one slot, got 0")
    if op == "orthonormalize" and sizes["k"] > sizes["n"]:
        raise ValueError(f"loraxs::{op}: Y: expected at most n={sizes['n']} columns of length n, got {sizes['k']}")
    if op == "row_scale":
        _check_one_form(tensors["sigma"], tensors["c"], tensors["root"])
    if not 0.0 <= p_drop < 1.0:
        raise ValueError(f"loraxs::{op}: p_drop: expected a probability in [0, 1), got {p_drop}")
    if p_drop > 0.0 and tensors["rng"] is None:
        raise ValueError(f"loraxs::{op}: rng: expected int64 [2] = (seed, offset) because p_drop is {p_drop}, got None")


def _check_one_form(sigma: Tensor | None, c: Tensor | None, root: Tensor | None) -> None:
    """c and root describe any basis together; sigma describes a converged one."""
    if (c is None) != (root is None):
        given, missing = ("c", "root") if root is None else ("root", "c")
        raise ValueError(f"loraxs::row_scale: {missing}: expected a tensor because {given} is given, got None")
    if c is not None and sigma is not None:
        raise ValueError("loraxs::row_scale: sigma: expected None because c and root are given, got a tensor")


def _bind(sizes: dict[str, int], dim: str, n: int) -> int:
    """The size of `dim`: a number stands for itself, a letter for the first size it met."""
    return int(dim) if dim.isdigit() else sizes.setdefault(dim, n)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count = count * n
    return count


def _check_dtype(op: str, name: str, dtype: torch.dtype, first: str, first_dtype: torch.dtype) -> None:
    if name in _SAME_DTYPE:
        allowed: tuple[torch.dtype, ...] = (first_dtype,)
    elif name in ("pages", "m", "g"):
        allowed = (first_dtype, torch.float32)
    elif name in ("p", "rho", "sigma", "c", "root"):
        allowed = (accumulate_dtype(first_dtype),)
    else:
        allowed = (torch.int32,) if name == "slots" else (torch.int64,)
    if dtype not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"loraxs::{op}: {name}: expected dtype {expected} (for {first} in {first_dtype}), got {dtype}")


@torch.library.register_fake("loraxs::_linear_decode", lib=LIBRARY)
@torch.library.register_fake("loraxs::_linear", lib=LIBRARY)
@torch.library.register_fake("loraxs::linear", lib=LIBRARY)
def _linear_fake(x, weight, bias, a, b, pages, slots, scale, p_drop=0.0, rng=None):
    check("linear", p_drop, x=x, weight=weight, bias=bias, a=a, b=b, pages=pages, slots=slots, rng=rng)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _fake_p(x, a)


@torch.library.register_fake("loraxs::_linear_output", lib=LIBRARY)
def _linear_output_fake(*args):
    return _linear_fake(*args)[0]


@torch.library.register_fake("loraxs::linear_backward", lib=LIBRARY)
def _linear_backward_fake(dy, weight, a, b, pages, slots, p, scale, p_drop, rng, need_dx, need_dpages):
    check("linear_backward", p_drop, dy=dy, weight=weight, a=a, b=b, pages=pages, slots=slots, p=p, rng=rng)
    dx = dy.new_empty(*dy.shape[:-1], a.shape[1]) if need_dx else dy.new_empty(0)
    return dx, pages.new_empty(pages.shape) if need_dpages else pages.new_empty(0)


@torch.library.register_fake("loraxs::add_delta_", lib=LIBRARY)
def _add_delta_inplace_fake(y, x, a, b, pages, slots, scale, p_drop=0.0, rng=None):
    check("add_delta_", p_drop, y=y, x=x, a=a, b=b, pages=pages, slots=slots, rng=rng)


@torch.library.register_fake("loraxs::_add_delta", lib=LIBRARY)
@torch.library.register_fake("loraxs::add_delta", lib=LIBRARY)
def _add_delta_fake(y, x, a, b, pages, slots, scale, p_drop=0.0, rng=None):
    check("add_delta", p_drop, y=y, x=x, a=a, b=b, pages=pages, slots=slots, rng=rng)
    return y.new_empty(y.shape), _fake_p(x, a)


@torch.library.register_fake("loraxs::_row_scale", lib=LIBRARY)
@torch.library.register_fake("loraxs::row_scale", lib=LIBRARY)
def _row_scale_fake(rho, b, pages, sigma, m, scale, c=None, root=None, through_norm=False):
    check("row_scale", rho=rho, b=b, pages=pages, sigma=sigma, m=m, c=c, root=root)
    return m.new_empty(m.shape), m.new_empty(m.shape, dtype=rho.dtype)


@torch.library.register_fake("loraxs::_rescale", lib=LIBRARY)
@torch.library.register_fake("loraxs::rescale", lib=LIBRARY)
def _rescale_fake(z, g, slots, bias):
    check("rescale", z=z, g=g, slots=slots, bias=bias)
    return z.new_empty(z.shape)


@torch.library.register_fake("loraxs::rescale_backward", lib=LIBRARY)
def _rescale_backward_fake(dy, z, g, slots, need_dz):
    check("rescale_backward", dy=dy, z=z, g=g, slots=slots)
    return dy.new_empty(dy.shape if need_dz else 0), g.new_empty(g.shape if z is not None else 0)


@torch.library.register_fake("loraxs::project", lib=LIBRARY)
def _project_fake(x, a):
    check("project", x=x, a=a)
    return _fake_p(x, a)


@torch.library.register_fake("loraxs::_linear_projected", lib=LIBRARY)
@torch.library.register_fake("loraxs::linear_projected", lib=LIBRARY)
def _linear_projected_fake(x, weight, bias, p, a, b, pages, slots, scale):
    check("linear_projected", x=x, weight=weight, bias=bias, p=p, a=a, b=b, pages=pages, slots=slots)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("loraxs::gram_product", lib=LIBRARY)
def _gram_product_fake(x, weight):
    check("gram_product", x=x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("loraxs::orthonormalize", lib=LIBRARY)
def _orthonormalize_fake(Y):
    check("orthonormalize", Y=Y)
    return Y.new_empty(Y.mT.shape, dtype=accumulate_dtype(Y.dtype)).mT


@torch.library.register_fake("loraxs::_eigh", lib=LIBRARY)
def _eigh_fake(A):
    check_symmetric(A)
    return A.new_empty(A.shape[:-1]), A.new_empty(A.shape).mT


@torch.library.register_fake("loraxs::randomized_svd", lib=LIBRARY)
def _randomized_svd_fake(W, rank, n_oversamples=32, tol=1e-3, max_iter=100, seed=0):
    check("randomized_svd", W=W)
    check_rank(W, rank)
    batch, N, K = W.shape
    dtype = accumulate_dtype(W.dtype)
    return (
        W.new_empty(batch, rank, N, dtype=dtype).mT,
        W.new_empty(batch, rank, dtype=dtype),
        W.new_empty(batch, rank, K, dtype=dtype),
    )


def check_symmetric(A: Tensor) -> None:
    """Raise ValueError unless A is fp64 [batch, l, l]; that it is symmetric is not looked at."""
    if A.dtype != torch.float64:
        raise ValueError(f"loraxs::_eigh: A: expected dtype torch.float64, got {A.dtype}")
    if A.dim() != 3 or A.shape[1] != A.shape[2]:
        raise ValueError(f"loraxs::_eigh: A: expected shape [batch, l, l], got {list(A.shape)}")


def check_rank(W: Tensor, rank: int) -> None:
    """Raise ValueError unless the matrices W [batch, N, K] have `rank` singular triplets."""
    if not 1 <= rank <= min(W.shape[1:]):
        raise ValueError(f"loraxs::randomized_svd: rank: expected 1 to {min(W.shape[1:])} = min(N, K), got {rank}")


def _fake_p(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(_product(tuple(x.shape[:-1])), a.shape[0], dtype=accumulate_dtype(x.dtype))
