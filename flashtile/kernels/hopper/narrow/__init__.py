"""Decode over caches of 8 and 4 bits on Hopper: attention.py launches it, spec.py says what it is made of."""
