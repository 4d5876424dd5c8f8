"""Reading a checkpoint: files, configuration, tensors on demand, packed weights, tokenizer."""
