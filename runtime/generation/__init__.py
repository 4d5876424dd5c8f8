"""Decoding: thinker and talker over their KV caches, sampling, the conversation."""
