"""`python -m idcore.bench COMMAND`."""

from .main import main

raise SystemExit(main())
