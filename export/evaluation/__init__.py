"""What validation, benchmarks and calibration share: conversations, recordings, metrics, reference, plots."""
