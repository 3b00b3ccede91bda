"""The parts of `benchmarks/gpu_check.py`: what is built, tested and measured in one call on a machine with a GPU."""
