"""Freezing: a plan of what is held, the mask and pin that hold it, the certificate that proves it."""
