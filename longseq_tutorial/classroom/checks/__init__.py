"""Checks of the exercises, one file a chapter."""
