"""Methods that train the model they compress."""
