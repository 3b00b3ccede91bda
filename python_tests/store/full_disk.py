"""A process whose files may not grow, as if the disk were full; for `test_damage`.

`python -m python_tests.store.full_disk FOLDER` puts, compacts, exports and creates with the store FOLDER/store and
prints as JSON what it was told, which adapters it has put, and whether they are there.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from loraxs_ext.checkpoint.packing import unpack
from loraxs_ext.store import AdapterStore

from . import stores


def limit(size: int) -> None:
    # Python ignores the signal that comes with it; what is written beyond is an OSError.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def main(folder: Path) -> None:
    with AdapterStore(folder / "store") as store:
        names, said = list(store), {}

        def put_many_times() -> None:
            for i in count():
                store.put(stores.row(f"more {i}"))
                names.append(f"more {i}")

        actions: dict[str, Callable[[], object]] = {
            "put": put_many_times,
            "compact": lambda: store.compact(folder / "copy"),
            "export": lambda: unpack(store, names[0], folder / "copy"),
            "create": lambda: stores.create(folder / "copy"),
        }
        for name, action in actions.items():
            limit((store.path / "data.mdb").stat().st_size if name == "put" else 1000)
            try:
                action()
            except OSError as reason:
                said[name] = str(reason)
        # It goes on reading, and the state is that of the last commit.
        whole = list(store) == sorted(names) and store.check() == []
        limit(resource.RLIM_INFINITY)
        # And writing, once there is room.
        store.put(stores.row("last"))
    print(json.dumps({"said": said, "names": names, "whole": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
