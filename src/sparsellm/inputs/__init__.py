"""What users and other tools hand in, read and checked within limits before any work."""
