"""Threads of a reply: cancelling, bounded queues, scheduling of graph runs, timing."""
