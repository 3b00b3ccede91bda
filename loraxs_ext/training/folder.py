"""The folder of a run: what it was started with, checkpoints that are complete, the adapter and the results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from loraxs_ext.files import atomic_folder, read_json, sync_folder, write_json

from .fields import flatten
from .settings import differences

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_COMPLETE = "complete.json"
# Where these differ, the weights that come out do not.
_FREE = ("output", "preset", "data.test", "data.answer", "training.eval_batch", "training.cpu")


class RunFolder:
    """An output folder.

    Attributes:
        path: the folder.
        adapter: its subfolder with the trained adapter.
        result: the JSON file that says that the training is finished, and with what.
        tensorboard: where the curves go.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.result = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"
        self._started_with = self.path / "run.json"

    def claim(self, settings: Mapping[str, Any], contents: Mapping[str, str]) -> bool:
        """Note what the run is started with, or compare it with what it was started with.

        Args:
            settings: `Run.to_dict()`.
            contents: digests of the data files by field.

        Returns:
            Whether it was noted now.

        Raises:
            ValueError: the folder belongs to another run; the message names the differences.
        """
        tied = {k: v for k, v in flatten(settings).items() if k not in _FREE and not k.startswith("generation.")}
        wanted = {"settings": tied, "contents of": dict(contents)}
        if self._started_with.exists():
            changes = differences(read_json(self._started_with), json.loads(json.dumps(wanted)))
            if changes:
                raise ValueError(
                    f"output: {self.path} was started with other settings; go on with the old ones or choose another "
                    f"folder:\n  " + "\n  ".join(line.removeprefix("settings.") for line in changes)
                )
            return False
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"output: expected a new or empty folder, or one of `loraxs train`, got {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._started_with, wanted)
        return True

    @contextmanager
    def attempt(self, new: bool) -> Iterator[None]:
        """Work on the run; where that fails, a new run of which nothing has come leaves the folder to other settings.

        Args:
            new: whether `claim` noted the run now.
        """
        try:
            yield
        except BaseException:
            # A wrong name or a batch that does not fit should not cost the folder.
            if new and set(self.path.iterdir()) <= {self._started_with, self.tensorboard}:
                shutil.rmtree(self.tensorboard, ignore_errors=True)
                self._started_with.unlink(missing_ok=True)
            raise

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; newer ones that a kill left incomplete are removed."""
        for checkpoint in reversed(self._checkpoints()):
            if (checkpoint / _COMPLETE).exists():
                return checkpoint
            shutil.rmtree(checkpoint)
        return None

    def complete(self, step: int, facts: Mapping[str, Any], keep: str | None) -> None:
        """Declare the checkpoint of `step` complete, then remove the older ones.

        Args:
            step: optimiser steps done.
            facts: noted in it; `facts_of` reads them.
            keep: folder of the best checkpoint, which stays.
        """
        newest = self.path / f"checkpoint-{step}"
        sync_folder(newest)
        write_json(newest / _COMPLETE, facts)
        kept = {newest.name, Path(keep).name if keep else newest.name}
        for checkpoint in self._checkpoints():
            if checkpoint.name not in kept:
                shutil.rmtree(checkpoint)

    @staticmethod
    def facts_of(checkpoint: Path) -> dict[str, Any]:
        """What was noted when the checkpoint was completed."""
        return read_json(checkpoint / _COMPLETE)

    def remove_checkpoints(self) -> None:
        """Remove all of them, once the result is written."""
        for checkpoint in self._checkpoints():
            shutil.rmtree(checkpoint)

    def new_adapter(self) -> AbstractContextManager[Path]:
        """A folder to save the adapter in; see `atomic_folder`."""
        return atomic_folder(self.adapter, overwrite=True)

    def _checkpoints(self) -> list[Path]:
        found = [(int(m[1]), p) for p in self.path.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
        return [path for _, path in sorted(found)]
