"""Calibrating: real samples through every part in FP32, a layer at a time; observers, and scales chosen from them."""
