"""Keys of a file: followed while the server runs, by roles, until they expire; a broken file changes nothing."""

import asyncio
import logging
import os
from datetime import UTC, datetime

import pytest

from sparsevila_cluster.core.api_keys import ApiKeyEntry, add_api_key, hash_api_key, make_api_key, read_api_keys, revoke_api_key
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadConfig, Unauthenticated
from sparsevila_cluster.gateway import authenticator
from sparsevila_cluster.gateway.audit_log import NAME, AuditLog
from sparsevila_cluster.gateway.authenticator import Authenticator, Principal
from tests.gateway.running_servers import until
from tests.gateway.test_service import serve


def add(file, name, tenant="acme", **fields):
    """A new key in the file."""
    key = make_api_key()
    add_api_key(file, ApiKeyEntry(name=name, hash=hash_api_key(key), tenant=tenant, **fields))
    return key


def who(known, key):
    try:
        return known.authenticate([f"Bearer {key}"])
    except Unauthenticated:
        return None


def authenticator_of(file, clock=lambda: 0.0, **fields):
    return Authenticator(GatewayConfig(keys_file=str(file), **fields), AuditLog(), clock)


def test_a_key_is_its_tenants_with_its_role(tmp_path):
    file = tmp_path / "keys.yaml"
    phone, desk, root = add(file, "phone"), add(file, "desk"), add(file, "root", "ops", role="admin")
    known = authenticator_of(file, api_keys={"plain": "ann"})
    assert who(known, phone) == Principal("acme", "acme", True, "phone", "user")
    assert who(known, desk) == Principal("acme", "acme", True, "desk", "user")
    assert who(known, root) == Principal("ops", "ops", True, "root", "admin")
    assert who(known, "plain") == Principal("ann", "ann", True, "api_keys[0]", "user")
    for stranger in (phone[:-1], hash_api_key(phone), ""):
        assert who(known, stranger) is None
    assert who(authenticator_of(file, public_media=True), phone).tenant == ""


def test_a_file_without_keys_lets_nobody_in(tmp_path):
    file = tmp_path / "keys.yaml"
    add(file, "one")
    revoke_api_key(file, "one")
    with pytest.raises(Unauthenticated):
        authenticator_of(file).authenticate([])
    with pytest.raises(BadConfig, match="No such file"):
        authenticator_of(tmp_path / "no.yaml")


def test_an_expired_key_is_told_so(tmp_path):
    file = tmp_path / "keys.yaml"
    now = [datetime(2030, 1, 2, tzinfo=UTC).timestamp() - 1]
    key = add(file, "phone", expires=datetime(2030, 1, 2, tzinfo=UTC))
    known = authenticator_of(file, lambda: now[0])
    assert who(known, key)
    now[0] += 1
    with pytest.raises(Unauthenticated, match="'phone' has expired on 2030-01-02 at 00:00:00 UTC"):
        known.authenticate([f"Bearer {key}"])


def test_a_running_server_follows_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(authenticator, "LOOK_S", 0.01)
    file = tmp_path / "keys.yaml"
    first = add(file, "first")

    async def work(service, pipeline, sink):
        async def code(key):
            try:
                async with service.call("Ask", [f"Bearer {key}"], lambda: None):
                    return "OK"
            except Unauthenticated as error:
                return error.grpc_status

        assert await code(first) == "OK"
        second = add(file, "second", "bob")

        async def second_is_in():
            return await code(second) == "OK"

        await until(second_is_in, "a new key is never taken over", 5)
        revoke_api_key(file, "first")

        async def first_is_out():
            return await code(first) == "UNAUTHENTICATED"

        await until(first_is_out, "a revoked key goes on", 5)
        assert await second_is_in()

    serve(work, keys_file=str(file))
    told = [record.what for record in caplog.records if record.name == NAME and record.event == "keys_reloaded"]
    assert told == ["2 keys; new: second; gone: -", "1 keys; new: -; gone: first"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda file: file.write_text("keys:\n- {name: a, hash: b, tenant: t}\n"), "line 2: hash: "),
        (lambda file: file.write_text("keys: ["), "line 1: no YAML"),
        (lambda file: file.write_bytes(b"\xff\xfe\xff"), "no YAML"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.chmod(0o666), "0666: others could write it"),
        (lambda file: (file.unlink(), file.mkdir()), "must be a file|Is a directory"),
        (lambda file: file.write_bytes(b"#" * (4 * 2**20 + 1)), "more than 4194304 bytes"),
    ],
)
def test_a_broken_file_changes_nothing_and_is_logged_once(tmp_path, caplog, spoil, told):
    file = tmp_path / "keys.yaml"
    key = add(file, "phone")
    known = authenticator_of(file)

    async def main():
        spoil(file)
        for _ in range(3):
            await known.refresh()
        assert who(known, key)
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert error.startswith("the API keys stay as they were: ") and str(file) in error
        assert [record.event for record in caplog.records if record.name == NAME] == ["keys_refused"]
        with pytest.raises(BadConfig, match=told):
            raise BadConfig(error)
        file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        other = add(file, "other")
        await known.refresh()
        assert who(known, other) and not who(known, key)

    asyncio.run(main())


def test_a_change_that_times_and_size_do_not_show_is_seen(tmp_path):
    """Two writes within one tick of the clock of a file system."""
    file = tmp_path / "keys.yaml"
    old, new = add(file, "phone"), make_api_key()
    known = authenticator_of(file)
    facts = file.stat()
    text = file.read_text().replace(hash_api_key(old), hash_api_key(new))
    with open(file, "r+") as same:
        same.write(text)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_size) == (facts.st_ino, facts.st_size)
    asyncio.run(known.refresh())
    assert who(known, new) and not who(known, old)


def test_a_file_that_stays_as_it_is_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "keys.yaml"
    key = add(file, "phone")
    os.utime(file, ns=(0, 0))
    known = authenticator_of(file)
    monkeypatch.setattr("sparsevila_cluster.gateway.key_file.TICK_NS", 0)
    monkeypatch.setattr("sparsevila_cluster.gateway.key_file.read_key_file", lambda path: pytest.fail("it was read"))
    for _ in range(3):
        asyncio.run(known.refresh())
    assert who(known, key) and read_api_keys(file)
