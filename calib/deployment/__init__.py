"""Deploying: from a checkpoint to a bundle that is planned, made, checked and ready for one device."""
