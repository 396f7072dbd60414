"""DreamIdentity's training (arXiv 2307.00300): reconstruction of faces, and editability from the model's own edits."""
