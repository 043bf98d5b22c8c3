"""Fetches media from https URLs of strangers, which must not reach addresses inside our network.

Every hop is checked anew: scheme, host, and every address that the name resolves to. The connection goes to the very address that
was checked (a second look-up could give another one), while TLS proves that its owner is the named host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import BadMedia, BadRequest, PermissionDenied, TooLarge

MAX_HOPS = 5
MAX_HEAD_BYTES = 64 * 1024
BLOCK_BYTES = 256 * 1024
MAX_URL_CHARS = 4096
# Whatever the caller's deadline: a fetch ends after this.
MAX_FETCH_S = 120.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not reachable from everywhere (RFC 3879, RFC 6890), though `is_global` says so in some releases of Python.
_SITE_LOCAL, _IETF = ipaddress.IPv6Network("fec0::/10"), ipaddress.IPv4Network("192.0.0.0/24")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


@dataclass(frozen=True)
class Hop:
    """One URL, taken apart."""

    host: str
    port: int
    target: str

    @classmethod
    def of(cls, url: str) -> Hop:
        """Raises PermissionDenied: another scheme than https. BadRequest: no host, a user name, or characters to be escaped."""
        if len(url) > MAX_URL_CHARS or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
            raise BadRequest(f"a URL is at most {MAX_URL_CHARS} printable ASCII characters, others are escaped; got {url[:100]!r}")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise BadRequest(f"{url[:100]!r} is no URL: {error}") from error
        if parts.scheme != "https":
            raise PermissionDenied(f"only https: and data: URLs are read, got {url[:100]!r}")
        if not host or parts.username is not None or parts.password is not None:
            raise BadRequest(f"a URL needs a host and no user name, got {url[:100]!r}")
        return cls(host, port or 443, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


class UrlFetcher:
    """Fetches URLs. The arguments are for those who have other names, other rules or an authority of their own.

    resolve: (host, port) -> addresses; public: whether an address may be connected to; tls: whom to trust.
    """

    def __init__(
        self, resolve: Resolve | None = None, public: Callable[[str], bool] | None = None, tls: ssl.SSLContext | None = None
    ):
        self._resolve = resolve or resolve_name
        self._public = public or is_public
        self._tls = tls or ssl.create_default_context()

    async def fetch(self, url: str, write: Callable[[bytes], Awaitable[None]], max_bytes: int, within_s: float) -> None:
        """Hand every block of the body to `write`.

        Raises:
            BadRequest: no URL. PermissionDenied: not https, or an address that is not public, at any hop. BadMedia: it cannot be
            reached, or answers without a body. TooLarge: above `max_bytes`. DeadlineExceeded. Whatever `write` raises.
        """
        await wait_within(self._follow(url, write, max_bytes), min(within_s, MAX_FETCH_S), f"fetching {url[:100]!r}")

    async def _follow(self, url: str, write: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        for _ in range(MAX_HOPS):
            try:
                further = await self._get(url, write, max_bytes)
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, EOFError) as error:
                raise BadMedia(f"cannot read {url[:100]!r}: {str(error) or type(error).__name__}") from error
            if further is None:
                return
            url = urljoin(url, further)
        raise BadMedia(f"{url[:100]!r}: more than {MAX_HOPS} redirects")

    async def _get(self, url: str, write: Callable[[bytes], Awaitable[None]], max_bytes: int) -> str | None:
        """One hop: where it redirects to, or None once the body is written."""
        hop = Hop.of(url)
        reader, writer = await self._connect(hop)
        try:
            host = f"[{hop.host}]" if ":" in hop.host else hop.host
            host = host if hop.port == 443 else f"{host}:{hop.port}"
            lines = (f"GET {hop.target} HTTP/1.1", f"Host: {host}", "Accept: */*", "Accept-Encoding: identity", "Connection: close")
            writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii"))
            status, headers = _parse_head(url, await reader.readuntil(b"\r\n\r\n"))
            if status in (301, 302, 303, 307, 308) and "location" in headers:
                return headers["location"]
            if status != 200:
                raise BadMedia(f"{url[:100]!r} answered with status {status}")
            num_bytes = 0
            async for block in _body(url, reader, headers, max_bytes):
                num_bytes += len(block)
                if num_bytes > max_bytes:
                    raise _too_large(url, max_bytes)
                await write(block)
            return None
        finally:
            writer.transport.abort()

    async def _connect(self, hop: Hop) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first address that answers. All of them must be public: one that is not says what the others are for."""
        addresses = await self._resolve(hop.host, hop.port)
        if not all(self._public(address) for address in addresses):
            raise PermissionDenied(f"{hop.host[:100]!r} is not a public host: nothing is fetched from inside our network")
        failed = BadMedia(f"{hop.host[:100]!r} has no address")
        for address in addresses:
            try:
                return await asyncio.open_connection(
                    address, hop.port, ssl=self._tls, server_hostname=hop.host, limit=MAX_HEAD_BYTES
                )
            except OSError as error:
                failed = BadMedia(f"cannot reach {hop.host[:100]!r}: {str(error) or type(error).__name__}")
        raise failed


async def resolve_name(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, IPv4 first. Raises OSError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    except UnicodeError as error:
        raise OSError(f"{host[:100]!r} is no host name") from error
    return [str(entry[4][0]) for entry in sorted(found, key=lambda entry: int(entry[0]))]


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from everywhere: not private, local, reserved, multicast or wrapping such a one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if any(inner is not None and not is_public(str(inner)) for inner in (ip.sixtofour, *(ip.teredo or ()))):
            return False
    if ip in (_SITE_LOCAL if isinstance(ip, ipaddress.IPv6Address) else _IETF):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _parse_head(url: str, head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
        raise BadMedia(f"{url[:100]!r} does not speak HTTP/1.1")
    pairs = (line.partition(":") for line in lines if ":" in line)
    return int(rest[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(url: str, reader: asyncio.StreamReader, headers: dict[str, str], max_bytes: int) -> AsyncIterator[bytes]:
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise BadMedia(f"{url[:100]!r} answers in an encoding that nobody asked for")
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := _chunk_size(url, await reader.readuntil(b"\r\n")):
            if size > max_bytes:
                raise _too_large(url, max_bytes)
            async for block in _exactly(reader, size):
                yield block
            await reader.readexactly(2)
    elif "content-length" in headers:
        length = headers["content-length"]
        if not length.isdigit():
            raise BadMedia(f"{url[:100]!r} answers with a length of {length[:40]!r}")
        if len(length) > 18 or int(length) > max_bytes:
            raise _too_large(url, max_bytes)
        async for block in _exactly(reader, int(length)):
            yield block
    else:
        with suppress(ssl.SSLZeroReturnError):
            while block := await reader.read(BLOCK_BYTES):
                yield block


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        block = await reader.read(min(size, BLOCK_BYTES))
        if not block:
            raise EOFError(f"the connection ended {size} bytes early")
        size -= len(block)
        yield block


def _chunk_size(url: str, line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not _CHUNK_SIZE.fullmatch(digits):  # `int` would take signs, underscores and 0x as well
        raise BadMedia(f"{url[:100]!r} does not speak HTTP/1.1: a chunk has the size {digits[:40]!r}")
    return int(digits, 16)


def _too_large(url: str, max_bytes: int) -> TooLarge:
    return TooLarge(f"{url[:100]!r} has more than max_bytes = {max_bytes} bytes")
