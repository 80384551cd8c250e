"""Trackers: TensorBoard, MLflow and Weights & Biases hear of every record of a run, each in a thread of its own.

``events.jsonl`` is the truth that each can be rebuilt from; a tracker that fails is dropped and costs the run nothing.
"""

from outgrow.monitoring.trackers.choice import check_trackers, known_trackers, open_trackers, tracker_environment
from outgrow.monitoring.trackers.rebuild import rebuild
from outgrow.monitoring.trackers.tracking import OpenTracker, Tracker, Tracking

__all__ = [
    "OpenTracker",
    "Tracker",
    "Tracking",
    "check_trackers",
    "known_trackers",
    "open_trackers",
    "rebuild",
    "tracker_environment",
]
