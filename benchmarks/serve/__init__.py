"""The parts of `benchmarks/serving.py`: what is served, and one module per section of the result."""
