"""Answers of many adapters at once: in this process, behind HTTP, and through engines of others."""
