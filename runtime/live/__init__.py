"""Talking hands-free: voice activity detection, turns one after another, interruptions."""
