"""Takes credentials out of text before anybody reads it: errors, log lines, ledgers, reports.

Errors are made of volseg's own words wherever that can be. The words of libraries and servers may repeat what was sent
to them: headers, signed addresses, a whole configuration. So every text that leaves goes through `redact`, which knows
what credentials look like, and the ones that this process was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8
"""Shorter values are not looked for: they would be found in innocent words."""

_NAME = r"secret|token|passw(?:or)?d|passphrase|credential|signature|(?:access|account|api|auth|private)[-_]?key"
_VARIABLE = re.compile(_NAME, re.IGNORECASE)
# Of these the value says where a secret is, and not what it is.
_PLACE = re.compile(r"_(?:PATH|FILE|DIR|URL|URI|HOST|MODE)$", re.IGNORECASE)
_TOKEN_FILES = ("RAY_AUTH_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")

# The second kind is a password with a slash, which nobody may write, and which Amazon's often hold; a port is none.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#:@'\"<>]+:(?!\d+[/?#])[^\s@'\"<>]*)@")
_HEADER = re.compile(
    r"((?:proxy-)?authorization\b[\"']?\s*[:=,]\s*(?:b?[\"'])?(?:(?:aws4-hmac-sha256|basic|bearer|token|aws)\s+)?)[^\s\"',]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_VALUE = re.compile(
    rf"([\w-]*(?:{_NAME})(?:[-_]?id)?[\"']?\s*(?:=|:\s|:(?=[\"'])|,\s(?=b?[\"']))\s*(?:b?[\"'])?)[^\s\"'&,;<>}})\]]+",
    re.IGNORECASE,
)
_TAG = re.compile(rf"(<[\w-]*(?:{_NAME})[\w-]*>)[^<]+", re.IGNORECASE)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}")
_JSON_TOKEN = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_IN_QUERY = re.compile(rf"[?&;][\w-]*(?:{_NAME}|\bsig\b)[\w-]*=", re.IGNORECASE)

_learnt: set[str] = set()


def redact(text: str) -> str:
    """Return `text` with every credential in it replaced by `HIDDEN`."""
    if not text:
        return text
    for secret in sorted(_known(os.environ) | _learnt, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _LOGIN.sub(f"{HIDDEN}@", text)
    for shape in (_PRIVATE_KEY, _JSON_TOKEN, _KEY_ID):
        text = shape.sub(HIDDEN, text)
    for shape in (_HEADER, _BEARER, _VALUE, _TAG):
        text = shape.sub(rf"\1{HIDDEN}", text)
    return text


def learn(*secrets: str | None) -> None:
    """Remember credentials that this process came to know otherwise than by its environment."""
    _learnt.update(form for secret in secrets if secret and len(secret) >= SHORTEST for form in _forms(secret))


def holds_credential(uri: str) -> bool:
    """Tell whether an address carries a user name, a password or a signature."""
    return _LOGIN.search(uri) is not None or ("://" in uri and _IN_QUERY.search(uri) is not None)


@lru_cache(maxsize=4096)
def names_credential(variable: str) -> bool:
    """Tell whether an environment variable of this name holds a credential, and not only the place of one."""
    return _VARIABLE.search(variable) is not None and _PLACE.search(variable) is None


def _known(environment: Mapping[str, str]) -> set[str]:
    values = {value.strip() for name, value in environment.items() if names_credential(name)}
    values |= {content for name in _TOKEN_FILES if (path := environment.get(name)) and (content := _content(path))}
    return {form for value in values if len(value) >= SHORTEST for form in _forms(value)}


def _forms(secret: str) -> set[str]:
    """Return a secret as it is, and as an address would hold it."""
    return {secret, quote(secret, safe="")}


@lru_cache(maxsize=16)
def _content(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        # Who needs it says so; here it only means that it cannot be in any text.
        return ""
