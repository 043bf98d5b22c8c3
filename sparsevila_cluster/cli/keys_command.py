"""`sparsevila keys create|list|revoke`: the API keys in the file that `door.keys_file` names, which a server follows."""

from __future__ import annotations

import argparse
import json
import re
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from pydantic import ValidationError

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.core.api_keys import (
    ApiKeyEntry,
    Role,
    add_api_key,
    hash_api_key,
    make_api_key,
    read_api_keys,
    revoke_api_key,
)
from sparsevila_cluster.core.config import explain
from sparsevila_cluster.core.errors import BadRequest

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions of `keys` and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = _add_action(actions, "create", "make a key, print it this once, and add its hash to the file", _create)
    create.add_argument("--tenant", required=True, help="whose key it is; tenants share nothing")
    create.add_argument(
        "--role", choices=get_args(Role), default="user", help="admin: sees what the server tells of everybody (user)"
    )
    create.add_argument("--expires", metavar="WHEN", help="12h, 90d, 8w from now, or an ISO date or date-time, UTC (never)")
    create.add_argument("--name", help="the key's name in logs and for revoke (one that is made up)")
    _add_action(actions, "list", "show the keys of the file", _list)
    revoke = _add_action(actions, "revoke", "take a key out of the file", _revoke)
    revoke.add_argument("name", metavar="NAME")


def _add_action(actions: Any, name: str, help: str, run: Any) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(name, allow_abbrev=False, help=help)
    action.add_argument("--file", required=True, help="the YAML file that door.keys_file names")
    add_output_options(action)
    action.set_defaults(run=run)
    return action


def _create(args: argparse.Namespace) -> int:
    key = make_api_key()
    name = f"key-{secrets.token_hex(4)}" if args.name is None else args.name
    expires = None if args.expires is None else read_expiry(args.expires, datetime.now(UTC))
    try:
        entry = ApiKeyEntry(name=name, hash=hash_api_key(key), tenant=args.tenant, role=args.role, expires=expires)
    except ValidationError as error:
        raise BadRequest(explain(error, ApiKeyEntry)) from error
    add_api_key(args.file, entry)
    print(json.dumps({"key": key, **_shown(entry)}) if args.json else key)
    return OK


def _list(args: argparse.Namespace) -> int:
    entries = read_api_keys(args.file)
    if args.json:
        print(json.dumps({"keys": [_shown(entry) for entry in entries]}))
        return OK
    rows = [("name", "tenant", "role", "expires")]
    rows += [(one["name"], one["tenant"], one["role"], one["expires"] or "never") for one in map(_shown, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        over = " (expired)" if i and entries[i - 1].is_over(time.time()) else ""
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() + over)
    return OK


def _revoke(args: argparse.Namespace) -> int:
    shown = _shown(revoke_api_key(args.file, args.name))
    print(json.dumps({"revoked": shown}) if args.json else f"revoked {shown['name']} of {shown['tenant']}")
    return OK


def _shown(entry: ApiKeyEntry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude={"hash"})


def read_expiry(text: str, now: datetime) -> datetime:
    """The moment that `--expires` names, in UTC where it names no offset. Raises BadRequest: none, or one that has passed."""
    span = re.fullmatch(r"([0-9]{1,6})([hdw])", text)
    try:
        expires = now + timedelta(**{_UNITS[span[2]]: int(span[1])}) if span else datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"expires must be a span such as 90d or an ISO date-time, got {text!r}") from error
    expires = (expires if expires.tzinfo is not None else expires.replace(tzinfo=UTC)).replace(microsecond=0)
    if expires <= now:
        raise BadRequest(f"expires must be after now, {now:%Y-%m-%dT%H:%M:%SZ}, got {text!r}")
    return expires
