"""A CUDA device that computes nothing, for preflight.py. nullgpu.h says how it works."""
