"""``python -m corank``."""

from corank.cli import main

raise SystemExit(main())
