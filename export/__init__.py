"""From a checkpoint to a bundle, and from a bundle to engines; checking and planning both. The only place for torch."""
