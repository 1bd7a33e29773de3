"""The ways to heal: one file each, which defines ``WAY``. The name of a way is that of its file, with hyphens."""
