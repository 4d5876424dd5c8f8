"""The host: memory and page cache."""
