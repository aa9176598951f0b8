"""Directions held."""

METHODS = ()
