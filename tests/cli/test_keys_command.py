"""`sparsevila keys`: a key is shown once, the file has its hash, and a server that has the file takes it."""

import json
from datetime import UTC, datetime

import pytest

from sparsevila_cluster.cli.keys_command import read_expiry
from sparsevila_cluster.cli.main import main
from sparsevila_cluster.core.api_keys import hash_api_key, read_api_keys
from sparsevila_cluster.core.errors import BadRequest
from tests.gateway.test_key_file import authenticator_of, who


@pytest.fixture
def keys(tmp_path, capsys):
    """Run `sparsevila keys ACTION --file FILE ...`; (exit code, stdout, stderr)."""
    file = tmp_path / "keys.yaml"

    def run(action, *words):
        return main(["keys", action, "--file", str(file), *words]), *capsys.readouterr()

    run.file = file
    return run


def test_a_key_is_shown_once_and_works_until_it_is_revoked(keys):
    code, key, err = keys("create", "--tenant", "acme", "--name", "phone")
    key = key.strip()
    assert (code, err) == (0, "") and keys.file.stat().st_mode & 0o777 == 0o600
    code, out, _ = keys("create", "--tenant", "ops", "--role", "admin", "--expires", "90d", "--json")
    made = json.loads(out)
    assert (code, made["tenant"], made["role"]) == (0, "ops", "admin") and made["name"].startswith("key-")
    (phone, root) = read_api_keys(keys.file)
    assert phone.hash == hash_api_key(key) and root.hash == hash_api_key(made["key"])
    known = authenticator_of(keys.file)
    assert who(known, key).key == "phone" and who(known, made["key"]).role == "admin"

    code, shown, _ = keys("list")
    assert [line.split()[:3] for line in shown.splitlines()] == [
        ["name", "tenant", "role"], ["phone", "acme", "user"], [made["name"], "ops", "admin"],
    ]  # fmt: skip
    code, out, _ = keys("list", "--json")
    assert [one["name"] for one in json.loads(out)["keys"]] == ["phone", made["name"]]
    for secret in (key, made["key"], phone.hash):
        assert secret not in shown + out
    assert keys("revoke", "phone") == (0, "revoked phone of acme\n", "")
    assert who(authenticator_of(keys.file), key) is None
    assert json.loads(keys("revoke", made["name"], "--json")[1])["revoked"]["tenant"] == "ops"


def test_an_expired_key_is_shown_as_such(keys):
    keys("create", "--tenant", "acme", "--name", "old")
    keys.file.write_text(keys.file.read_text().replace("expires: null", "expires: 2020-01-01"))
    assert "2020-01-01T00:00:00Z (expired)" in keys("list")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("list",), "No such file"),
        (("create",), "--tenant"),
        (("create", "--tenant", ""), "tenant: "),
        (("create", "--tenant", "a", "--name", "a b"), "name: "),
        (("create", "--tenant", "a", "--role", "root"), "root"),
        (("create", "--tenant", "a", "--expires", "90"), "expires must be a span such as 90d or an ISO date-time, got '90'"),
        (("create", "--tenant", "a", "--expires", "999999w"), "expires must be a span"),
        (("create", "--tenant", "a", "--expires", "2020-01-01"), "expires must be after now"),
        (("create", "--tenant", "a", "--expires", "0d"), "expires must be after now"),
        (("revoke", "a"), "No such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(keys, words, told):
    code, out, err = keys(*words)
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not keys.file.exists()


def test_spans_and_dates():
    now = datetime(2030, 1, 1, 12, 30, 15, 5, tzinfo=UTC)
    expected = {
        "12h": datetime(2030, 1, 2, 0, 30, 15, tzinfo=UTC),
        "90d": datetime(2030, 4, 1, 12, 30, 15, tzinfo=UTC),
        "1w": datetime(2030, 1, 8, 12, 30, 15, tzinfo=UTC),
        "2031-05-06": datetime(2031, 5, 6, tzinfo=UTC),
        "2031-05-06T02:00:00+02:00": datetime(2031, 5, 6, tzinfo=UTC),
    }
    assert {text: read_expiry(text, now) for text in expected} == expected
    for text in ("", "d", "-1d", "1.5d", "٣d", "1y", "tomorrow"):
        with pytest.raises(BadRequest):
            read_expiry(text, now)
