"""Options of fsspec file systems, of which some are secrets that never show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, SecretStr

from outgrow.recipes.schema.section import Mark

SECRET_NAME = re.compile("key|secret|token|passw|credential|connection_string", re.IGNORECASE)
"""Names of options whose text is a secret."""

Value: TypeAlias = str | int | bool | SecretStr


def _hide(options: dict[str, Value]) -> dict[str, Value]:
    return {k: SecretStr(v) if isinstance(v, str) and SECRET_NAME.search(k) else v for k, v in options.items()}


Options = Annotated[dict[str, Annotated[Value, Mark.SECRET]], AfterValidator(_hide)]
"""Options by name; a text whose name sounds like a secret is one."""


def _hidden(text: str | SecretStr) -> SecretStr:
    return SecretStr(text) if isinstance(text, str) else text


Secret = Annotated[str | SecretStr, AfterValidator(_hidden), Mark.SECRET]
"""A text that may be a secret, such as a URL with a password in it; out of sight, given or taken from the environment."""


def clear_text(secret: str | SecretStr) -> str:
    """A secret IN CLEAR; never print or write it where others can read it."""
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret


def without_credentials(url: str) -> str:
    """A path or URL for people: a user and password before its host do not show."""
    return re.sub("://[^/@]+@", "://***@", url)


def in_clear(options: Mapping[str, Value]) -> dict[str, Any]:
    """The options as fsspec takes them, secrets IN CLEAR; never print or write them."""
    return {k: v.get_secret_value() if isinstance(v, SecretStr) else v for k, v in options.items()}
