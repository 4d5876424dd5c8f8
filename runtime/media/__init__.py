"""Media in: sound to log-mel, images and video frames to patches."""
