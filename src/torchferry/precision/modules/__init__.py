"""Repairing a module: by its weights, or where these do not do, as the calls of ATen that it makes."""
