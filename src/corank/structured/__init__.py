"""Methods whose result is a smaller model of the same architecture."""
