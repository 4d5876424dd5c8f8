"""``omniport validate``: prove every graph, and the whole conversation, against PyTorch."""
