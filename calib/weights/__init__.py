"""Quantizing weights: recipes, rounding, Q/DQ nodes, and writing the quantized graphs."""
