"""The file of API keys: what it may hold, who may write it, and how commands change it."""

import os
import threading
from datetime import UTC, datetime

import pytest

from sparsevila_cluster.core.api_keys import (
    ApiKeyEntry,
    add_api_key,
    hash_api_key,
    make_api_key,
    parse_api_keys,
    read_api_keys,
    revoke_api_key,
)
from sparsevila_cluster.core.errors import BadConfig, BadRequest, NotFound

HASH = "ab" * 32


def entry(name="one", **fields):
    return ApiKeyEntry(**{"name": name, "hash": hash_api_key(name), "tenant": "acme", **fields})


def test_what_is_added_is_read_and_what_is_revoked_is_gone(tmp_path):
    file = tmp_path / "keys.yaml"
    until = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    added = [entry(), entry("two", role="admin"), entry("three", tenant="Ünit: [x]", expires=until)]
    for one in added:
        add_api_key(file, one)
        assert file.stat().st_mode & 0o777 == 0o600
    assert read_api_keys(file) == tuple(added) and os.listdir(tmp_path) == ["keys.yaml"]
    with pytest.raises(BadRequest, match="'two' is there already"):
        add_api_key(file, entry("two"))
    assert revoke_api_key(file, "two") == added[1]
    assert read_api_keys(file) == (added[0], added[2])
    with pytest.raises(NotFound, match="'two'.* there are: one, three"):
        revoke_api_key(file, "two")


def test_keys_are_long_and_the_file_has_none(tmp_path):
    keys = {make_api_key() for _ in range(100)}
    assert len(keys) == 100 and all(len(key) == 46 and key.startswith("sv_") for key in keys)
    file = tmp_path / "keys.yaml"
    for i, key in enumerate(sorted(keys)[:3]):
        add_api_key(file, entry(f"k{i}", hash=hash_api_key(key)))
    assert not any(key[3:] in file.read_text() for key in keys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys:\n- {name: a, hash: HASH, tenant: t, role: root}", "line 2: role: input should be 'user' or 'admin', got 'root'"),
        ("keys:\n- name: a\n  hash: HASH\n  tenant: t\n- name: b\n  hash: HASH", "line 5: tenant: field required"),
        ("keys:\n- {name: a, hash: HASH, tenant: t, rule: user}", "line 2: unknown config key 'rule'; legal keys: expires, hash"),
        ("keys:\n- {name: a b, hash: HASH, tenant: t}", "line 2: name: .*got 'a b'"),
        ("keys:\n- {name: a, hash: HASH, tenant: ''}", "line 2: tenant: .*at least 1"),
        ("keys:\n- {name: a, hash: HASH, tenant: t, expires: 20300101}", "line 2: expires: .*ISO date-time or null, got 20300101"),
        ("keys:\n- {name: a, hash: HASH, tenant: t, expires: soon}", "line 2: expires: .*got 'soon'"),
        ("keys:\n- {name: a, hash: HASH, tenant: t}\n\n- {name: a, hash: HASH, tenant: t}", "line 4: name: .*legal: once"),
        ("keys:\n- {name: a, hash: HASH, tenant: t}\n- {name: b, hash: HASH, tenant: t}", "line 3: hash: that of 'b'"),
        ("keys:\n- just a key", "line 2: an entry must be a mapping of name, hash, tenant, role, expires, got str"),
        ("- {name: a, hash: HASH, tenant: t}", "line 1: must hold one list named keys"),
        ("key:\n- {name: a, hash: HASH, tenant: t}", "line 1: must hold one list named keys"),
        ("keys:\n- name: a\n hash: b", "line 3: no YAML: "),
        ("keys:\n- &a [*a]", "line 2: "),
        ("keys:\n- {name: a, hash: HASH, tenant: t, role: user, role: admin}", "line 2: 'role' stands there twice"),
        ("keys:\n- !!python/object/apply:os.getpid []", "line 2: no YAML"),
        ("keys: \x00", "no YAML"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_field(text, told):
    with pytest.raises(BadConfig, match=told) as error:
        parse_api_keys(text.replace("HASH", HASH).encode(), "keys.yaml")
    assert "keys.yaml" in str(error.value)


def test_a_key_in_the_place_of_its_hash_is_not_repeated():
    key = make_api_key()
    with pytest.raises(BadConfig, match="line 2: hash: ") as error:
        parse_api_keys(f"keys:\n- {{name: a, hash: {key}, tenant: t}}".encode(), "keys.yaml")
    assert key not in str(error.value)


def test_an_empty_file_has_no_keys():
    assert parse_api_keys(b"", "x") == parse_api_keys(b"# nobody\n", "x") == parse_api_keys(b"keys: []", "x") == ()


def test_expiry_is_utc_unless_it_says_otherwise():
    text = "keys:\n- {name: a, hash: HASH, tenant: t, expires: WHEN}"
    spelt = {"2030-01-02": 0, "2030-01-02T01:00:00": 1, "2030-01-02 01:00:00Z": 1, "'2030-01-02T03:00:00+02:00'": 1}
    for when, hour in spelt.items():
        (found,) = parse_api_keys(text.replace("HASH", HASH).replace("WHEN", when).encode(), "x")
        assert found.expires == datetime(2030, 1, 2, hour, tzinfo=UTC), when
        moment = found.expires.timestamp()
        assert found.is_over(moment) and not found.is_over(moment - 1)
    assert not entry().is_over(1e12)


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o622])
def test_a_file_that_others_may_write_is_refused(tmp_path, mode):
    file = tmp_path / "keys.yaml"
    add_api_key(file, entry())
    file.chmod(mode)
    with pytest.raises(BadConfig, match=f"has the mode 0{mode:o}: others could write it"):
        read_api_keys(file)
    file.chmod(0o644)  # whoever reads it learns hashes of random keys
    assert read_api_keys(file)


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_others_may_replace_is_refused(tmp_path, linked):
    shared = tmp_path / "shared"
    shared.mkdir()
    add_api_key(shared / "keys.yaml", entry())
    file = shared / "keys.yaml"
    if linked:
        file = tmp_path / "link.yaml"
        file.symlink_to(shared / "keys.yaml")
    shared.chmod(0o777)
    with pytest.raises(BadConfig, match="its folder .*shared' has the mode 0777"):
        read_api_keys(file)
    shared.chmod(0o1777)  # as /tmp: only the owner of a file puts another one in its place
    assert read_api_keys(file)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, told in ((tmp_path / "pipe", "must be a file"), (tmp_path, "must be a file|directory"), (tmp_path / "no", "No such")):
        with pytest.raises(BadConfig, match=told):
            read_api_keys(path)
    with pytest.raises(BadConfig, match="No such"):
        add_api_key(tmp_path / "no" / "keys.yaml", entry())


def test_commands_at_the_same_time_lose_nothing(tmp_path):
    file = tmp_path / "keys.yaml"
    threads = [threading.Thread(target=add_api_key, args=(file, entry(f"k{i}"))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.name for one in read_api_keys(file)} == {f"k{i}" for i in range(12)}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "keys.yaml"
    add_api_key(file, entry())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadConfig, match="No space left"):
        add_api_key(file, entry("two"))
    assert read_api_keys(file) == (entry(),) and os.listdir(tmp_path) == ["keys.yaml"]
