"""PuLID's training (Guo et al., arXiv 2404.16022, sections 3.3 to 3.6): settings, task, stages, validation, result."""
