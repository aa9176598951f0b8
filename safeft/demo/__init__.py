"""The embedded default of safeft: a small made-up world and a small aligned chat model of it.

The world (:mod:`safeft.demo.world`) is sentences composed from tables, the model next to it was
trained on nothing else, so ``safeft demo`` needs neither a network nor a licence to foreign text.
"""
