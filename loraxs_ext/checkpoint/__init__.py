"""Adapters of other methods and other shapes, read and written."""
