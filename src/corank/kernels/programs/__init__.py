"""The Triton programs; only imported where Triton is installed and one is about to be launched."""
