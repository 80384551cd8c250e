"""``make_report``: what a dataset is made of, as one HTML page with plots that a browser opens without a network."""

from __future__ import annotations

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.report.clusters import biggest_clusters, cluster_sizes
from outgrow.streaming.report.facts import index_figures, look_through, mix_parts, stream_facts
from outgrow.streaming.report.page import Facts, render
from outgrow.streaming.report.samples import Reader, sample
from outgrow.streaming.store import TOKENIZER
from outgrow.streaming.tiers.on_demand import open_dataset
from outgrow.streaming.tokenizer import TextTokenizer


def make_report(site: Site, card: DatasetCard, recipe: Recipe) -> str:
    """The report of a recipe's dataset, HTML; the same dataset and recipe give the same page.

    Reads all document tables, a part at a time, and of the tokens a sample in a few shards: seconds, and minutes for a
    terabyte. Raises ``DataError`` where no place has the dataset, ``IntegrityError`` where a byte of it differs.
    """
    names = [stream.name for stream in recipe.data.streams]
    with open_dataset(site, card) as dataset:
        opened = look_through(dataset, card)
        reader = Reader(opened, TextTokenizer(opened.store / TOKENIZER))
        facts = Facts(
            streams=stream_facts(opened, card, recipe),
            indexes=index_figures(opened, card, names),
            mix=mix_parts(recipe, card),
            samples=[sample(reader, opened, name) for name in names],
            clusters=biggest_clusters(opened.dropped, [stream.name for stream in card.streams], reader.describe),
            cluster_sizes=cluster_sizes(opened.dropped),
        )
    return render(facts, card, recipe)
