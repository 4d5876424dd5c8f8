"""Measurements of the product: each module makes the page of its name in docs/results."""
