"""SeFi-IDE's training: one person's words per stage, from one photo (arXiv 2402.00631)."""
