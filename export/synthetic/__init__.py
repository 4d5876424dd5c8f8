"""Random-weight checkpoints in the exact Hugging Face layout."""
