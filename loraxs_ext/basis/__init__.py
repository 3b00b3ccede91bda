"""Where A and B come from: converged singular vectors of the frozen weights, their fingerprint, a cache on disk."""

from .decomposition import decompose as decompose
from .extension import extend as extend
from .factors import Factors as Factors
from .fingerprints import fingerprint as fingerprint
from .orthonormal import orthonormalize as orthonormalize
from .recipe import Recipe as Recipe
from .sketching import compare_sketch as compare_sketch
from .sketching import sketch as sketch
from .svd import SVD as SVD
from .svd import Diagnostics as Diagnostics
from .svd import randomized_svd as randomized_svd
