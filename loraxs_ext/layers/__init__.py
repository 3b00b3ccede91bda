"""Layers: where R lives, how a batch is routed to adapters, how adapters are merged. Knows nothing of where bases come
from."""

from .conv import LoraXSConv
from .core import Core, CoreMatrix, initial_core, seeded_generator
from .embedding import LoraXSEmbedding
from .experts import ParamWrapper
from .layer import BasisPolicy, LoraXSLayer
from .linear import LoraXSLinear
from .merge import MergeLossWarning, delta_weight, rounding_loss
from .opaque import LoraXSOpaque
from .probing import pass_gradients
from .repacking import guard_packed_weights
from .routing import BASE, Route, Rows, build_route, following, routed
from .sharding import complete
from .stacked import SharedProjection, share_projections
from .tiny import TinyCore, TinyOptions, group_of, tie
from .together import Known, fuse

__all__ = [
    "BASE",
    "BasisPolicy",
    "Core",
    "CoreMatrix",
    "Known",
    "LoraXSConv",
    "LoraXSEmbedding",
    "LoraXSLayer",
    "LoraXSLinear",
    "LoraXSOpaque",
    "MergeLossWarning",
    "ParamWrapper",
    "Route",
    "Rows",
    "SharedProjection",
    "TinyCore",
    "TinyOptions",
    "build_route",
    "complete",
    "delta_weight",
    "following",
    "fuse",
    "group_of",
    "guard_packed_weights",
    "initial_core",
    "pass_gradients",
    "rounding_loss",
    "routed",
    "seeded_generator",
    "share_projections",
    "tie",
]
