"""Wren: a small Qwen2.5-Omni that really hears, sees and speaks, trained from nothing on two CPU cores."""
