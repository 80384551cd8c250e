"""The process of an agent that ``start`` has started: the site comes over standard input as JSON."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    if "--detach" in sys.argv and os.fork():
        os._exit(0)  # what is left has no parent that waits for it, or that would end it with its own children
    from outgrow.monitoring.agent.lifetime import serve
    from outgrow.recipes.schema.site import Site

    serving = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--serving="))
    site = Site.model_validate(json.load(sys.stdin))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    serve(site, keep="--keep" in sys.argv, detached=True, on_serving=lambda: os.close(serving))


if __name__ == "__main__":
    main()
