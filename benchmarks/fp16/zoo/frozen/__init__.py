"""Nets that nobody tunes on."""
