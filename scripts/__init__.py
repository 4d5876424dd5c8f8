"""Tools of the checkout: documentation that comes from the code, the demo, sample media."""
