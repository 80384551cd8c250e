"""The JSON of every dashboard; ``python -m outgrow.monitoring.dashboards.build`` rewrites it, a test fails when it is stale."""

from __future__ import annotations

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from outgrow.monitoring.dashboards import goodput, gpus, ranks, run, tiers
from outgrow.monitoring.dashboards.frame import Page, build
from outgrow.monitoring.dashboards.written import FOLDER


def pages() -> list[Page]:
    return [run.page(), goodput.page(), tiers.page(), gpus.page(), ranks.page()]


def files() -> dict[str, str]:
    """The text of every generated file, by its name."""
    return {f"{page.uid}.json": _text(build(page)) for page in pages()}


def _text(dashboard: Dashboard) -> str:
    plain = json.loads(json.dumps(dashboard, cls=JSONEncoder))
    # The library says that links and marks belong in a menu, where nobody finds them.
    for entry in [*plain["links"], *plain["annotations"]["list"]]:
        entry.pop("placement", None)
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
