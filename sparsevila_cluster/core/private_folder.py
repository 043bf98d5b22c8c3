"""Folders that only this user may look into: new ones that go with their process, and checks of those that others name.

Also files that nobody else may write.
"""

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


def read_trusted(path: Path, most_bytes: int) -> bytes:
    """The bytes of a file that nobody but this user and root can have written, links followed.

    Raises:
        PermissionError: says what is wrong. OSError: it cannot be read, or has more than `most_bytes`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # the second, for what is no file: a pipe would be waited for
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise PermissionError(f"it must be a file, but has the mode {stat.filemode(facts.st_mode)}")
        _check_unwritable("it", facts)
        # Who may write a folder may put another file there, or another link; in a sticky one only in the place of what is theirs.
        for folder in {path.absolute().parent, path.resolve().parent}:
            about = folder.stat()
            _check_unwritable(f"its folder {str(folder)!r}", about, sticky=bool(about.st_mode & stat.S_ISVTX))
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(f"it has more than {most_bytes} bytes")
    return data


def _check_unwritable(what: str, facts: os.stat_result, sticky: bool = False) -> None:
    if facts.st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{what} must belong to user {os.getuid()} or root, but is user {facts.st_uid}'s")
    if facts.st_mode & 0o022 and not sticky:
        mode = stat.S_IMODE(facts.st_mode)
        raise PermissionError(f"{what} has the mode {mode:04o}: others could write it; legal: no w for group and others")
