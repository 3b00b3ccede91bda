"""Where a million R matrices sleep: rows and their layouts, the catalogue on disk, pages on the device."""

from __future__ import annotations

from .layout import RowLayout as RowLayout
from .layout import Segment as Segment
from .pager import Lease as Lease
from .pager import Pager as Pager
from .row import AdapterRow as AdapterRow
from .row import RowSource as RowSource
from .slab import Slab as Slab
