"""Self-augmented data: pictures of people that a base model knows by name, and the same people edited by prompts."""
