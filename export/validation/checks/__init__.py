"""The checks of a validation, in groups."""
