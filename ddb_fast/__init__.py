"""Diffusing DeBias: find the shortcut an image set teaches, train a classifier without it."""

__version__ = "0.1.0"
