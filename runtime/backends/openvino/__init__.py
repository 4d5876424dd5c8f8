"""The OpenVINO backend, on the CPU."""
