"""Codec tokens to sound: the DiT in windows, the ODE solver, the vocoder."""
