"""Writes ``dialogues.parquet`` (DuckDB 2.0.0) and ``texts.parquet`` (Polars 2.1.0) beside itself; outgrow needs neither."""

from __future__ import annotations

import datetime
from pathlib import Path

import duckdb
import polars

FOLDER = Path(__file__).parent

duckdb.sql(f"""
    copy (
        select
            i as id,
            [{{'role': 'user', 'content': 'Вопрос ' || i, 'name': null}},
             {{'role': 'assistant', 'content': 'Ответ ' || i, 'name': case when i % 2 = 0 then 'bot' end}}] as messages,
            case when i = 3 then null else 'тема ' || (i % 2) end as topic,
            map {{'a': i, 'b': i * 2}} as counts,
            timestamp '2024-05-06 07:08:09' + interval (i) day as at,
            (i / 4.0)::decimal(10, 2) as price,
            encode('raw ' || i) as raw
        from range(6) r(i)
    ) to '{FOLDER}/dialogues.parquet' (format parquet, compression zstd)
""")

polars.DataFrame(
    {
        "text": ["Первый текст", "second text", None, "", "пятый"],
        "score": [0.5, float("nan"), 1.0, None, 2.0],
        "at": polars.Series([datetime.datetime(2024, 1, 2, 3, 4, 5, 123456)] * 5).cast(polars.Datetime("ns")),
        "day": [datetime.date(2024, 1, day) for day in range(1, 6)],
        "tags": [["a", "b"], [], None, ["c"], ["d"]],
        "where": [{"file": f"f{line}", "line": line} for line in range(5)],
        "kind": polars.Series(["x", "y", "x", "y", "x"], dtype=polars.Categorical),
    }
).write_parquet(FOLDER / "texts.parquet", compression="snappy")
