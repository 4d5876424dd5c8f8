"""Responses: how they are made, and told."""
