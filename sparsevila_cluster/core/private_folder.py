"""Folders that only this user may look into: new ones that go with their process, and checks of those that others name."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

# Named so that no folder of another program is taken for one of ours that was left behind.
LOCK = "sparsevila.lock"


def own_folder(prefix: str, parent: str | None = None) -> tuple[Path, int]:
    """(a new folder of mode 0700, the descriptor of its locked file), below `parent`, or where temporary files go.

    Deletes such folders of processes that are gone: the lock ends with the process, however it ends, so that whoever can take it
    knows that nobody uses the folder. Close the descriptor once the folder is deleted. Raises OSError.
    """
    for path in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and not path.is_symlink():
                fd = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    fd = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(folder / f"{LOCK}.new", folder / LOCK)  # it is seen locked or not at all
    return folder, fd


def check_private(folder: Path) -> None:
    """Raises PermissionError, which says what is wrong: a link, no folder, another user's, or open to others."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise PermissionError(f"it must be a folder, and no link to one, but has the mode {stat.filemode(facts.st_mode)}")
    if facts.st_uid != os.getuid():
        raise PermissionError(f"it must belong to user {os.getuid()}, but is user {facts.st_uid}'s")
    if facts.st_mode & 0o077:
        raise PermissionError(f"its mode must be 0700, but is {stat.S_IMODE(facts.st_mode):04o}: others could read uploads")
