"""Training that changes what a layer is: pruning by movement, factors and full matrices in turn."""
