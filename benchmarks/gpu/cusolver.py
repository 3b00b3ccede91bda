"""cuSOLVER's randomised SVD, cusolverDnXgesvdr, from the library that torch itself has loaded.

CuPy, up to version 14, has no binding of this function, so the C interface of cusolverDn.h is called.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from ctypes import c_byte, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

# The SONAME of CUDA 13's library, and that of CUDA 12's. By name, the loader finds the copy that torch's solvers use.
LIBRARIES = ("libcusolver.so.12", "libcusolver.so.11")
CUDA_R_32F = 0
COMPUTE = ord("S")

_POINTERS = [c_int, c_void_p, c_int64]
# handle, params, jobu, jobv, m, n, k, p, niters, then A, Srand, Urand and Vrand by type and address, and computeType.
_PROBLEM = [c_void_p, c_void_p, c_byte, c_byte, *[c_int64] * 5, *_POINTERS, c_int, c_void_p, *_POINTERS * 2, c_int]
_SIGNATURES = {
    "cusolverDnCreate": [c_void_p],
    "cusolverDnCreateParams": [c_void_p],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    "cusolverDnXgesvdr_bufferSize": [*_PROBLEM, c_void_p, c_void_p],
    "cusolverDnXgesvdr": [*_PROBLEM, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p],
}


class NotAvailable(Exception):
    """Why the function cannot be called here, or must not be timed."""


class Xgesvdr:
    """Left singular vectors by cusolverDnXgesvdr; the handles live as long as the process.

    Args:
        device: a CUDA device.
        library: what offers the C functions; the default looks for cuSOLVER.

    Raises:
        NotAvailable: no library or no function, an error of cuSOLVER, or a wrong result for a matrix of low rank.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        if library is None:
            if device.type != "cuda":
                raise NotAvailable("needs a CUDA device")
            library = _load()
        self.device = device
        self.functions = {}
        for name, types in _SIGNATURES.items():
            try:
                self.functions[name] = getattr(library, name)
            except AttributeError:
                raise NotAvailable(f"this cuSOLVER has no {name}") from None
            self.functions[name].argtypes, self.functions[name].restype = types, c_int
        self.handle, self.params = c_void_p(), c_void_p()
        self._call("cusolverDnCreate", ctypes.byref(self.handle))
        self._call("cusolverDnCreateParams", ctypes.byref(self.params))
        self._check()

    def __call__(self, W: Tensor, rank: int, n_oversamples: int, niter: int) -> Tensor:
        """[N, rank] orthonormal columns for W [N, K] in fp32, which is copied; waits for the device.

        Raises:
            NotAvailable: cuSOLVER reports an error.
        """
        N, K = W.shape
        # Rows in torch are columns there: a copy with rows of the longer side is its tall m × n matrix, to be used up.
        A = (W if K >= N else W.mT).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        n, m = A.shape
        U, V, S = A.new_empty(rank, m), A.new_empty(rank, n), A.new_empty(rank)
        more = min(n_oversamples, n - rank)
        problem = (
            self.handle, self.params, COMPUTE, COMPUTE, m, n, rank, more, niter,
            CUDA_R_32F, A.data_ptr(), m, CUDA_R_32F, S.data_ptr(), CUDA_R_32F, U.data_ptr(), m,
            CUDA_R_32F, V.data_ptr(), n, CUDA_R_32F,
        )  # fmt: skip
        on_device, on_host, info = c_size_t(), c_size_t(), torch.zeros(1, dtype=torch.int32, device=A.device)
        if A.is_cuda:
            self._call("cusolverDnSetStream", self.handle, torch.cuda.current_stream(A.device).cuda_stream)
        self._call("cusolverDnXgesvdr_bufferSize", *problem, ctypes.byref(on_device), ctypes.byref(on_host))
        workspace = torch.empty(max(on_device.value, 1), dtype=torch.uint8, device=A.device)
        host = ctypes.create_string_buffer(max(on_host.value, 1))
        self._call(
            "cusolverDnXgesvdr", *problem, workspace.data_ptr(), on_device.value, host, on_host.value, info.data_ptr()
        )
        if int(info) != 0:
            raise NotAvailable(f"cusolverDnXgesvdr: info is {int(info)}")
        return (V if K >= N else U).mT

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            status = self.functions[name](*arguments)
        if status != 0:
            raise NotAvailable(f"{name} returned status {status}")

    def _check(self) -> None:
        """There is no figure for a function that does not find the span of a matrix of rank 8."""
        generator = torch.Generator().manual_seed(0)
        for N, K in ((96, 64), (64, 96)):
            left, right = (torch.randn(n, 8, generator=generator) for n in (N, K))
            W = left @ right.mT
            found = self(W.to(self.device), 8, 8, 2).cpu()
            missed = float((W - found @ (found.mT @ W)).norm() / W.norm())
            if not missed < 1e-4:
                raise NotAvailable(f"cusolverDnXgesvdr misses {missed:.1e} of a {N} × {K} matrix of rank 8")


def _load() -> ctypes.CDLL:
    reasons = []
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise NotAvailable("; ".join(reasons))
