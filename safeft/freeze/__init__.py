"""Freezing: a plan of what is held, mask and pin that hold it, a certificate that proves it."""
