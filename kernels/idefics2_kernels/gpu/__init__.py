"""Shared by all kernels: facts about the GPU, argument checks, dependent launch, tile counters.

This package must not import any kernel.
"""
