"""API keys as a file holds them: by hash, with tenant, role and expiry.

Also how keys are made, and how the file is read and changed. It is YAML:

keys:
- name: acme-phone                       # in logs; no two alike
  hash: 6f0c...                          # 64 hex digits, `printf %s KEY | b2sum -l 256`
  tenant: acme
  role: user                             # or admin
  expires: 2027-01-31T00:00:00Z          # UTC where no offset is named; null: never
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sparsevila_cluster.core.config import MIB, FrozenConfig, explain
from sparsevila_cluster.core.errors import BadConfig, BadRequest, NotFound, Unavailable
from sparsevila_cluster.core.private_folder import read_trusted

Role = Literal["user", "admin"]

# What tells one of our keys from other secrets, for people and for scanners of logs and repositories.
KEY_PREFIX = "sv_"
KEY_BYTES = 32
MAX_FILE_BYTES = 4 * MIB
# How long to wait for another command that changes the same file.
LOCK_WAIT_S = 10.0
_HEADER = "# API keys by hash; written by `sparsevila keys`, which keeps no other comments.\n"


class ApiKeyEntry(FrozenConfig):
    """One key."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Its name in logs.")
    # Hidden in messages: somebody may have put the key itself here.
    hash: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False, description="BLAKE2b-256 of the key, in hex.")
    tenant: str = Field(min_length=1, max_length=200, description="Whose it is.")
    role: Role = Field("user", description="admin: sees what the server tells of everybody.")
    expires: datetime | None = Field(None, description="From when on it is refused. None: never.")

    @field_validator("expires", mode="before")
    @classmethod
    def _is_date(cls, value: object) -> object:
        if isinstance(value, int | float):
            raise ValueError("should be an ISO date-time or null")
        return value

    @field_validator("expires")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)

    def is_over(self, now_s: float) -> bool:
        """Whether it has expired at `now_s` of `time.time`."""
        return self.expires is not None and self.expires.timestamp() <= now_s


def make_api_key() -> str:
    """A new key: 256 random bits, written in 46 characters."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_api_key(key: str) -> str:
    """BLAKE2b-256 in hex.

    Once and unsalted: a key is 256 random bits, so that nobody can try them all, nor have a table of them. The slow salted hashes
    that passwords need would cost time at every call, and protect nothing more.
    """
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).hexdigest()


# ---- the file ----------------------------------------------------------------------------------------------------------------


def read_api_keys(path: str | Path) -> tuple[ApiKeyEntry, ...]:
    """The entries of a file. Raises BadConfig: it cannot be read, others may write it, or an entry is wrong."""
    return parse_api_keys(read_key_file(path), path)


def read_key_file(path: str | Path) -> bytes:
    """The bytes of a file that only this user or root may write. Raises BadConfig."""
    try:
        return read_trusted(Path(path), MAX_FILE_BYTES)
    except OSError as error:
        raise BadConfig(f"cannot use the keys file {str(path)!r}: {error.strerror or error}") from error


def parse_api_keys(data: bytes, path: str | Path) -> tuple[ApiKeyEntry, ...]:
    """The entries that `data` holds. Raises BadConfig, which names line and field; path: for the message."""
    import yaml

    found: list[ApiKeyEntry] = []
    where = f"keys file {str(path)!r}"
    try:
        loader = yaml.SafeLoader(data)
        for node in _entry_nodes(loader, where):
            at = f"{where} line {node.start_mark.line + 1}"
            names = [name.value for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if twice := [name for name in names if names.count(name) > 1]:  # YAML would take the last one
                raise BadConfig(f"{at}: {twice[0]!r} stands there twice")
            entry = _entry(loader.construct_document(node), at)
            for name in ("name", "hash"):
                if getattr(entry, name) in {getattr(other, name) for other in found}:
                    raise BadConfig(f"{at}: {name}: that of {entry.name!r} stands there before; legal: once")
            found.append(entry)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadConfig(f"{where} line {mark.line + 1 if mark else 1}: no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadConfig(f"{where} is no YAML: {type(error).__name__}") from error
    return tuple(found)


def _entry_nodes(loader: Any, where: str) -> list[Any]:
    """The nodes below `keys`; none in an empty file."""
    import yaml

    root = loader.get_single_node()
    if root is None:
        return []
    is_list = isinstance(root, yaml.MappingNode) and [key.value for key, _ in root.value] == ["keys"]
    if is_list and isinstance(root.value[0][1], yaml.SequenceNode):
        return list(root.value[0][1].value)
    raise BadConfig(f"{where} line {root.start_mark.line + 1}: must hold one list named keys")


def _entry(fields: object, at: str) -> ApiKeyEntry:
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise BadConfig(f"{at}: an entry must be a mapping of {', '.join(ApiKeyEntry.model_fields)}, got {type(fields).__name__}")
    try:
        return ApiKeyEntry(**fields)
    except ValidationError as error:
        raise BadConfig(f"{at}: {explain(error, ApiKeyEntry)}") from error


# ---- changes -----------------------------------------------------------------------------------------------------------------


def add_api_key(path: str | Path, entry: ApiKeyEntry) -> None:
    """Add an entry to a file, which is made if it is not there. Raises BadConfig. BadRequest: the name is taken. Unavailable."""
    with _locked(Path(path)):
        entries = read_api_keys(path) if Path(path).exists() else ()
        if any(other.name == entry.name for other in entries):
            raise BadRequest(f"a key named {entry.name!r} is there already; revoke it first, or take another name")
        _write(Path(path), (*entries, entry))


def revoke_api_key(path: str | Path, name: str) -> ApiKeyEntry:
    """Take an entry out of a file; returns it. Raises BadConfig. NotFound: no key of that name. Unavailable."""
    with _locked(Path(path)):
        entries = read_api_keys(path)
        revoked = next((entry for entry in entries if entry.name == name), None)
        if revoked is None:
            raise NotFound(f"no key is named {name!r} in {str(path)!r}; there are: {', '.join(e.name for e in entries) or 'none'}")
        _write(Path(path), [entry for entry in entries if entry is not revoked])
    return revoked


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other command changes files in this folder for the length of the block."""
    try:
        fd = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BadConfig(f"cannot use the keys file {str(path)!r}: {error.strerror or error}") from error
    try:
        until_s = time.monotonic() + LOCK_WAIT_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > until_s:
                raise Unavailable(f"another command has held the folder of {str(path)!r} for {LOCK_WAIT_S:g} s")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _write(path: Path, entries: Sequence[ApiKeyEntry]) -> None:
    """Replace the file as a whole; readers see the old one or the new one. Mode 0600, of the same owner as before."""
    import yaml

    fields = [entry.model_dump(mode="json") for entry in entries]
    text = _HEADER + yaml.safe_dump({"keys": fields}, sort_keys=False, allow_unicode=True)
    path = path.resolve()
    if len(text.encode()) > MAX_FILE_BYTES:
        raise BadConfig(f"the keys file {str(path)!r} would have more than {MAX_FILE_BYTES} bytes, with {len(fields)} keys")
    try:
        fd, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if path.exists() and (owner := path.stat()).st_uid != os.getuid():
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                os.fsync(fd)
            os.replace(made, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(made)
            raise
    except OSError as error:
        raise BadConfig(f"cannot write the keys file {str(path)!r}: {error.strerror or error}") from error
