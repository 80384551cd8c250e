"""What every section of a recipe or site has in common, and the open variant ``kind: custom``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Frozen; unknown keys refused; the docstring under a field is its description in the schema and the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""``package.module:function``, imported where it is needed."""


class Custom(Section):
    """The open variant of a field that has many kinds: a function of yours, given ``options`` as keyword arguments."""

    kind: Literal["custom"]
    factory: Factory
    """``package.module:function``; must be importable on every node."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function; plain YAML values."""
