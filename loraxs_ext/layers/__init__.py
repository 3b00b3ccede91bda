"""Layers: where R lives, how a batch is routed to adapters, how adapters are merged. Knows nothing of where bases come
from."""

from .core import Core, CoreMatrix, initial_core
from .layer import BasisPolicy, LoraXSLayer
from .linear import LoraXSLinear
from .merge import MergeLossWarning, delta_weight, rounding_loss
from .routing import BASE, Route, build_route, routed
from .stacked import SharedProjection, share_projections
from .tiny import TinyCore, TinyOptions, group_of, tie

__all__ = [
    "BASE",
    "BasisPolicy",
    "Core",
    "CoreMatrix",
    "LoraXSLayer",
    "LoraXSLinear",
    "MergeLossWarning",
    "Route",
    "SharedProjection",
    "TinyCore",
    "TinyOptions",
    "build_route",
    "delta_weight",
    "group_of",
    "initial_core",
    "rounding_loss",
    "routed",
    "share_projections",
    "tie",
]
