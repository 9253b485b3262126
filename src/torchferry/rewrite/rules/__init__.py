"""Rewriters of our own, one operator a file."""
