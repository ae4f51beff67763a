"""Hypothesis profiles: ``--hypothesis-profile nightly`` looks at five times as many examples."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("nightly", max_examples=5 * settings.get_profile("default").max_examples)
