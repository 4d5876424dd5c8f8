"""Prompts: chat messages to token ids and positions; live clips."""
