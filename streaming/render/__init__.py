"""From documents to tokens, loss weights and borders: chat templates, tags, and what of a dialogue is learned."""

from __future__ import annotations

from outgrow.streaming.render.preparing import prepare_tokenizer
from outgrow.streaming.render.renderer import Rendered, Renderer
from outgrow.streaming.render.templates import template_identity, template_text

__all__ = ["Rendered", "Renderer", "prepare_tokenizer", "template_identity", "template_text"]
