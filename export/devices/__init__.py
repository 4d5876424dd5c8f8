"""Devices that engines are built for: the catalogue, the GPU of this machine, memory for building."""
