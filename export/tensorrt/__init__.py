"""Building TensorRT and TensorRT-RTX engines, and checking what can be proven without the device."""
