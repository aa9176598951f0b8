"""Pieces of `benchmarks/guard.py`: labelled public sets, and what the guard is compared with."""
