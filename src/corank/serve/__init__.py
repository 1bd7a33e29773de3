"""Getting a compressed model into use: exports to other runtimes, and servers.

Nothing is imported here, so that a server's plug-in loads no more than it needs.
"""
