"""`omniport talk`: sound devices, the loop of a conversation, and what the terminal shows."""
