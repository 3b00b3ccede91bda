"""Adapters and models in the formats of others: read, converted, exported, merged."""
