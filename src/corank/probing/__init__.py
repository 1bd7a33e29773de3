"""Looking at the model itself: what its predictions lose if a matrix becomes smaller, measured, not modelled."""
