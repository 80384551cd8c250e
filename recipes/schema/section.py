"""What every section of a recipe or site has in common, and the open variant ``kind: custom``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

BROKEN_RULES = "broken_rules"
"""Type of the error whose context holds ``broken``: every (key below the section, message) that ``Section.rules`` gave."""


class Mark(Enum):
    """What a text means beyond its type."""

    LOCATION = "location"
    """A folder, file or URL: ``~`` and relative paths are worked out, ``${env:NAME}`` is allowed."""
    SECRET = "secret"
    """May be a secret: ``${env:NAME}`` is allowed, and kept out of sight."""
    SIZE = "size"
    """Bytes with their unit."""
    RATE = "rate"
    """Bytes a second with their unit."""
    NAME = "name"
    """A name that the site maps to a folder or file, or a path relative to the recipe."""


class Section(BaseModel):
    """Frozen; unknown keys refused; the docstring under a field is its description in the schema and the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def rules(self) -> Iterator[tuple[str, str]]:
        """Broken rules across the fields of this section: the key to change, below this section, and what is wrong with it."""
        yield from ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        broken = list(self.rules())
        if broken:
            text = "; ".join(f"{key}: {message}" for key, message in broken)
            raise PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "broken": broken})
        return self


def _no_path_of_one_machine(value: str) -> str:
    if value.startswith(("/", "~")) or "://" in value:
        raise ValueError(f"'{value}' holds on one machine alone; give a name here, and its folder under sources: in site.yaml")
    return value


SourceName = Annotated[str, Field(min_length=1), AfterValidator(_no_path_of_one_machine), Mark.NAME]
"""A name that the site maps to a folder, or a path relative to the recipe."""


Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""``package.module:function``, imported where it is needed."""


class Custom(Section):
    """The open variant of a field that has many kinds: a function of yours, given ``options`` as keyword arguments."""

    kind: Literal["custom"]
    factory: Factory
    """``package.module:function``; must be importable on every node."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function; plain YAML values."""
