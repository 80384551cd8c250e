"""Checkpoints: committed or absent, verified before they are trusted, readable at any world size by any engine.

``saving`` writes them behind the training loop, ``resume`` loads the newest whole one, ``reader`` reads one, ``catalog`` lists
them without importing torch, ``format`` says what lies in the files.
"""
