"""outgrow: train on the one GPU you own, outgrow it without changing the recipe."""

__version__ = "0.1.0"
__all__ = ["__version__"]
