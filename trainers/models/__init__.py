"""Models: which families are tested, how one is configured, born, loaded, masked, and proven."""

from outgrow.torchvision import ensure_importable

ensure_importable()  # before any module here imports a model class of transformers
