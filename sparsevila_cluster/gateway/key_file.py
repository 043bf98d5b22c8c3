"""The file of API keys, as it was when it was last right."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sparsevila_cluster.core.api_keys import ApiKeyEntry, parse_api_keys, read_key_file
from sparsevila_cluster.core.errors import BadConfig

# A file may change again within one tick of the clock of its times; until it is older than this, it is read once more.
TICK_NS = 100_000_000


class KeyFile:
    """`entries` are those of the last good state. Its methods wait for the disk: not for an event loop. One thread at a time."""

    def __init__(self, path: str):
        """Raises BadConfig: the file cannot be read, others may write it, or an entry is wrong."""
        self._path = Path(path)
        self._seen = self._look()
        self._data = read_key_file(path)
        self._problem = ""
        self.entries: tuple[ApiKeyEntry, ...] = parse_api_keys(self._data, path)

    def refresh(self) -> bool:
        """Look at the file, and read it if it may have changed; whether `entries` are others now.

        Raises:
            BadConfig: what is wrong with the file, once; `entries` stay as they are.
        """
        looked = self._look()
        if looked is not None and looked == self._seen and time.time_ns() - looked[0] > TICK_NS:
            return False
        self._seen = looked
        try:
            data = read_key_file(self._path)
            entries = self.entries if data == self._data else parse_api_keys(data, self._path)
        except BadConfig as error:
            is_new, self._problem = str(error) != self._problem, str(error)
            if is_new:
                raise
            return False
        is_other = entries != self.entries
        self._data, self._problem, self.entries = data, "", entries
        return is_other

    def _look(self) -> tuple[int, int, int, int] | None:
        """What changes with the file: times in ns, inode, bytes. None: there is none."""
        try:
            facts = os.stat(self._path)
        except OSError:
            return None
        return max(facts.st_mtime_ns, facts.st_ctime_ns), facts.st_mtime_ns, facts.st_ino, facts.st_size
