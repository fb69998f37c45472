"""Measurements over the same stack as the tests."""
