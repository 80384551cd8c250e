"""Several places for data, and one fast one to read them through.

What is known ahead of time: ``needs`` (which steps read which shard), ``schedule`` (what is fetched and evicted), ``prefetch``
(when), ``room``; ``simulate`` and ``forecast`` run the same on a virtual clock. What is done: ``prefetcher`` is a process whose
``supply`` fills a ``slot`` for the ``gate`` of each reader; ``transfer`` brings the bytes; ``placing`` makes whole copies.
"""
