"""How the places of a site are: whether they can be read and written, what is free, and what outgrow has copied there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from outgrow import retry
from outgrow.errors import OutgrowError
from outgrow.recipes.schema.site import Site
from outgrow.storage import nearest_folder
from outgrow.streaming.tiers.places import Place, open_places
from outgrow.streaming.tiers.slot import SlotState, absence, placed_bytes, slots

_PATIENCE_S = 5.0
"""So long a bucket is asked again."""
_ANSWER_S = 30.0
"""A place that has not answered by then, such as a disk that hangs, is given up."""
_TRIAL = b"outgrow wrote this to see whether it can; it may be deleted\n"


@dataclass(frozen=True, kw_only=True)
class PlaceState:
    """A place as it is now.

    ``problem`` says what is wrong with it, else empty; ``note`` what is not, but worth a word. ``free_bytes`` is None for a
    bucket, and where it cannot be told. ``placed_bytes`` are whole copies that outgrow made, ``slots`` copied shards of runs.
    """

    place: Place
    problem: str = ""
    note: str = ""
    free_bytes: int | None = None
    placed_bytes: int = 0
    slots: Sequence[SlotState] = field(default=())

    @property
    def slot_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self.slots)


def examine(site: Site) -> list[PlaceState]:
    """The state of every place of a site, in the order of tiers; all are asked at once, and for half a minute at most."""
    places = open_places(site)
    found = [PlaceState(place=place, problem=f"does not answer within {_ANSWER_S:.0f} s") for place in places]

    def look(number: int) -> None:
        found[number] = _examine(places[number], is_given=any(places[number].tier is tier for tier in site.tiers))

    # Daemons: a thread that waits for a dead disk cannot be ended, and must not keep the process.
    threads = [threading.Thread(target=look, args=(number,), daemon=True) for number in range(len(places))]
    for thread in threads:
        thread.start()
    give_up = time.monotonic() + _ANSWER_S
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    return list(found)


def read_errors(states: Sequence[PlaceState]) -> dict[str, Counter[str]]:
    """Errors by kind of every place that runs have read through the slots that are left, by the place's name."""
    errors: dict[str, Counter[str]] = {}
    for state in states:
        for slot in state.slots:
            for name, traffic in (slot.counts.tiers if slot.counts else {}).items():
                errors.setdefault(name, Counter()).update(traffic.errors)
    return errors


def _examine(place: Place, *, is_given: bool) -> PlaceState:
    """``is_given``: a tier of the site, whose folder is made only where its disk is there."""
    try:
        if place.is_local and not place.folder.exists():
            return _not_made_yet(place, is_given=is_given)
        _try_to_write(place)
        return PlaceState(
            place=place,
            note=_fullness(place),
            free_bytes=place.storage.free_bytes(),
            placed_bytes=placed_bytes(replace(place, storage=place.storage.with_patience(_PATIENCE_S))),
            slots=slots(place) if place.is_local else (),
        )
    except OutgrowError as error:
        return PlaceState(place=place, problem=error.message)
    except Exception as error:  # whatever a file system of fsspec raises
        return PlaceState(place=place, problem=retry.describe(error))


def _not_made_yet(place: Place, *, is_given: bool) -> PlaceState:
    if is_given and (missing := absence(place.folder)):
        return PlaceState(place=place, problem=f"not there: {missing}; is its disk mounted?")
    above = nearest_folder(place.folder)
    if not os.access(above, os.W_OK):
        return PlaceState(place=place, problem=f"not there, and {above} cannot be written")
    return PlaceState(place=place, note=f"not there yet: made in {above} when needed", free_bytes=place.storage.free_bytes())


def _try_to_write(place: Place) -> None:
    """Write a small file durably, read it and remove it. Raises what goes wrong."""
    storage, key = place.storage.with_patience(_PATIENCE_S), f".outgrow-trial-{socket.gethostname()}-{os.getpid()}"
    storage.write(key, _TRIAL)
    try:
        if storage.read(key) != _TRIAL:
            raise OSError("what is read is not what was written")
    finally:
        storage.remove(key)


def _fullness(place: Place) -> str:
    free = place.storage.free_bytes()
    return "less than reserve: is free" if free is not None and free < place.tier.reserve_bytes else ""
