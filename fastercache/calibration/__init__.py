"""Fits schedules to a pipeline: which steps run, and the coefficients of what stands in for the others."""
