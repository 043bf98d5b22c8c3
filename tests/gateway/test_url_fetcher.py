"""URLs: what is fetched, what is refused, and that no trick leads inside. Against a real TLS server on loopback."""

import asyncio
import ssl
import time

import pytest

from sparsevila_cluster.core.errors import BadMedia, BadRequest, DeadlineExceeded, PermissionDenied, SparseVilaError, TooLarge
from sparsevila_cluster.gateway.url_fetcher import MAX_HOPS, Hop, UrlFetcher, is_public, resolve_name
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.gateway.running_servers import prepare, refused, run, until

pytest.importorskip("cryptography")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1",
        "2001:db8::1", "fec0::1", "feff::1", "192.0.0.8", "192.0.0.171", "not an address", "",
    ],
)  # fmt: skip
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_outside_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://a.org/", PermissionDenied), ("ftp://a.org/x", PermissionDenied), ("//a.org/x", PermissionDenied),
        ("gopher://a.org", PermissionDenied), ("https:/a.org", BadRequest), ("https://", BadRequest), ("https://:443/", BadRequest),
        ("https://u@a.org/", BadRequest), ("https://u:p@a.org/", BadRequest), ("https://a.org:99999/", BadRequest),
        ("https://a.org/\r\nHost: b", BadRequest), ("https://a.org/ x", BadRequest), ("https://a.org/ü", BadRequest),
        ("https://[::1/", BadRequest), ("https://a.org/" + "x" * 5000, BadRequest),
    ],
)  # fmt: skip
def test_what_is_no_https_url_is_refused(url, error):
    with pytest.raises(error):
        Hop.of(url)


def test_a_url_taken_apart():
    assert Hop.of("https://a.org") == Hop("a.org", 443, "/")
    assert Hop.of("https://A.org:8443/x/y.mp4?z=1#there") == Hop("a.org", 8443, "/x/y.mp4?z=1")


def test_names_resolve_to_addresses():
    addresses = asyncio.run(resolve_name("localhost", 1))
    assert addresses and not any(map(is_public, addresses))
    with pytest.raises(OSError):
        asyncio.run(resolve_name("x" * 70 + ".invalid", 1))


class UrlServer:
    """A TLS server for `*.example` on loopback, and a fetcher in whose eyes 127.0.0.1 is public and 127.0.0.2 is not."""

    def __init__(self, folder, body):
        from tests.gateway.certificates import Authority

        authority = Authority(folder)
        self._server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_tls.load_cert_chain(*authority.sign("server", "good.example", "other.example", "second.example"))
        tls = ssl.create_default_context(cafile=authority.certificate)
        self.fetcher = UrlFetcher(self._resolve, lambda address: address in ("127.0.0.1", "127.0.0.3"), tls)
        self.body, self.seen, self.looked_up = body, [], []

    async def _resolve(self, host, port):
        self.looked_up.append(host)
        if host == "rebinding.example":  # public at the first look, inside at the next
            return ["127.0.0.1"] if self.looked_up.count(host) == 1 else ["127.0.0.2"]
        inside = {"inside.example": ["127.0.0.2"], "both.example": ["127.0.0.1", "127.0.0.2"], "nowhere.example": []}
        inside["second.example"] = ["127.0.0.3", "127.0.0.1"]
        return [host] if host[0].isdigit() else inside.get(host, ["127.0.0.1"])

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._server_tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()

    def url(self, path, host="good.example"):
        return f"https://{host}:{self.port}{path}"

    async def fetch(self, path, host="good.example", max_bytes=10_000_000, within_s=10.0):
        got = bytearray()

        async def write(block):
            got.extend(block)

        await self.fetcher.fetch(self.url(path, host), write, max_bytes, within_s)
        return bytes(got)

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ")[1]
            self.seen.append((path, head))
            await self._answer(path, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, path, writer):
        def send(status, *headers, body=b""):
            lines = [f"HTTP/1.1 {status}", *headers]
            writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)

        def redirect(to):
            send("302 Found", f"Location: {to}", "Content-Length: 0")

        length = f"Content-Length: {len(self.body)}"
        if path == "/sized":
            send("200 OK", length, body=self.body)
        elif path == "/chunked":
            chunks = [self.body[i : i + 3000] for i in range(0, len(self.body), 3000)]
            body = b"".join(b"%x;note=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
            send("200 OK", "Transfer-Encoding: chunked", body=body)
        elif path == "/until-end":
            send("200 OK", body=self.body)
        elif path == "/short":
            send("200 OK", length, body=self.body[:-1])
        elif path == "/liar":
            send("200 OK", "Transfer-Encoding: chunked", body=b"ffffffffffff\r\nxx")
        elif path.startswith("/chunk-of/"):
            send("200 OK", "Transfer-Encoding: chunked", body=path[10:].encode() + b"\r\n" + self.body)
        elif path == "/negative":
            send("200 OK", "Content-Length: -5", body=b"xx")
        elif path == "/zip":
            send("200 OK", "Content-Encoding: gzip", length, body=self.body)
        elif path == "/missing":
            send("404 Not Found", "Content-Length: 0")
        elif path == "/long-head":
            send("200 OK", *(f"X-{i}: {'x' * 1000}" for i in range(100)), body=self.body)
        elif path == "/no-http":
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        elif path == "/slow":
            send("200 OK", "Content-Length: 100000")
            for _ in range(200):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif path == "/drip-head":
            for _ in range(200):
                writer.write(b"H")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif path.startswith("/to?"):
            redirect(path[4:])
        elif path.startswith("/hops/"):
            num = int(path[6:])
            redirect(f"/hops/{num - 1}" if num else "sized".join(("/", "")))


def world(tmp_path, work, body=b"0123456789" * 20_000):
    async def main():
        async with UrlServer(tmp_path, body) as there:
            await work(there)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.smoke
def test_bodies_arrive_whole_however_they_are_sent(tmp_path):
    async def work(there):
        for path in ("/sized", "/chunked", "/until-end", f"/hops/{MAX_HOPS - 2}", "/to?" + there.url("/sized", "other.example")):
            assert await there.fetch(path) == there.body, path
        assert await there.fetch("/sized", "second.example") == there.body  # nothing listens on its first address
        path, head = there.seen[0]
        assert f"Host: good.example:{there.port}" in head and "Accept-Encoding: identity" in head
        assert not any(word in head.lower() for word in ("authorization", "cookie"))

    world(tmp_path, work)


@pytest.mark.parametrize(
    ("path", "host", "error", "word"),
    [
        ("/sized", "inside.example", PermissionDenied, "public"),
        ("/sized", "both.example", PermissionDenied, "public"),
        ("/sized", "127.0.0.2", PermissionDenied, "public"),
        ("/to?https://inside.example/secret", "good.example", PermissionDenied, "public"),
        ("/to?http://good.example/x", "good.example", PermissionDenied, "https"),
        ("/to?file:///etc/passwd", "good.example", PermissionDenied, "https"),
        ("/to?https://127.0.0.2/x", "good.example", PermissionDenied, "public"),
        (f"/hops/{MAX_HOPS}", "good.example", BadMedia, "redirects"),
        ("/sized", "stranger.example", BadMedia, "ertificate"),  # an address of ours, a name that its certificate has not
        ("/sized", "nowhere.example", BadMedia, "no address"),
        ("/short", "good.example", BadMedia, "early"),
        ("/liar", "good.example", TooLarge, "max_bytes"),
        *((f"/chunk-of/{size}", "good.example", BadMedia, "size") for size in ("-5", "-1000000", "+5", "0x10", "1_0", "", ";x=1")),
        ("/chunk-of/7fffffffffffffff", "good.example", BadMedia, "size"),
        ("/negative", "good.example", BadMedia, "length"),
        ("/zip", "good.example", BadMedia, "encoding"),
        ("/missing", "good.example", BadMedia, "404"),
        ("/long-head", "good.example", BadMedia, "cannot read"),
        ("/no-http", "good.example", BadMedia, "HTTP/1.1"),
        ("/nothing", "good.example", BadMedia, "cannot read"),
    ],
)
def test_what_is_wrong_with_an_answer_is_told(tmp_path, path, host, error, word):
    async def work(there):
        with pytest.raises(error, match=word) as raised:
            await there.fetch(path, host)
        assert type(raised.value) is error
        assert not any(seen.startswith("/secret") for seen, _ in there.seen)

    world(tmp_path, work)


def test_the_address_that_was_checked_is_the_one_that_is_used(tmp_path):
    async def work(there):
        with pytest.raises(BadMedia, match="ertificate"):  # the connection went to 127.0.0.1, whose certificate has another name
            await there.fetch("/sized", "rebinding.example")
        assert there.looked_up == ["rebinding.example"]
        with pytest.raises(PermissionDenied):
            await there.fetch("/sized", "rebinding.example")

    world(tmp_path, work)


@pytest.mark.parametrize("path", ["/sized", "/chunked", "/until-end"])
def test_bytes_are_capped(tmp_path, path):
    async def work(there):
        assert len(await there.fetch(path, max_bytes=len(there.body))) == len(there.body)
        with pytest.raises(TooLarge, match="max_bytes = 199999"):
            await there.fetch(path, max_bytes=len(there.body) - 1)

    world(tmp_path, work)


@pytest.mark.parametrize("path", ["/slow", "/drip-head"])
def test_time_is_capped_however_little_arrives(tmp_path, path):
    async def work(there):
        started = time.perf_counter()
        with pytest.raises(DeadlineExceeded):
            await there.fetch(path, within_s=0.5)
        assert time.perf_counter() - started < 3

    world(tmp_path, work)


def test_a_url_is_prepared_over_grpc(tmp_path, checkpoint, clips):
    async def main():
        async with UrlServer(tmp_path, clips[0]) as there:
            from tests.gateway.running_servers import running_server

            async with running_server(checkpoint, fetcher=there.fetcher) as served:
                media = await prepare(served.stub, pb.MediaSource(url=there.url("/chunked")))
                assert (await prepare(served.stub, clips[0])).media_id == media.media_id
                for path, host, timeout_s, code in (
                    ("/missing", "good.example", 20, "INVALID_ARGUMENT"),
                    ("/sized", "inside.example", 20, "PERMISSION_DENIED"),
                    ("/slow", "good.example", 0.5, "DEADLINE_EXCEEDED"),
                ):
                    source = pb.MediaSource(url=there.url(path, host))
                    call = served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=[source]), timeout=timeout_s)
                    assert (await refused(call))[0] == code

                async def gone():
                    return served.service._spool.num_bytes == 0

                await until(gone, "bytes of a fetch stay")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_data_url_is_media(checkpoint, clips):
    import base64

    async def work(served):
        url = "data:video/mp4;base64," + base64.b64encode(clips[0]).decode()
        media = await prepare(served.stub, pb.MediaSource(url=url))
        assert (await prepare(served.stub, clips[0])).media_id == media.media_id

    run(checkpoint, work)


def test_errors_of_a_fetch_are_ours(tmp_path):
    async def work(there):
        there._server.close()
        await there._server.wait_closed()
        with pytest.raises(SparseVilaError, match="cannot reach"):
            await there.fetch("/sized")

    world(tmp_path, work)
