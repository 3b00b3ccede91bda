"""Where A and B come from: converged singular vectors of the frozen weights, their fingerprint, a cache on disk."""

from .anchor import Anchor as Anchor
from .anchor import fit_error as fit_error
from .anchor import make_anchor as make_anchor
from .anchor import rotate_onto as rotate_onto
from .basis_file import BasisFile as BasisFile
from .basis_file import write_basis_file as write_basis_file
from .decomposition import decompose as decompose
from .distributed import across_ranks as across_ranks
from .distributed import decompose_across as decompose_across
from .extension import extend as extend
from .factors import Factors as Factors
from .fingerprints import fingerprint as fingerprint
from .orthonormal import orthonormalize as orthonormalize
from .recipe import Recipe as Recipe
from .sketching import compare_sketch as compare_sketch
from .sketching import compare_sketches as compare_sketches
from .sketching import sketch as sketch
from .svd import SVD as SVD
from .svd import Diagnostics as Diagnostics
from .svd import randomized_svd as randomized_svd
