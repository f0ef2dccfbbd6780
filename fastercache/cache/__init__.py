"""Rings, their formats, and the caches of a run."""
