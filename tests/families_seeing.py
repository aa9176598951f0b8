"""Families that see pictures: encoders of their own, and towers beside a language model."""

from tests.family import Family

SEEING: tuple[Family, ...] = ()
