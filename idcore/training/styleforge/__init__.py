"""StyleForge and Multi-StyleForge (arXiv 2404.05256): training of artistic styles."""
