"""Face analysis and vision towers: photos in, embeddings out. Import the module that you need."""
