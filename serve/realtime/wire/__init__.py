"""What travels between a client and its session."""
