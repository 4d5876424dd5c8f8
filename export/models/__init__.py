"""The model parts as torch modules, one file a part, as they are traced."""
