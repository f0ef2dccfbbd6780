"""Schedules and what they mean for a model, as data: nothing here knows torch."""
