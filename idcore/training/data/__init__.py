"""Training data: read, filtered and cached once by `idcore prepare`, then drawn in an order that hangs on the step."""
