"""Benchmarks: ratios within one run, never asserted."""
