"""The pseudo-random vectors of the ops, under the name by which this room uses them."""

from loraxs_ext.ops.probes import ANCHOR as ANCHOR
from loraxs_ext.ops.probes import COMPLETION as COMPLETION
from loraxs_ext.ops.probes import PERMUTATION as PERMUTATION
from loraxs_ext.ops.probes import PROBE_STD as PROBE_STD
from loraxs_ext.ops.probes import PROBE_U as PROBE_U
from loraxs_ext.ops.probes import PROBE_V as PROBE_V
from loraxs_ext.ops.probes import SIGN as SIGN
from loraxs_ext.ops.probes import START as START
from loraxs_ext.ops.probes import probes as probes
