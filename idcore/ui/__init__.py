"""`idcore ui`: the engine in a browser, on this machine alone. `studio` is what it does, `page` how it looks."""
