"""The command line: parses, calls the packages, prints."""
