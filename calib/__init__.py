"""Quantization: recipes, and bundles whose weights are stored as integers."""

__all__: list[str] = []
