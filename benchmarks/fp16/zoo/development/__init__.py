"""Nets that whoever tunes may look at."""
