"""`python -m idcore.bench COMMAND`."""

from ..errors import told
from .main import main

raise SystemExit(told(main))
