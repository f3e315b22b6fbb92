"""Aggregators as pure functions over explicit state."""
