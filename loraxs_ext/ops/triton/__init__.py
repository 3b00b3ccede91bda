"""Triton kernels of the ops, one family per file. Importing this package does not import Triton; its modules do."""
