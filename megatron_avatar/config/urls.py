"""Addresses of servers in settings, and what of them may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

KEY = "AVATAR_ENDPOINT_KEY"  # the environment variable that holds the key of all endpoints
# Both look at each character a fixed number of times: a text of any length costs no more than it is long.
_QUERY = re.compile(r"((?<!\w)\w++://[^\s?#'\"]*+)(?:([?#])[^\s'\")]*+)?")
_USER = re.compile(r"((?<!\w)\w++://)[^/\s]*@")  # up to the last @: a password may hold one


def mask(text: str) -> str:
    """The text with user names, passwords, query strings and fragments of URLs hidden, and the endpoint's key."""
    if key := os.environ.get(KEY):
        text = text.replace(key, "***")
    text = _QUERY.sub(lambda found: found[1] + (f"{found[2]}***" if found[2] else ""), text)
    return _USER.sub(r"\1***@", text)


def addresses(address: str) -> list[str]:
    """The replicas' URLs of a setting: URLs separated by commas, or a folder whose files hold one each.

    Raises ValueError for a folder that isn't there or is empty, and for a URL that is none or that holds a secret.
    """
    if "://" in address:
        urls = address.split(",")
    else:
        folder = Path(address)
        if not folder.is_dir():
            raise ValueError(f"{address} is neither a URL nor a folder: start the server with slurm/judge.sh, which "
                             "writes its address there, or name it as http://HOST:PORT/v1")  # fmt: skip
        urls = [path.read_text() for path in sorted(folder.iterdir())
                if path.suffix != ".part" and not path.name.startswith(".")]  # fmt: skip
    urls = [url.strip().rstrip("/") for url in urls if url.strip()]
    if not urls:
        raise ValueError(f"{address} names no server: start one with slurm/judge.sh, or write http://HOST:PORT/v1")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{mask(url)} is no address of a server: write http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"{mask(url)} holds a user, a key or a query, which settings and logs would show: "
                             f"take it out, and export {KEY}=... instead")  # fmt: skip
    return urls
