"""Harnesses and models that tests of several kinds share."""
