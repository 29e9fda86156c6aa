"""Salver's Python client."""
