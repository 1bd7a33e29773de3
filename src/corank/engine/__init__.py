"""The life cycle of a compression: measure, allocate, factorize, block by block, resumable."""
