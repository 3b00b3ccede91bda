"""Where a million R matrices sleep: rows and their layouts, the catalogue on disk, pages on the device."""

from __future__ import annotations

from .catalogue import AdapterStore as AdapterStore
from .catalogue import VersionConflict as VersionConflict
from .layout import RowLayout as RowLayout
from .layout import Segment as Segment
from .manifest import Manifest as Manifest
from .pager import Lease as Lease
from .pager import Pager as Pager
from .record import DamagedRecord as DamagedRecord
from .rounding import dequantise as dequantise
from .rounding import in_dtype as in_dtype
from .rounding import quantise as quantise
from .row import AdapterRow as AdapterRow
from .row import RowSource as RowSource
from .slab import Slab as Slab
