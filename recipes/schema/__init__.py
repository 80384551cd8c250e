"""The sections of a recipe, one file each, and ``Recipe`` that holds them."""

from outgrow.recipes.schema.recipe import Recipe

__all__ = ["Recipe"]
