"""Methods that take away whole blocks, or channels and heads inside them."""
