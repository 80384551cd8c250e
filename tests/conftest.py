"""One thread for the tests' own arithmetic: tensors are tiny, and threads that spin steal from processes under test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
