"""The quantization report: recorded graph calls replayed on every bundle, and losses by layer."""
