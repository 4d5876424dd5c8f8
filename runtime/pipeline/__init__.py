"""One reply: its three workers and what they deliver."""
