"""Predictors: one file per family, one registry."""
