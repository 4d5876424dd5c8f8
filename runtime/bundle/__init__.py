"""The bundle format: its contract, opening and checking a bundle, engines and ranges in it."""
