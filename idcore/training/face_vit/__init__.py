"""Training of the face ViT that DreamIdentity's encoder begins with: face identification."""
