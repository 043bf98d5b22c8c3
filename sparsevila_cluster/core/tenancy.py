"""Who may use what: the one rule about tenants, for media, conversations and everything made from them."""

from __future__ import annotations


def may_use(owner: str, tenant: str) -> bool:
    """Whether `tenant` may see and use what `owner` made; "" as the owner means everybody."""
    return owner in ("", tenant)
