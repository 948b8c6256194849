"""All targets by name."""

from __future__ import annotations

from tests.fuzz import files, talk

TARGETS = {**files.TARGETS, **talk.TARGETS}
