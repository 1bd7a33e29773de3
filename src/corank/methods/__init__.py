"""One file per published method, and nothing else. Registering a method is all it takes; its tests come with it."""
