"""Learned words in prompts: placeholders, what stands in their places, and the files that hold them."""
